"""`orchestrator generate` on folders that hold no usable adapter: one clear error each."""

import json
import shutil
from pathlib import Path

import pytest

from jobs.generate import generate_text
from orchestrator.errors import BaseModelError, ConfigError
from orchestrator.records import TrialDone
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_pack import train


@pytest.fixture(scope="module")
def trained(make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    _, events = train(make_spec(num_slots=1), [trial_config(steps=2)], folder)
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    return Path(done.adapter_dir)


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


def generate(folder: Path) -> int:
    return generate_text("What is 1 plus 1?", str(folder), 2, 0.0, None, Path("runs"))


def test_an_adapter_folder_generates(adapter: Path) -> None:
    assert generate(adapter) == 0


def test_an_adapter_folder_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder .*nowhere: choose models:/NAME@ALIAS"):
        generate(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "orchestrator.json"]
)
def test_a_folder_that_lacks_an_adapters_file_is_refused_with_the_remedy(
    adapter: Path, name: str
) -> None:
    (adapter / name).unlink()
    with pytest.raises(ConfigError, match=f"has no {name}: choose models:/NAME@ALIAS"):
        generate(adapter)


def test_a_damaged_record_is_named(adapter: Path) -> None:
    (adapter / "orchestrator.json").write_text("{")
    with pytest.raises(ConfigError, match="orchestrator.json is damaged"):
        generate(adapter)


def test_a_base_model_that_is_not_on_this_machine_is_one_clear_error(adapter: Path) -> None:
    record = json.loads((adapter / "orchestrator.json").read_text())
    record["base_model"]["folder"] = "/nowhere"
    (adapter / "orchestrator.json").write_text(json.dumps(record))
    with pytest.raises(BaseModelError, match="not in /nowhere.*ORCHESTRATOR_BASE_MODEL"):
        generate(adapter)

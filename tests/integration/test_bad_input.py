"""Whatever is wrong: one clear error, a non-zero exit code, nothing half-written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.tracking.stores import default_store
from tests.integration.conftest import Command, write_config


def refused(orchestrator: Command, folder: Path, *arguments: str, code: int = 2) -> str:
    """The one error that the command ends with, having written nothing."""
    before = sorted(path for path in folder.rglob("*") if path.name != "lock")
    done = orchestrator(*arguments, cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path for path in folder.rglob("*") if path.name != "lock") == before
    return done.stderr


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("trial.adapter.rnk=3", "did you mean 'rank'?"),
        ("trial.steps=many", "trial.steps: Input should be a valid integer"),
        ("trial.micro_batch_size=3", "micro_batch_size must divide batch_size"),
        ("base_model.source=./nowhere", "./nowhere does not exist"),
        ("base_model.source=package:nowhere/x.gguf", "pip install"),
        ("data.train=rowz.jsonl", "did you mean"),
        ("resources.device=cuda", "there is no GPU"),
    ],
)
def test_a_mistake_in_the_configuration_is_named(
    orchestrator: Command, tmp_path: Path, tiny_base: Path, setting: str, words: str
) -> None:
    config = write_config(tmp_path, tiny_base)
    assert words in refused(orchestrator, tmp_path, "train", str(config), "--set", setting)


def test_a_base_and_a_dataset_that_are_not_there_are_named_at_once(
    orchestrator: Command, tmp_path: Path, tiny_base: Path
) -> None:
    config = write_config(tmp_path, tiny_base, base_model__source="./nowhere")
    for options in ([], ["--dry-run"]):
        message = refused(
            orchestrator, tmp_path, "sweep", str(config), "--set", "data.train=rowz.jsonl", *options
        )
        assert "./nowhere does not exist" in message
        assert "rowz.jsonl: file not found" in message


def test_a_missing_configuration_is_named(orchestrator: Command, tmp_path: Path) -> None:
    assert "nowhere.yaml" in refused(orchestrator, tmp_path, "sweep", "nowhere.yaml")


def test_an_empty_dataset_is_named(orchestrator: Command, tmp_path: Path, tiny_base: Path) -> None:
    config = write_config(tmp_path, tiny_base)
    (tmp_path / "rows.jsonl").write_text("")
    assert "rows.jsonl" in refused(orchestrator, tmp_path, "train", str(config))


def test_a_model_folder_without_a_tokenizer_is_named(
    orchestrator: Command, tmp_path: Path, tiny_base: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    for path in base.glob("*token*"):
        path.unlink()
    config = write_config(tmp_path, base)
    assert "no tokenizer" in refused(orchestrator, tmp_path, "train", str(config))


@pytest.mark.parametrize(
    "command", [["train"], ["sweep"], ["sweep", "--dry-run"], ["plan", "--gpus", "1xH100-80GB"]]
)
def test_a_base_whose_files_are_quantised_already_is_named(
    orchestrator: Command, tmp_path: Path, tiny_base: Path, command: list[str]
) -> None:
    base = tmp_path / "base-bnb-4bit"
    shutil.copytree(tiny_base, base)
    settings = json.loads((base / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(settings))
    config = write_config(tmp_path, base)
    message = refused(orchestrator, tmp_path, command[0], str(config), *command[1:])
    assert "quantised already (by bitsandbytes)" in message
    assert "name the unquantised original" in message


@pytest.mark.parametrize("uri", ["sqlite:////proc/nowhere/mlflow.db", "ftp://somewhere"])
def test_a_tracking_server_that_cannot_be_used_is_named_before_anything_starts(
    orchestrator: Command, tmp_path: Path, tiny_base: Path, uri: str
) -> None:
    config = write_config(tmp_path, tiny_base, tracking__uri=uri)
    message = refused(orchestrator, tmp_path, "sweep", str(config), code=1)
    assert uri.split("://")[0] in message


@pytest.mark.slow
def test_a_deleted_experiment_ends_the_command_before_a_trial_is_trained(
    orchestrator: Command, tmp_path: Path, tiny_base: Path
) -> None:
    config = write_config(tmp_path, tiny_base)
    client = MlflowClient(default_store(tmp_path / "runs"))
    client.delete_experiment(client.create_experiment("sums"))
    done = orchestrator("train", str(config), "--run-dir", "runs/one", cwd=tmp_path)
    assert done.returncode == 1
    assert "mlflow experiments restore" in done.stderr
    assert not list((tmp_path / "runs/one/trials").glob("*/attempts"))


def bad_rows(folder: Path, base: Path, row: object, **changes: object) -> Path:
    config = write_config(folder, base, **changes)
    rows = folder / "rows.jsonl"
    rows.write_text(rows.read_text() + json.dumps(row) + "\n")
    return config


def test_a_row_without_the_fields_is_named_with_its_line(
    orchestrator: Command, tmp_path: Path, tiny_base: Path
) -> None:
    config = bad_rows(tmp_path, tiny_base, {"question": "a", "completion": "b"})
    done = orchestrator("train", str(config), cwd=tmp_path)
    assert done.returncode == 2
    assert "rows.jsonl:121" in done.stderr
    assert "data.fields.prompt" in done.stderr


def test_an_overlong_example_is_named_with_the_remedies(
    orchestrator: Command, tmp_path: Path, tiny_base: Path
) -> None:
    config = bad_rows(tmp_path, tiny_base, {"prompt": "a", "completion": "b" * 500})
    done = orchestrator("train", str(config), cwd=tmp_path)
    assert done.returncode == 2
    assert "rows.jsonl:121" in done.stderr
    assert "data.overlong" in done.stderr


def test_a_folder_that_is_no_run_cannot_be_resumed(orchestrator: Command, tmp_path: Path) -> None:
    assert "no run folder" in refused(orchestrator, tmp_path, "resume", ".")
    assert "holds no run" in refused(orchestrator, tmp_path, "report")


def test_a_full_disk_is_named_and_the_run_can_be_resumed_after_it(
    environment: Mapping[str, str], tmp_path: Path, tiny_base: Path
) -> None:
    config = write_config(tmp_path, tiny_base, trial__steps=4)
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000));"
        "from jobs.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    # A file-size limit stands in for a full disk: the same kind of error, without a disk to fill.
    done = subprocess.run(
        [sys.executable, "-c", limited, "train", str(config), "--run-dir", "runs/one"],
        cwd=tmp_path,
        env=dict(environment) | {"ORCHESTRATOR_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode != 0
    assert "disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.tmp"))

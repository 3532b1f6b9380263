import re
from pathlib import Path

import pytest

from jobs.cli import app
from jobs.dry_run import show_plan
from jobs.reference import render_reference
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.loading import load_config
from orchestrator.planning.capacity import Node
from tests.sweeps import make_store

ROOT = Path(__file__).parents[2]
MACHINE = Node(2, 0)


def test_the_reference_is_the_schema() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    assert text == render_reference(), "run `orchestrator schema --markdown > docs/reference.md`"


def test_every_field_of_the_reference_has_a_meaning() -> None:
    assert [line for line in render_reference().splitlines() if line.endswith("|  |")] == []


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "configs").glob("*.yaml")))
def test_every_shipped_config_is_valid_and_begins_with_its_command(path: Path) -> None:
    load_config(path)
    assert path.read_text().startswith(f"# orchestrator sweep jobs/configs/{path.name}\n")


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_guide_names_every_command() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"orchestrator {command.callback.__name__}" in guide


@pytest.fixture
def sweep_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "base").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "base" / name).write_text("{}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"name: t\nbase_model: {{source: {tmp_path}/base}}\ndata: {{train: {rows}}}\n"
        "search: {space: {adapter.rank: [4, 8]}}\n"
    )
    return path


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("resources.num_workers=3", "3 workers of 1 CPU core do not fit"),
        ("resources.cpus_per_worker=4", "no worker of 4 CPU cores fits"),
        ("resources.device=cuda", "there is no GPU"),
        ("search.space.micro_batch_size=[3]", "micro_batch_size must divide batch_size"),
    ],
)
def test_a_dry_run_refuses_what_the_sweep_refuses_and_prints_nothing(
    sweep_file: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        show_plan(sweep_file, [override], None, None, MACHINE)
    assert capsys.readouterr().out == ""


def test_a_dry_run_refuses_a_run_folder_that_is_taken(sweep_file: Path) -> None:
    config = load_config(sweep_file)
    make_store(sweep_file.parent / "run", config)
    with pytest.raises(RunFolderError):
        show_plan(sweep_file, [], sweep_file.parent / "run", None, MACHINE)


@pytest.mark.parametrize("override", ["resources.num_workers=64", "resources.device=cuda"])
def test_a_dry_run_for_a_cluster_does_not_judge_by_this_machine(
    sweep_file: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    assert show_plan(sweep_file, [override], None, "head:6379", MACHINE) == 0
    assert "depends on the Ray cluster at head:6379" in capsys.readouterr().out


def test_a_dry_run_shows_no_password_of_the_environment(
    sweep_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://u:secret@h/db")
    show_plan(sweep_file, [], None, None, MACHINE)
    out = capsys.readouterr().out
    assert "postgresql://" in out
    assert "secret" not in out


def test_a_dry_run_shows_the_rungs(sweep_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["search.pruner=asha", "trial.steps=64"]
    assert show_plan(sweep_file, overrides, None, None, MACHINE) == 0
    assert "pruner: asha, rungs at steps 4, 16\n" in capsys.readouterr().out
    assert (
        show_plan(sweep_file, [*overrides, "search.space={steps: [3, 64]}"], None, None, MACHINE)
        == 0
    )
    assert "pruner: asha, rungs at steps 1 of 3; 4, 16 of 64\n" in capsys.readouterr().out


def test_a_dry_run_says_where_a_pruner_has_too_few_trials_to_compare(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = "search.space={batch_size: [4, 8, 16, 32]}"
    few = "4 of 4 trials compete with fewer than 3 others"
    for settings, expected in (([], True), (["trial.micro_batch_size=4"], False)):
        overrides = ["search.pruner=asha", space, *settings]
        assert show_plan(sweep_file, overrides, None, None, MACHINE) == 0
        assert (few in capsys.readouterr().out) == expected


def test_a_dry_run_names_the_drawn_trials_that_will_not_be_trained(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ["search.sampler=random", "search.num_trials=8", "search.space.micro_batch_size=[2,3]"]
    show_plan(sweep_file, search, None, None, MACHINE)
    assert "will not be trained: micro_batch_size must divide" in capsys.readouterr().out

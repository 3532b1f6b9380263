"""The command line's own behaviour, without training anything."""

import io
import socket
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from jobs.cli import run
from jobs.environment import describe_environment
from jobs.pre_stop import drivers, save
from jobs.settled import settled
from jobs.sweep import changed_config, resume_sweep
from jobs.views import open_run, serve_ui
from orchestrator.errors import ConfigError, OrchestratorError, RunFolderError, TrackingError
from orchestrator.files import read_json, write_json
from orchestrator.loading import override_config, trial_with
from orchestrator.records import TrialSpec
from orchestrator.sweep.run_store import RunStore, new_run_id
from tests.sweeps import make_store, sweep_config


@pytest.mark.parametrize(
    "arguments", [["bogus"], ["sweep"], ["sweep", "--nope"], ["ui", "--port", "abc"]]
)
def test_a_usage_mistake_is_one_error_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "verb"), [([], "sweep"), (["data"], "prepare"), (["registry"], "promote")]
)
def test_a_command_without_a_verb_shows_its_verbs_and_no_error(
    arguments: list[str], verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Usage: ")
    assert f"\n  {verb}" in shown
    assert "see `" not in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["swep"], "Did you mean 'sweep'?: see `orchestrator --help`"),
        (["sweep"], "Missing argument 'CONFIG': see `orchestrator sweep --help`"),
        (["data", "stats"], "Missing argument 'CONFIG': see `orchestrator data stats --help`"),
        (["sweep", "f", "--dryrun"], "see `orchestrator sweep --help`"),
    ],
)
def test_a_mistake_points_to_the_help_of_its_own_command(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert words in shown


def test_the_help_names_running_a_sweep_first_and_every_verb_in_one_whole_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["--help"]) == 0
    verbs = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    assert verbs[0].split()[0] == "sweep"
    assert [line for line in verbs if line.endswith("...")] == []


def test_it_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"orchestrator {metadata.version('qlora-orchestrator')}\n"


def test_there_is_no_ui_where_there_is_no_run_and_nothing_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs = tmp_path / "runs"
    said = []
    for verb in ("ui", "report"):
        assert run([verb, "--runs-dir", str(runs)]) == 2
        said.append(capsys.readouterr().err)
    assert said == [f"error: {runs} holds no run: name a run folder, or --runs-dir\n"] * 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [[], ["--tracking-uri", "sqlite:///{folder}/other.db"]])
def test_a_ui_of_a_store_that_is_not_there_points_to_sync(
    tmp_path: Path,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    make_store(tmp_path / "run", sweep_config())
    where = [option.format(folder=tmp_path) for option in options]
    assert run(["ui", "--runs-dir", str(tmp_path), *where]) == 1
    assert "is not there: `orchestrator sync` makes it" in capsys.readouterr().err
    assert list(tmp_path.glob("*.db")) == []


def test_doctor_says_how_long_each_operator_takes_to_compile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.training.deepspeed_ops import BUILD_S

    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "240")
    run(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    for op, seconds in BUILD_S.items():
        (line,) = [line for line in lines if f"DeepSpeed {op}" in line]
        assert "note" in line
        assert f"not built: its first use compiles it, about {seconds} seconds" in line


class Interrupted(io.StringIO):
    def read(self, size: int | None = -1) -> str:
        raise KeyboardInterrupt


def test_a_command_that_is_interrupted_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Interrupted())
    assert run(["sweep", "-"]) == 130
    assert capsys.readouterr().err.split() == ["interrupted"]


class InterruptedAtTheWarning(io.StringIO):
    def write(self, text: str) -> int:
        if "brings MLflow up to date later" in text:
            raise KeyboardInterrupt
        return super().write(text)


def test_an_interrupt_while_tracking_is_closed_still_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sweep_config(tracking__uri="http://127.0.0.1:9", base_model__source="/no/base")
    folder = make_store(tmp_path / "run", config).folder
    printed = InterruptedAtTheWarning()
    monkeypatch.setattr("sys.stdout", printed)
    assert run(["resume", str(folder)]) == 130
    assert f"orchestrator resume {folder}" in printed.getvalue()


def test_a_settled_config_means_the_same_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "base").mkdir()
    here = settled(sweep_config(base_model__source="./base"))
    assert here.data.train == str(tmp_path / "train.jsonl")
    assert here.base_model.source == str(tmp_path / "base")
    monkeypatch.chdir("/")
    assert settled(here) == here
    assert here.tracking.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_a_database_is_the_same_one_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db?timeout=9")
    assert settled(sweep_config()).tracking.uri == f"sqlite:///{tmp_path}/mlflow.db?timeout=9"


def test_a_password_in_the_environment_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@host/db")
    assert "secret" not in settled(sweep_config()).model_dump_json()


def test_a_run_folder_that_cannot_be_read_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = make_store(tmp_path / "whole", sweep_config())
    for name, content in (("cut", "{"), ("other", '{"format": 9}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sweep.json").write_text(content)
    assert open_run(None, tmp_path).folder == whole.folder
    assert capsys.readouterr().err.count("is damaged, or of another version") == 2
    with pytest.raises(RunFolderError, match="is damaged, or of another version"):
        resume_sweep(tmp_path / "cut", None, [])


def test_going_on_needs_the_folder_to_go_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sweep", "sweep.yaml", "--or-resume"]) == 2
    assert "--or-resume needs --run-dir" in capsys.readouterr().err


def test_a_port_that_is_taken_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TrackingError, match=f"--port {port} cannot be used"):
            serve_ui(port, None, tmp_path)


def test_two_sweeps_of_one_name_in_one_second_have_different_ids() -> None:
    assert new_run_id("sums", 0.0) != new_run_id("sums", 0.0)


def test_a_resume_may_change_resources_but_not_what_is_trained(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    store.change_config(override_config(store.sweep.config, ["resources.num_workers=3"]))
    assert RunStore.open(store.folder).sweep.config.resources.num_workers == 3
    other = override_config(store.sweep.config, ["trial.steps=7"])
    with pytest.raises(RunFolderError, match="trial.steps: 6 -> 7"):
        store.change_config(other)


def test_a_sweep_that_runs_is_not_changed_by_a_resume(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config(search__sampler="tpe", search__num_trials=4))
    with store.locked(), pytest.raises(RunFolderError, match="in use by another process"):
        resume_sweep(store.folder, None, [], add_trials=3)
    assert RunStore.open(store.folder).sweep.config.search.num_trials == 4


@pytest.mark.parametrize(
    ("overrides", "add_trials", "expected"),
    [
        ([], 3, {"num_trials": 7, "sampler": "tpe"}),
        (["search.num_trials=9"], None, {"num_trials": 9, "sampler": "tpe"}),
        (["search.sampler=random"], 1, {"num_trials": 5, "sampler": "random"}),
        (["search.ahead=2"], 1, {"num_trials": 5, "ahead": 2}),
        (["search.space.adapter.alpha=[8, 16]"], None, {"num_trials": 4, "sampler": "tpe"}),
    ],
)
def test_a_complete_sweep_can_be_extended(
    tmp_path: Path, overrides: list[str], add_trials: int | None, expected: dict[str, object]
) -> None:
    config = sweep_config(search__sampler="tpe", search__num_trials=4, runs_dir=str(tmp_path))
    store = make_store(tmp_path / "run", config)
    store.write("done", {})
    store.change_config(changed_config(store, overrides, add_trials))
    search = RunStore.open(store.folder).sweep.config.search
    assert {name: getattr(search, name) for name in expected} == expected
    assert store.read("done") is None


def test_an_extension_that_cannot_be_started_leaves_a_complete_sweep_as_it_is(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path / "run", sweep_config(runs_dir=str(tmp_path)))
    for name in ("winner", "registration", "done"):
        store.write(name, {})
    before = store.sweep
    wider = ["search.space.adapter.rank=[4, 8, 16]"]
    with pytest.raises(OrchestratorError, match="file not found"):  # neither base nor rows
        resume_sweep(store.folder, None, wider)
    assert store.sweep == before
    assert all(store.read(name) is not None for name in ("winner", "registration", "done"))


def test_trials_are_added_to_those_that_are_not_asked_for_yet(tmp_path: Path) -> None:
    config = sweep_config(search__space={"adapter.rank": [2, 4, 8]})
    store = make_store(tmp_path / "run", config)
    wider = changed_config(store, ["search.space.adapter.rank=[2, 4, 8, 16, 32]"], 1)
    assert wider.search.num_trials == 4


def test_changing_resources_does_not_open_a_complete_sweep_again(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    store.write("done", {})
    store.change_config(changed_config(store, ["resources.num_workers=3"], None))
    assert store.read("done") is not None


@pytest.mark.parametrize("sampler", ["grid", "tpe", "random"])
def test_a_space_that_is_trained_whole_says_how_to_add_trials(tmp_path: Path, sampler: str) -> None:
    config = sweep_config(search__space={"adapter.rank": [4]})
    store = make_store(tmp_path / "run", config)
    store.add_trial(
        TrialSpec(0, {"adapter.rank": 4}, trial_with(config.trial, {"adapter.rank": 4}))
    )
    with pytest.raises(ConfigError, match="widen it with --set search.space"):
        changed_config(store, [f"search.sampler={sampler}"], 5)
    wider = [f"search.sampler={sampler}", "search.space.adapter.rank=[4, 8]"]
    assert changed_config(store, wider, 5).search.num_trials == 6


def test_a_run_keeps_its_packages_and_the_commit_of_the_folder_it_was_started_in(
    tmp_path: Path,
) -> None:
    record = describe_environment(tmp_path)
    assert record["git_commit"] == ""
    assert record["packages"]["mlflow"] == metadata.version("mlflow")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    assert len(describe_environment(tmp_path)["git_commit"]) == 40


def test_a_pod_finds_its_driver_and_no_other_process(tmp_path: Path) -> None:
    """The folder stands for /proc."""
    commands = {
        "7": ["python", "/opt/venv/bin/orchestrator", "sweep", "-", "--run-dir", "/mnt/runs/a-1"],
        "8": ["ray", "start", "--head", "--block"],
        "9": ["orchestrator", "resume", "/mnt/runs/a-1"],
        "self": ["orchestrator", "sweep", "--run-dir", "x", "--or-resume"],
    }
    commands["7"] += ["--or-resume", "--ray-address", "auto"]
    for process, command in commands.items():
        (tmp_path / process).mkdir()
        (tmp_path / process / "cmdline").write_bytes("\0".join([*command, ""]).encode())
    assert list(drivers(tmp_path)) == [(7, Path("/mnt/runs/a-1"))]


def test_a_driver_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert not save(ended.pid, tmp_path, patience_s=0)


@pytest.mark.parametrize("settings", [[], ["resources.device=cpu"]])
def test_a_sweep_that_was_begun_on_gpus_does_not_go_on_without(
    tmp_path: Path, settings: list[str]
) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    record = read_json(store.folder / "sweep.json")
    write_json(store.folder / "sweep.json", record | {"device": "cuda", "backend": "in_process"})
    with pytest.raises(ConfigError, match="was begun on GPUs, but there are CPUs to go on with"):
        resume_sweep(store.folder, None, settings)

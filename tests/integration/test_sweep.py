"""The main job, as a user runs it: start, kill, interrupt, resume, look at the results."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.pre_stop import save
from orchestrator.files import read_json
from orchestrator.sweep.run_store import RunStore
from tests.integration.conftest import Command, program, write_config

START_TIMEOUT_S = 240


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, orchestrator: Command
) -> tuple[Path, str]:
    """A folder with one finished sweep in runs/, and what the command printed."""
    folder = tmp_path_factory.mktemp("sweep")
    config = write_config(folder, tiny_base)
    done = orchestrator("sweep", str(config), "--run-dir", "runs/one", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def store_of(folder: Path) -> RunStore:
    return RunStore.open(folder / "runs" / "one")


def test_a_sweep_trains_all_trials_and_beats_the_untrained_base(
    finished: tuple[Path, str],
) -> None:
    results = store_of(finished[0]).results
    assert [result.state for result in results] == ["finished"] * 4
    for result in results:
        assert result.eval_loss is not None
        assert result.baseline_eval_loss is not None
        assert result.eval_loss < result.baseline_eval_loss
    winner = store_of(finished[0]).read("winner")
    assert winner is not None
    assert winner["eval_loss"] == min(result.eval_loss or 0 for result in results)


def test_the_summary_names_the_winner_and_commands_that_work(
    finished: tuple[Path, str], orchestrator: Command
) -> None:
    folder, printed = finished
    assert "winner: trial" in printed
    assert "models:/sums@champion" in printed
    prompt = ["--prompt", "What is 3 plus 3?", "--max-new-tokens", "4"]
    text = orchestrator("generate", "--model", "models:/sums@champion", *prompt, cwd=folder)
    assert text.returncode == 0, text.stderr
    assert text.stdout.strip()
    report = orchestrator("report", cwd=folder)
    assert Path(report.stdout.strip()).read_text().lower().startswith("<!doctype html>")


def test_mlflow_shows_the_sweep_with_its_trials_nested(finished: tuple[Path, str]) -> None:
    from mlflow import MlflowClient

    folder, _ = finished
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("sums")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) == 1
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert {(run.data.params["bit_width"], run.data.params["rank"]) for run in children} == {
        ("4", "2"),
        ("4", "4"),
        ("16", "2"),
        ("16", "4"),
    }
    for run in children:
        assert {"train_loss", "eval_loss", "tokens_per_s", "adapter_mib"} <= set(run.data.metrics)
        history = client.get_metric_history(run.info.run_id, "eval_loss")
        assert {point.step for point in history} >= {3, 6}
    artifacts = {file.path for file in client.list_artifacts(parents[0].info.run_id)}
    assert "report.html" in artifacts


def test_the_champion_loads_with_plain_peft(finished: tuple[Path, str], tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    from orchestrator.tracking.model_files import download_adapter

    folder, _ = finished
    uri = f"sqlite:///{folder}/runs/mlflow.db"
    adapter = download_adapter(uri, "models:/sums@champion", tmp_path / "adapter")
    assert (
        read_json(adapter / "orchestrator.json")["reading"]
        == store_of(folder).sweep.config.data.reading
    )
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert any("lora_A" in name for name, _ in model.named_parameters())


@pytest.mark.slow
def test_a_winner_is_registered_even_if_no_report_can_be_written_and_a_resume_writes_it(
    tmp_path: Path, tiny_base: Path, orchestrator: Command
) -> None:
    # One of the trials lacks a field that the others have.
    search = {
        "space": {
            "quant.bit_width": [4, 16],
            "quant.quant_type": ["nf4", "fp4"],
            "adapter.rank": [2],
        },
        "conditions": {"quant.quant_type": {"quant.bit_width": [4]}},
    }
    config = write_config(tmp_path, tiny_base, search=search)
    in_the_way = tmp_path / "runs" / "one" / "report.html"
    in_the_way.mkdir(parents=True)
    failed = orchestrator("sweep", str(config), "--run-dir", "runs/one", cwd=tmp_path)
    assert failed.returncode != 0
    registration = store_of(tmp_path).read("registration")
    assert registration is not None, failed.stdout + failed.stderr
    in_the_way.rmdir()
    done = orchestrator("resume", "runs/one", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    store = store_of(tmp_path)
    assert len(store.results) == 3
    assert store.read("done") is not None
    assert store.read("registration") == registration
    report = in_the_way.read_text()
    assert "<th>quant_type</th>" in report
    assert f"registered as @champion: {registration['reason']}" in report


@pytest.mark.slow
def test_a_pruned_sweep_is_extended_where_it_ended(
    tmp_path: Path, tiny_base: Path, orchestrator: Command
) -> None:
    from mlflow import MlflowClient

    rates = [1e-2, 1e-5, 1e-6]
    search = {"space": {"optimizer.learning_rate": rates}, "pruner": {"kind": "asha", "rungs": [2]}}
    config = write_config(tmp_path, tiny_base, search=search)
    done = orchestrator("sweep", str(config), "--run-dir", "runs/one", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pruned at step 2/" in done.stdout
    assert [r.state for r in store_of(tmp_path).results] == ["finished", "pruned", "pruned"]
    space = f"search.space.optimizer.learning_rate={[*rates, 3e-2]}"
    more = orchestrator("resume", "runs/one", "--set", space, "--add-trials", "1", cwd=tmp_path)
    assert more.returncode == 0, more.stdout + more.stderr
    store = store_of(tmp_path)
    assert [result.number for result in store.results] == [0, 1, 2, 3]
    assert {result.attempt for result in store.results} == {1}
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("sums")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    states = {
        run.data.tags["orchestrator.trial"]: run.data.tags["orchestrator.state"]
        for run in runs
        if "mlflow.parentRunId" in run.data.tags
    }
    assert states["1"] == states["2"] == "pruned"
    assert len(states) == 4
    winner = store.read("winner")
    registration = store.read("registration")
    assert winner is not None
    assert registration is not None
    version = client.get_model_version("sums", str(registration["version"]))
    assert version.tags["trial"] == str(winner["trial"])


@pytest.mark.slow
def test_a_sweep_for_right_answers_registers_the_trial_that_gives_most(
    tmp_path: Path, tiny_base: Path, orchestrator: Command
) -> None:
    from mlflow import MlflowClient

    # What a tiny model learns first is how answers begin, and then that many sums begin with a 1.
    search = {
        "space": {"optimizer.learning_rate": [1e-2, 1e-5]},
        "objectives": ["task_score", "eval_loss"],
    }
    config = write_config(tmp_path, tiny_base, search=search)
    task = r"evaluation.task={max_new_tokens: 10, answer_pattern: 'It is (\d)'}"
    changes = ["--set", task, "--set", "trial.steps=60", "--set", "trial.batch_size=8"]
    changes += ["--set", "data.held_out_fraction=0.3"]
    done = orchestrator("sweep", str(config), "--run-dir", "runs/one", *changes, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    store = store_of(tmp_path)
    scores = {result.number: result.task_score for result in store.results}
    assert scores[1] == 0  # it has learnt nothing
    assert scores[0] is not None
    assert scores[0] > 0
    winner, registration = store.read("winner"), store.read("registration")
    assert winner is not None
    assert registration is not None
    assert winner["trial"] == 0
    assert "the most right answers" in winner["reason"]
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    version = client.get_model_version("sums", str(registration["version"]))
    assert float(version.tags["task_score"]) == scores[0]
    experiment = client.get_experiment_by_name("sums")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "metrics.task_score >= 0")
    assert {run.data.metrics["task_score"] for run in runs} == set(scores.values())


@pytest.mark.slow
def test_answers_without_what_is_compared_are_refused_before_a_worker_is_started(
    tmp_path: Path, tiny_base: Path, orchestrator: Command
) -> None:
    config = write_config(tmp_path, tiny_base)
    task = "evaluation.task={answer_pattern: '#### (.+)'}"
    done = orchestrator("train", str(config), "--set", task, cwd=tmp_path)
    assert done.returncode == 2
    assert "must have a match of answer_pattern '#### (.+)'" in done.stderr
    assert "base loaded" not in done.stdout


def test_resuming_a_complete_sweep_does_nothing(
    finished: tuple[Path, str], orchestrator: Command
) -> None:
    done = orchestrator("resume", "runs/one", cwd=finished[0])
    assert done.returncode == 0
    assert "nothing is left to do" in done.stdout


def test_starting_again_in_the_same_folder_is_refused(
    finished: tuple[Path, str], orchestrator: Command
) -> None:
    folder, _ = finished
    again = orchestrator("sweep", "sweep.yaml", "--run-dir", "runs/one", cwd=folder)
    assert again.returncode == 2
    assert "orchestrator resume" in again.stderr
    other = ["sweep", "sweep.yaml", "--run-dir", "runs/one", "--set", "trial.steps=7"]
    refused = orchestrator(*other, cwd=folder)
    assert refused.returncode == 2
    assert "trial.steps: 6 -> 7" in refused.stderr


SWEEP = ("sweep", "sweep.yaml", "--run-dir", "runs/one")


def start(
    folder: Path, environment: Mapping[str, str], command: Sequence[str] = SWEEP
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*program(), *command],
        cwd=folder,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until_training(folder: Path, process: "subprocess.Popen[str]", attempt: int = 1) -> None:
    """Until one trial is over and another has a checkpoint of this attempt but is not over."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        trials = folder / "runs" / "one" / "trials"
        over = {path.parent.name for path in trials.glob("*/result.json")}
        saved = {path.parts[-5] for path in trials.glob(f"*/attempts/{attempt}/*/checkpoint.json")}
        if over and saved - over:
            return
        time.sleep(0.05)
    raise AssertionError("no trial was under way in time")


def long_sweep(folder: Path, base: Path) -> None:
    # One short trial and one long, so that there is a middle to be killed in. In one pack, they
    # begin together: of two, the second may come up when the long trial is over already.
    changes: dict[str, Any] = {"search__space": {"steps": [4, 400]}, "resources__num_workers": 1}
    write_config(folder, base, evaluation__every_steps=None, **changes)


def assert_all_trained_once(folder: Path, attempts: int = 2) -> None:
    store = store_of(folder)
    assert [result.state for result in store.results] == ["finished"] * 2
    assert len(store.trials) == 2
    first, second = store.results
    assert first.attempt == 1  # it was over before the first stop
    assert second.attempt == attempts
    rows = [point for point in store.points(1) if point["kind"] == "progress"]
    assert max(point["step"] for point in rows) == 400
    resumed = [d["reason"] for d in store.decisions if d["action"] == "resume_trial"]
    steps = [int(reason.rpartition(" ")[2]) for reason in resumed]
    assert resumed == [  # and to the same bits
        f"attempt {number} goes on from step {step}" for number, step in enumerate(steps, 2)
    ]
    assert len(steps) == attempts - 1
    for number, step in enumerate(steps, 2):
        assert 0 < step < min(point["step"] for point in rows if point["attempt"] == number)
    assert store.checkpoints(1) == []  # a trial that is over needs them no more


def test_a_sweep_stopped_by_ctrl_c_and_then_killed_trains_nothing_twice(
    tmp_path: Path, tiny_base: Path, environment: Mapping[str, str], orchestrator: Command
) -> None:
    long_sweep(tmp_path, tiny_base)
    process = start(tmp_path, environment)
    wait_until_training(tmp_path, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    output, _ = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 130, output
    assert "orchestrator resume runs/one" in output
    assert "Traceback" not in output
    process = start(tmp_path, environment, ("resume", "runs/one"))
    wait_until_training(tmp_path, process, attempt=2)
    process.kill()
    process.communicate()
    done = orchestrator("resume", "runs/one", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_all_trained_once(tmp_path, attempts=3)


@pytest.mark.slow
def test_a_driver_whose_pod_is_taken_away_saves_and_waits_for_its_end(
    tmp_path: Path, tiny_base: Path, environment: Mapping[str, str], orchestrator: Command
) -> None:
    long_sweep(tmp_path, tiny_base)
    process = start(tmp_path, environment)
    wait_until_training(tmp_path, process)
    assert save(process.pid, tmp_path / "runs" / "one", START_TIMEOUT_S)
    # An end would be taken for the job's.
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=3)
    os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=START_TIMEOUT_S)
    assert "interrupted: 1 of 2 trials are over" in output
    done = orchestrator("resume", "runs/one", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_all_trained_once(tmp_path)


@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once_and_loses_no_finished_trial(
    tmp_path: Path, tiny_base: Path, environment: Mapping[str, str]
) -> None:
    long_sweep(tmp_path, tiny_base)
    process = start(tmp_path, environment)
    wait_until_training(tmp_path, process)
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 130, output
    assert "orchestrator resume runs/one" in output
    assert "Traceback" not in output
    assert [result.state for result in store_of(tmp_path).results] == ["finished"]

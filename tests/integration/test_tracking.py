"""MLflow for real: a SQLite store and server, and the runs of sweeps in it."""

import logging
import math
import shutil
import sqlite3
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from orchestrator.errors import TrackingError, TrackingUnreachable
from orchestrator.records import Evaluated, Progress
from orchestrator.sweep.machine_use import recorded_use
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.follower import TrackingFollower
from orchestrator.tracking.mlflow_view import MlflowView
from orchestrator.tracking.registry import Registry
from orchestrator.tracking.runs import TRIAL_TAG, ensure_experiment, milliseconds, own_tags
from orchestrator.tracking.stores import check_reachable, default_store
from orchestrator.tracking.system_run import PROBE
from tests import runs as samples
from tests.integration.mlflow_runs import MakeRun, connected
from tests.integration.servers import free_port

FAST_S = 15  # generous for a busy machine; MLflow's own retries take minutes


def trial_runs(client: MlflowClient, view: MlflowView) -> dict[int, Run]:
    found = client.search_runs(
        [view.experiment_id], f"tags.mlflow.parentRunId = '{view.run_id}'", max_results=1000
    )
    return {int(run.data.tags["orchestrator.trial"]): run for run in found}


def num_points(client: MlflowClient, run_id: str, metric: str) -> int:
    return len(client.get_metric_history(run_id, metric))


def test_a_finished_sweep_is_shown_whole(make_run: MakeRun, uri: str, client: MlflowClient) -> None:
    store = make_run(failed=(2,))
    view = connected(store, uri)
    view.sync()
    (store.folder / "report.html").write_text("<html></html>")
    view.finish("FINISHED")

    parent = client.get_run(view.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.info.end_time == milliseconds(samples.BEGAN + 900)  # its last decision's
    assert parent.data.tags["orchestrator.run_id"] == store.sweep.run_id
    assert parent.data.params["winner/rank"] == "16"
    assert parent.data.metrics["best_eval_loss"] == pytest.approx(store.read("winner")["eval_loss"])
    assert "Winner: trial 003 · 16-bit · rank 16" in parent.data.tags["mlflow.note.content"]
    names = {file.path for file in client.list_artifacts(view.run_id)}
    assert names == {
        "config.yaml",
        "plan.json",
        "decisions.jsonl",
        "environment.json",
        "packs.jsonl",
        "report.html",
    }

    trials = trial_runs(client, view)
    assert {n: run.info.status for n, run in trials.items()} == {
        0: "FINISHED", 1: "FINISHED", 2: "FAILED", 3: "FINISHED",
    }  # fmt: skip
    assert trials[3].info.run_name == "trial 003 · 16-bit · rank 16"
    tags = trials[3].data.tags
    assert tags["orchestrator.base_digest"] == samples.BASE.digest
    data = store.read("data")
    assert data is not None
    assert tags["orchestrator.train_digest"] == data["train"]["digest"]
    assert tags["mlflow.source.git.commit"] == "c" * 40
    assert (tags["orchestrator.pack"], tags["orchestrator.slot"]) == ("1", "1")
    assert tags["orchestrator.node"] == "node-b"
    assert len({run.data.tags["orchestrator.trial_key"] for run in trials.values()}) == 4
    contexts = {one.tags[0].value: one.dataset.digest for one in trials[3].inputs.dataset_inputs}
    digests = {"training": data["train"]["digest"], "evaluation": data["held_out"]["digest"]}
    assert contexts == {context: digest[:36] for context, digest in digests.items()}
    assert trials[3].data.params["rank"] == "16"
    assert trials[3].data.params["bit_width"] == "16"
    assert "quant_type" not in trials[3].data.params
    assert trials[0].data.params["quant_type"] == "nf4"
    assert trials[2].data.tags["orchestrator.reason"] == "loss_not_finite"
    result = next(result for result in store.results if result.number == 3)
    metrics = trials[3].data.metrics
    assert metrics["eval_loss"] == pytest.approx(result.eval_loss)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert metrics["eval_loss_gain"] == pytest.approx(samples.BASELINE - metrics["eval_loss"])
    assert metrics["train_s"] == 61.5
    by_tokens = client.get_metric_history(trials[3].info.run_id, "by_tokens/eval_loss")
    assert [point.step for point in by_tokens] == [10_000, 20_000, 30_000, 40_000]


def test_points_keep_their_own_times_and_steps(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run()
    view = connected(store, uri)
    view.sync()
    history = client.get_metric_history(view.trial_run_id(0), "train_loss")
    rows = [row for row in store.points(0) if row["kind"] == "progress"]
    assert [(m.step, m.timestamp) for m in history] == [
        (row["step"], int(row["time"] * 1000)) for row in rows
    ]


def test_a_second_sync_and_a_lost_tracking_json_add_nothing(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run(unfinished=(1,))
    first = connected(store, uri)
    first.sync()
    first.sync()
    before = store.read("tracking")
    (store.folder / "tracking.json").unlink()
    second = connected(store, uri)
    second.sync()
    assert store.read("tracking") == before
    assert len(trial_runs(client, second)) == 4
    for number, metric, count in ((0, "train_loss", 20), (0, "eval_loss", 4), (1, "tokens", 10)):
        assert num_points(client, second.trial_run_id(number), metric) == count


def test_a_crash_between_a_batch_and_the_end_sends_the_rest_once(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run(unfinished=(0,))
    connected(store, uri).sync()  # this process dies; its memory of what it sent is gone
    trial = store.trials[0]
    samples.add_curve(store, trial, samples.STEPS)
    samples.add_result(store, trial, failed=False)
    view = connected(store, uri)
    view.sync()
    assert num_points(client, view.trial_run_id(0), "train_loss") == 20
    assert num_points(client, view.trial_run_id(0), "eval_loss") == 4
    assert client.get_run(view.trial_run_id(0)).info.status == "FINISHED"


def test_runs_that_a_crash_left_empty_are_filled(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run()
    experiment_id = ensure_experiment(client, uri, store.sweep.config.experiment_name)
    tags = own_tags(store.sweep.run_id)
    parent = client.create_run(experiment_id, tags=tags).info.run_id
    inner = tags | {"mlflow.parentRunId": parent, TRIAL_TAG: "0"}
    trial = client.create_run(experiment_id, tags=inner).info.run_id
    view = connected(store, uri)
    view.sync()
    assert (view.run_id, view.trial_run_id(0)) == (parent, trial)
    filled, filled_trial = client.get_run(parent), client.get_run(trial)
    assert filled.data.params["train_data"] == store.sweep.config.data.train_name
    assert filled_trial.data.params["rank"] == str(store.trials[0].config.adapter.rank)
    assert [len(run.inputs.dataset_inputs) for run in (filled, filled_trial)] == [2, 2]


def test_points_that_come_late_for_a_step_are_sent(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run(unfinished=(0,))
    view = connected(store, uri)
    store.add_point(Progress(0, 1, time.time(), 30, 1, 2.0, 1e-4, 1.0, 1.0))
    view.sync()
    store.add_point(Evaluated(0, 1, time.time(), 30, 1, 2.5))  # sorts before what was sent
    view.sync()
    history = client.get_metric_history(view.trial_run_id(0), "eval_loss")
    assert [point.value for point in history if point.step == 30] == [2.5]


def test_an_attempt_that_repeats_steps_does_not_double_them(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run(unfinished=(0,))
    connected(store, uri).sync()
    store.add_point(Progress(0, 2, time.time(), 20, 1, 9.0, 1e-4, 1.0, 1.0))
    view = connected(store, uri)
    view.sync()
    history = client.get_metric_history(view.trial_run_id(0), "train_loss")
    assert sorted(point.step for point in history) == list(range(2, 21, 2))
    assert client.get_run(view.trial_run_id(0)).data.tags["orchestrator.attempt"] == "2"


def test_nan_and_infinite_losses_are_sent_as_nan(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run(unfinished=(0,))
    nan, inf = math.nan, math.inf
    store.add_point(Progress(0, 1, time.time(), 30, 1, nan, 1e-4, inf, 1.0))
    store.add_point(Evaluated(0, 1, time.time(), 30, 1, 2000.0))  # its perplexity overflows
    view = connected(store, uri)
    view.sync()
    metrics = client.get_run(view.trial_run_id(0)).data.metrics
    assert math.isnan(metrics["train_loss"])
    assert math.isnan(metrics["grad_norm"])
    assert math.isnan(metrics["perplexity"])


def test_an_interrupted_sweep_is_killed_and_reopened(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run(unfinished=(1,), winner=False)
    view = connected(store, uri)
    view.sync()
    view.finish("KILLED")
    assert client.get_run(view.run_id).info.status == "KILLED"
    assert client.get_run(view.trial_run_id(1)).info.status == "KILLED"
    again = connected(store, uri)
    again.sync()
    assert again.run_id == view.run_id
    assert client.get_run(view.run_id).info.status == "RUNNING"
    assert client.get_run(view.trial_run_id(1)).info.status == "RUNNING"
    assert client.get_run(view.trial_run_id(0)).info.status == "FINISHED"


def test_a_parameter_longer_than_mlflow_allows_is_cut(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    modules = ",".join(f"layers.{i}.q_proj" for i in range(800))
    store = make_run(params=({"adapter.target_modules": (modules,)},))
    view = connected(store, uri)
    view.sync()
    params = client.get_run(view.trial_run_id(0)).data.params
    assert len(params["target_modules"]) == 6000


def test_a_deleted_experiment_says_how_to_bring_it_back(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run()
    view = connected(store, uri)
    client.delete_experiment(view.experiment_id)
    with pytest.raises(TrackingError, match="experiments restore --experiment-id"):
        connected(store, uri)


def test_the_follower_sends_while_the_sweep_runs_and_the_rest_at_its_end(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run(unfinished=(0,))
    view = connected(store, uri)
    follower = TrackingFollower(view, every_s=0.05)
    follower.start()
    deadline = time.monotonic() + 30
    while len(trial_runs(client, view)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    samples.add_curve(store, store.trials[0], samples.STEPS)
    follower.stop()
    assert num_points(client, view.trial_run_id(0), "train_loss") == 20


def test_the_follower_warns_once_and_its_end_raises(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(MlflowView):
        def connect(self) -> None:
            raise TrackingUnreachable("no server")

        def sync(self) -> None:
            raise TrackingError("no route")

    # Libraries that ran before in this process may have turned the root logger down.
    caplog.set_level(logging.WARNING, "orchestrator.tracking.follower")
    caplog.set_level(logging.WARNING)
    follower = TrackingFollower(Broken(make_run(), f"http://127.0.0.1:{free_port()}"), 0.01)
    follower.start()
    deadline = time.monotonic() + FAST_S
    while "no route" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)  # a busy machine may not run the thread for a while
    time.sleep(0.3)  # some thirty more tries
    with pytest.raises(TrackingError):
        follower.stop()
    assert caplog.text.count("no route") == 1


def test_unusable_addresses_are_refused_quickly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder, and no database")
    cases = {
        f"http://127.0.0.1:{free_port()}": "start the server",
        f"sqlite:///{tmp_path}/file/mlflow.db": "folder that can be written",
        f"sqlite:///{tmp_path}/file": "not a database",
        "sqlite://": "malformed",
        "htp://server": "malformed",
        "http:/server": "malformed",
        "http://server:port": "malformed",
        "postgresql://user:secret@127.0.0.1:1/db": "postgresql://127.0.0.1",
    }
    for address, words in cases.items():
        began = time.monotonic()
        with pytest.raises(TrackingError, match=words) as raised:
            check_reachable(address)
        assert time.monotonic() - began < FAST_S, address
        assert "secret" not in str(raised.value)


def test_a_database_of_another_mlflow_version_is_refused(uri: str, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copy(uri.removeprefix("sqlite:///"), path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    connection.close()
    with pytest.raises(TrackingError, match="another MLflow version"):
        check_reachable(f"sqlite:///{path}")


def test_checking_a_new_database_makes_nothing(tmp_path: Path) -> None:
    check_reachable(default_store(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_system_metrics_are_shown_by_node_and_once(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run()
    with recorded_use(
        store.folder, lambda: {"node-a": {PROBE: 12.5, "gpu_0_power_usage_watts": 9}}
    ):
        time.sleep(0.1)
    connected(store, uri).sync()
    view = connected(store, uri)
    view.sync()
    (point,) = client.get_metric_history(view.run_id, "system/node-a/cpu_utilization_percentage")
    assert (point.step, point.value) == (0, 12.5)


def test_the_winners_model_carries_its_metrics(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run()
    view = connected(store, uri)
    view.sync()
    Registry(uri).register_winner(store, view)
    view.finish("FINISHED")
    (model,) = client.search_logged_models([view.experiment_id])
    metrics = {metric.key: metric for metric in model.metrics or ()}
    assert metrics["eval_loss"].value == pytest.approx(store.read("winner")["eval_loss"])
    data = store.read("data")
    assert data is not None
    assert metrics["eval_loss"].dataset_digest == data["held_out"]["digest"][:36]
    assert metrics["adapter_mib"].run_id == view.trial_run_id(3)
    history = client.get_metric_history(view.trial_run_id(3), "eval_loss")
    assert len(history) == len({point.step for point in history}) == 4


def test_runs_of_a_dead_sweep_are_closed_and_those_of_a_living_one_are_not(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    dead, living, new = (make_run(unfinished=(1,), winner=False) for _ in range(3))
    views = {store.folder: connected(store, uri) for store in (dead, living, new)}
    for view in views.values():
        view.sync()
    with living.locked():
        assert views[new.folder].close_orphans() == [dead.sweep.run_id]

    def status(store: RunStore) -> tuple[str, str]:
        view = views[store.folder]
        runs = (view.run_id, view.trial_run_id(1))
        parent, trial = (client.get_run(run_id).info.status for run_id in runs)
        return parent, trial

    assert status(dead) == ("KILLED", "KILLED")
    assert status(living) == status(new) == ("RUNNING", "RUNNING")
    connected(dead, uri).sync()  # a resume
    assert status(dead) == ("RUNNING", "RUNNING")

"""MLflow for real: a SQLite store, its runs, its registry, and a model that generates."""

import json
import math
import shutil
import socket
import sqlite3
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from pandas import DataFrame

from orchestrator.errors import RegistryError, TrackingError
from orchestrator.files import file_digest
from orchestrator.records import BaseModel, Evaluated, Progress
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.adapter_model import generate, load
from orchestrator.tracking.follower import TrackingFollower
from orchestrator.tracking.mlflow_view import MlflowView
from orchestrator.tracking.model_files import download_adapter
from orchestrator.tracking.registry import Registration, Registry, _entry
from orchestrator.tracking.stores import check_reachable, default_store, ui_command
from tests import runs as samples

FAST_S = 15  # generous for a busy machine; MLflow's own retries take minutes


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests here: a new one takes 8 s."""
    store = default_store(tmp_path_factory.mktemp("mlflow"))
    MlflowClient(tracking_uri=store).search_experiments(max_results=1)
    return store


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


MakeRun = Callable[..., RunStore]


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[MakeRun]:
    """Run folders with an experiment and a model of their own."""
    name = f"sweep-{uuid.uuid4().hex[:8]}"
    count = iter(range(100))

    def make(**options: Any) -> RunStore:
        run_id = f"{name}-{next(count)}"
        config = samples.make_config(name=name)
        return samples.make_run(tmp_path / run_id, run_id=run_id, config=config, **options)

    return make


def trial_runs(client: MlflowClient, view: MlflowView) -> dict[int, Run]:
    found = client.search_runs(
        [view.experiment_id], f"tags.mlflow.parentRunId = '{view.run_id}'", max_results=1000
    )
    return {int(run.data.tags["orchestrator.trial"]): run for run in found}


def num_points(client: MlflowClient, run_id: str, metric: str) -> int:
    return len(client.get_metric_history(run_id, metric))


def aliases(client: MlflowClient, model: str) -> dict[str, int]:
    found = client.get_registered_model(model).aliases
    return {name: int(version) for name, version in found.items()}


def connected(store: RunStore, uri: str) -> MlflowView:
    view = MlflowView(store, uri)
    view.connect()
    return view


def test_a_finished_sweep_is_shown_whole(make_run: MakeRun, uri: str, client: MlflowClient) -> None:
    store = make_run(failed=(2,))
    view = connected(store, uri)
    view.sync()
    (store.folder / "report.html").write_text("<html></html>")
    view.finish("FINISHED")

    parent = client.get_run(view.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["orchestrator.run_id"] == store.sweep.run_id
    assert parent.data.params["winner/rank"] == "16"
    assert parent.data.metrics["best_eval_loss"] == pytest.approx(store.read("winner")["eval_loss"])
    assert "Winner: trial 003 · 16-bit · rank 16" in parent.data.tags["mlflow.note.content"]
    names = {file.path for file in client.list_artifacts(view.run_id)}
    assert names == {"config.yaml", "plan.json", "decisions.jsonl", "report.html"}

    trials = trial_runs(client, view)
    assert {n: run.info.status for n, run in trials.items()} == {
        0: "FINISHED", 1: "FINISHED", 2: "FAILED", 3: "FINISHED",
    }  # fmt: skip
    assert trials[3].info.run_name == "trial 003 · 16-bit · rank 16"
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
        def sync(self) -> None:
            raise TrackingError("no route")

    follower = TrackingFollower(Broken(make_run(), f"http://127.0.0.1:{_free_port()}"), 0.01)
    follower.start()
    time.sleep(0.3)
    with pytest.raises(TrackingError):
        follower.stop()
    assert caplog.text.count("no route") == 1


def test_unusable_addresses_are_refused_quickly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder, and no database")
    cases = {
        f"http://127.0.0.1:{_free_port()}": "start the server",
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


def test_registering_twice_makes_one_version(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run()
    view = connected(store, uri)
    view.sync()
    first = Registry(uri).register_winner(store, view)
    assert first.champion
    assert Registry(uri).register_winner(store, view) == first
    (store.folder / "registration.json").unlink()
    assert Registry(uri).register_winner(store, view) == first
    (version,) = client.search_model_versions(f"name = '{first.model_name}'")
    assert aliases(client, first.model_name) == {"candidate": 1, "champion": 1}
    assert version.run_id == view.trial_run_id(3)
    assert version.tags["rank"] == "16"
    assert version.tags["held_out_digest"] == "h" * 64


def test_a_crash_between_version_and_alias_is_made_good(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run()
    view = connected(store, uri)
    view.sync()
    made = Registry(uri).ensure_version(_entry(store), view)  # and the process dies here
    assert made.aliases == []
    registration = Registry(uri).register_winner(store, view)
    (version,) = client.search_model_versions(f"name = '{registration.model_name}'")
    assert registration.version == int(made.version) == int(version.version)
    assert aliases(client, registration.model_name) == {"candidate": 1, "champion": 1}


def register(store: RunStore, uri: str) -> Registration:
    """What a sweep does at its end."""
    view = MlflowView(store, uri)
    view.connect()
    view.sync()
    registration = Registry(uri).register_winner(store, view)
    view.finish("FINISHED")
    return registration


def test_the_gate_keeps_a_better_champion(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    good = register(make_run(gain=1.2), uri)
    worse = register(make_run(gain=0.8), uri)
    better = register(make_run(gain=1.4), uri)
    assert (good.champion, worse.champion, better.champion) == (True, False, True)
    assert "is not below version 1's" in worse.reason
    assert aliases(client, good.model_name) == {"candidate": 3, "champion": 3}


def test_registering_without_a_view_ends_the_sweeps_run(
    make_run: MakeRun, uri: str, client: MlflowClient
) -> None:
    store = make_run()
    register(store, uri)
    run = client.get_run(store.read("tracking")["run_id"])
    assert run.info.status == "FINISHED"
    assert "Registered as" in run.data.tags["mlflow.note.content"]


def test_registering_leaves_mlflows_global_state_alone(
    make_run: MakeRun, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    register(make_run(), uri)
    assert mlflow.get_tracking_uri() == "http://elsewhere:5000"


def test_a_damaged_adapter_is_not_registered(make_run: MakeRun, uri: str) -> None:
    store = make_run()
    entry = _entry(store)
    (entry.folder / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(RegistryError, match="is damaged"):
        register(store, uri)


def test_a_sweep_without_winner_is_not_registered(make_run: MakeRun, uri: str) -> None:
    with pytest.raises(RegistryError, match="has no winner"):
        register(make_run(winner=False), uri)


def test_a_downloaded_adapter_is_the_one_that_was_registered(
    make_run: MakeRun, uri: str, tmp_path: Path
) -> None:
    store = make_run()
    registration = register(store, uri)
    name = registration.model_name
    folder = download_adapter(uri, f"models:/{name}@champion", tmp_path / "adapter")
    assert file_digest(folder / "adapter_model.safetensors") == registration.adapter_digest
    assert json.loads((folder / "orchestrator.json").read_text())["template"] == "plain"
    assert download_adapter(uri, f"models:/{name}/1", folder) == folder
    (folder / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(RegistryError, match="is not the adapter of"):
        download_adapter(uri, f"models:/{name}/1", folder)


def test_a_damaged_registered_adapter_is_refused(
    make_run: MakeRun, uri: str, client: MlflowClient, tmp_path: Path
) -> None:
    registration = register(make_run(), uri)
    location = client.get_model_version_download_uri(registration.model_name, "1")
    (weights,) = Path(location.removeprefix("file://")).rglob("adapter_model.safetensors")
    weights.write_bytes(b"flipped")
    with pytest.raises(RegistryError, match="is not the adapter of"):
        download_adapter(uri, f"models:/{registration.model_name}/1", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("wrong", ["@nobody", "/99", "", "@"])
def test_an_unknown_version_names_those_that_exist(
    make_run: MakeRun, uri: str, tmp_path: Path, wrong: str
) -> None:
    name = register(make_run(), uri).model_name
    with pytest.raises(RegistryError, match=f"models:/{name}@champion"):
        download_adapter(uri, f"models:/{name}{wrong}", tmp_path / "adapter")


@pytest.mark.parametrize(("bit_width", "template"), [(16, "plain"), (4, "chat")])
def test_a_registered_adapter_generates_what_peft_generates(
    make_run: MakeRun,
    uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bit_width: int,
    template: str,
) -> None:
    base = samples.make_base_model(tmp_path / "base")
    store = make_run(params=({"quant.bit_width": bit_width},), base=base)
    entry = _entry(store)
    samples.make_peft_adapter(entry.folder, base)
    record = json.loads((entry.folder / "orchestrator.json").read_text())
    (entry.folder / "orchestrator.json").write_text(json.dumps(record | {"template": template}))
    digest = file_digest(entry.folder / "adapter_model.safetensors")
    (store.trial_dir(0) / "result.json").unlink()
    store.finish_trial(replace(entry.result, adapter_digest=digest))
    name = register(store, uri).model_name

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    model = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    prompts = ["What is a list?", "abc"]
    params = {"max_new_tokens": 12}
    texts = model.predict(prompts, params=params)
    assert texts == model.predict(DataFrame({"prompt": prompts}), params=params)
    assert texts == generate(*load(entry.folder), prompts, max_new_tokens=12)
    assert texts == samples.generate_with_peft(entry.folder, base, bit_width, template, prompts, 12)
    assert len(set(texts)) == 2


@pytest.mark.slow  # the server takes 11 s to start
def test_a_server_gets_the_same_as_a_local_store(
    make_run: MakeRun, uri: str, tmp_path: Path
) -> None:
    port = _free_port()
    server = subprocess.Popen(
        ui_command(uri, port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address)
        store = make_run(failed=(2,))
        view = connected(store, address)
        view.sync()
        registration = Registry(address).register_winner(store, view)
        view.finish("FINISHED")
        assert MlflowClient(tracking_uri=address).get_run(view.run_id).info.status == "FINISHED"
        model_uri = f"models:/{registration.model_name}@champion"
        folder = download_adapter(address, model_uri, tmp_path / "adapter")
        assert file_digest(folder / "adapter_model.safetensors") == registration.adapter_digest
    finally:
        server.terminate()
        server.wait()


def test_a_missing_base_model_is_named(tmp_path: Path) -> None:
    store = samples.make_run(tmp_path / "run", base=BaseModel("org/x", None, "/nowhere", "d" * 64))
    with pytest.raises(FileNotFoundError, match="/nowhere .* ORCHESTRATOR_BASE_MODEL"):
        load(_entry(store).folder)


def _wait_for(address: str) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            return check_reachable(address)
        except TrackingError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

"""Events reach an MLflow server each exactly once, whenever it is down and whatever it forgets to
answer; and the same run folder makes the same view in any server."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from benchmarks.forwarding_check import lost_and_doubled
from orchestrator.errors import TrackingUnreachable
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.follower import TrackingFollower
from orchestrator.tracking.mlflow_view import MlflowView
from orchestrator.tracking.model_files import download_adapter
from orchestrator.tracking.registry import Registry
from orchestrator.tracking.runs import find_runs
from orchestrator.tracking.stores import FORWARDING_ENVIRONMENT, environment
from tests import runs as samples
from tests.integration.conftest import Command, write_config
from tests.integration.mlflow_runs import MakeRun, connected
from tests.integration.proxy import Proxy
from tests.integration.servers import free_port, mlflow_server

HOLDS_ALL = ([], [])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, uri: str) -> Iterator[str]:
    path = tmp_path_factory.mktemp("server") / "mlflow.db"
    shutil.copy(uri.removeprefix("sqlite:///"), path)
    with mlflow_server(f"sqlite:///{path}") as address:
        yield address


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    with environment(FORWARDING_ENVIRONMENT), Proxy(int(server.rpartition(":")[2])) as proxy:
        yield proxy


def grow(store: RunStore) -> None:
    """The unfinished first trial comes to its end."""
    samples.add_curve(store, store.trials[0], samples.STEPS)
    samples.add_result(store, store.trials[0], failed=False)


def check(store: RunStore, view: MlflowView, server: str) -> None:
    client = MlflowClient(tracking_uri=server)
    assert lost_and_doubled(store, client, view.experiment_id) == HOLDS_ALL
    assert client.get_run(view.run_id).info.status == "FINISHED"
    for run in find_runs(client, view.experiment_id, store.sweep.run_id):
        assert run.data.params, run.info.run_name
        assert len(run.inputs.dataset_inputs) == 2, run.info.run_name


@pytest.mark.parametrize("down", ["at the start", "in the middle", "at the end"])
def test_nothing_is_lost_or_doubled_when_the_server_is_down(
    make_run: MakeRun, server: str, proxy: Proxy, down: str
) -> None:
    store = make_run(unfinished=(0,))
    view = MlflowView(store, proxy.address)
    follower = TrackingFollower(view, every_s=0.02, cpu_fraction=1.0)
    proxy.up = down != "at the start"
    follower.start()
    follower.await_connection(60)
    assert bool(view.run_id) == proxy.up
    proxy.up = down != "in the middle"
    time.sleep(0.3)
    grow(store)
    time.sleep(0.3)
    proxy.up = down != "at the end"
    if down == "at the end":
        with pytest.raises(TrackingUnreachable):
            follower.stop()
        proxy.up = True
        view = MlflowView(store, proxy.address)  # `orchestrator sync`
    else:
        follower.stop()
    view.finish("FINISHED")
    check(store, view, server)


def test_a_lost_answer_doubles_neither_runs_nor_points(
    make_run: MakeRun, server: str, proxy: Proxy
) -> None:
    store = make_run(failed=(2,))
    view = MlflowView(store, proxy.address)
    lost = 0
    while True:
        proxy.lose_answers_after = 2 * lost  # another call each time takes place unanswered
        try:
            view.finish("FINISHED")
            break
        except TrackingUnreachable:
            lost += 1
    assert lost > 5
    check(store, view, server)


def test_a_server_gets_the_same_as_a_local_store(
    make_run: MakeRun, server: str, tmp_path: Path
) -> None:
    store = make_run(failed=(2,))
    view = connected(store, server)
    view.sync()
    registration = Registry(server).register_winner(store, view)
    view.finish("FINISHED")
    check(store, view, server)
    model_uri = f"models:/{registration.model_name}@champion"
    folder = download_adapter(server, model_uri, tmp_path / "adapter")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert weights == b"weights of %s 3" % store.sweep.run_id.encode()


@pytest.mark.slow
def test_a_sweep_without_its_server_is_trained_and_synced_later(
    orchestrator: Command, tmp_path: Path, tiny_base: Path, server: str
) -> None:
    config = write_config(tmp_path, tiny_base, tracking__uri=f"http://127.0.0.1:{free_port()}")
    done = orchestrator("train", str(config), "--run-dir", "run", cwd=tmp_path)
    assert "training does not wait for it" in done.stdout
    assert done.returncode == 1  # what it was asked to track was not tracked
    assert "orchestrator sync" in done.stderr or "resume run" in done.stderr
    store = RunStore.open(tmp_path / "run")
    assert store.read("winner")
    done = orchestrator("sync", "run", "--tracking-uri", server, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    view = connected(store, server)
    assert lost_and_doubled(store, MlflowClient(server), view.experiment_id) == HOLDS_ALL

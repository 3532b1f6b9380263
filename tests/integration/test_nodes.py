"""Sweeps on Ray clusters of several nodes: where work is put, and what a lost node costs."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.metrics import METRICS, ray_metrics
from cluster.ray_executor import RayExecutor
from cluster.ray_runtime import ray_cluster
from cluster.ray_target import plan_ray_job
from cluster.sharding import RayTasks
from orchestrator.loading import load_config
from orchestrator.planning.capacity import worker_count
from orchestrator.records import (
    Decision,
    Event,
    PackReady,
    PackStanding,
    Progress,
    Standing,
    TrialDone,
)
from orchestrator.sweep.run_store import RunStore
from tests.contract.test_executor import SlowLoader, spec
from tests.integration.conftest import write_config
from tests.nodes import (
    ACCELERATORS,
    HELD,
    LocalCluster,
    NotingWorker,
    local_cluster,
    node_here,
)
from tests.sweeps import make_controller, make_store, sweep_config

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240.0
SIZES = (2, 1)
"""CPU cores of the two worker nodes."""


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def started() -> Iterator[LocalCluster]:
    with local_cluster(*SIZES) as cluster, ray_cluster(cluster.address) as nodes:
        assert worker_count(sweep_config().resources, "cpu", nodes) == sum(SIZES)
        assert {node.num_cpus: node.gpu_kind for node in nodes if node.gpu_kind} == ACCELERATORS
        yield cluster


@pytest.fixture
def three_nodes(started: LocalCluster) -> LocalCluster:
    """A head and two workers, all there and free; this process is the driver."""
    for num_cpus in started.missing(SIZES):
        started.add(num_cpus)
    wait_until(lambda: all(map(started.is_free, started.node_ids())), "free nodes")
    return started


StartPacks = Callable[..., list[list[str]]]


@pytest.fixture
def start_packs(three_nodes: LocalCluster, tmp_path: Path) -> Iterator[StartPacks]:
    """Start packs of so many workers each; says on which node each worker is."""
    executor = RayExecutor(partial(NotingWorker, folder=tmp_path))

    def start(*world_sizes: int, accelerator: str = "") -> list[list[str]]:
        for number, world_size in enumerate(world_sizes):
            executor.start_pack(replace(spec(number, world_size), accelerator=accelerator))
        waiting = set(range(len(world_sizes)))
        while waiting:
            for number, (ready,) in executor.poll(TIMEOUT_S):
                assert isinstance(ready, PackReady), ready
                waiting.remove(number)
        return [
            [(tmp_path / f"{number}-{world_rank}").read_text() for world_rank in range(world_size)]
            for number, world_size in enumerate(world_sizes)
        ]

    yield start
    executor.close()


def test_packs_use_the_cores_of_all_nodes(start_packs: StartPacks) -> None:
    packs = start_packs(1, 1, 1)
    assert len({node for (node,) in packs}) == 2


def test_the_workers_of_a_pack_share_a_node_that_has_room_for_all(start_packs: StartPacks) -> None:
    (pack,) = start_packs(2)
    assert len(set(pack)) == 1


def test_a_pack_spans_nodes_where_none_has_room_for_all_its_workers(
    start_packs: StartPacks,
) -> None:
    (pack,) = start_packs(3)
    assert sorted(map(pack.count, set(pack))) == [1, 2]


@pytest.mark.parametrize(("num_cpus", "kind"), ACCELERATORS.items())
def test_a_pack_runs_on_the_kind_of_gpu_that_it_was_planned_for(
    three_nodes: LocalCluster, start_packs: StartPacks, num_cpus: int, kind: str
) -> None:
    assert start_packs(1, accelerator=kind) == [[three_nodes.of_size(num_cpus)]]


def test_sharding_uses_all_nodes(three_nodes: LocalCluster, tmp_path: Path) -> None:
    folder, count = str(tmp_path), sum(SIZES)

    def wait_for_all(number: int) -> str:
        """None ends before all have begun, so that none does the work of another."""
        open(f"{folder}/{number}", "w").close()
        while len(os.listdir(folder)) < count:
            time.sleep(0.05)
        return node_here(number)

    with RayTasks(count) as run:
        assert len(set(run(wait_for_all, range(count)))) == 2


def test_a_pack_that_has_its_place_and_loads_for_long_is_not_said_to_wait_for_room(
    three_nodes: LocalCluster,
) -> None:
    executor = RayExecutor(SlowLoader, queued_after_s=1.0)
    executor.start_pack(spec())
    answers: list[tuple[int, list[Event]]] = []
    wait_until(lambda: answers.extend(executor.poll(0.5)) or answers, "an answer")
    executor.close()
    ((_, (event,)),) = answers
    assert isinstance(event, PackReady)


def test_preparing_data_waits_for_a_core_that_another_sweep_holds_and_says_so(
    three_nodes: LocalCluster,
) -> None:
    held = placement_group([{"CPU": 1}] * sum(SIZES))
    assert held.wait(TIMEOUT_S)
    said: list[str] = []

    def warn(line: str) -> None:
        said.append(line)
        remove_placement_group(held)

    with RayTasks(2, queued_after_s=0.5, warn=warn) as run:
        assert list(run(abs, [-1, -2])) == [1, 2]
    (line,) = said
    assert "waits in Ray's queue until 1 CPU core is free" in line


def test_prometheus_reads_every_metric_of_a_sweep(three_nodes: LocalCluster) -> None:
    watch = ray_metrics("sums")
    pack = PackStanding(7, num_slots=4, trials=(0, 1), expected_memory_bytes=2**30)
    done = TrialDone(
        trial=1,
        attempt=1,
        time=0.0,
        eval_loss=1.0,
        baseline_eval_loss=2.0,
        train_loss=1.0,
        steps=9,
        tokens=900,
        tokens_per_s=1.0,
        train_s=1.0,
        peak_memory_bytes=2**29,
        model_memory_bytes=1,
        num_adapter_params=1,
        adapter_bytes=1,
        adapter_dir="",
        adapter_digest="",
    )
    for notice in (
        Standing(5, 2, 3, 1, (pack,)),
        Progress(0, 1, 0.0, 1, 100, 1.0, 1e-3, 1.0, 250.0),
        Decision(0.0, "retry_trial", "trial 1", "its pack is lost"),
        done,
    ):
        watch(notice)
    expected = {
        "ray_orchestrator_trials waiting": 5,
        "ray_orchestrator_trials training": 2,
        "ray_orchestrator_trials finished": 2,
        "ray_orchestrator_trials pruned": 3,
        "ray_orchestrator_trials failed": 1,
        "ray_orchestrator_slots": 4,
        "ray_orchestrator_slots_used": 2,
        "ray_orchestrator_tokens_total": 1000,
        "ray_orchestrator_tokens_per_s": 250,
        "ray_orchestrator_memory_predicted_bytes 7": 2**30,
        "ray_orchestrator_memory_peak_bytes 7": 2**29,
        "ray_orchestrator_decisions_total retry_trial": 1,
    }
    assert {name.split()[0] for name in expected} == {m.exported_name for m in METRICS}
    wait_until(lambda: of_sweep(three_nodes.exported_metrics(), "sums") == expected, "metrics")


def of_sweep(page: str, sweep: str) -> dict[str, float]:
    """The sweep's series, each with the one label of ours that it may have."""
    values = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.labels.get("sweep") == sweep:
                own = [sample.labels[k] for k in ("state", "pack", "action") if k in sample.labels]
                values[" ".join([sample.name, *own])] = sample.value
    return values


class RunningSweep:
    """A sweep of simulated workers on the cluster, in a thread of its own.

    Its long trials are held in their middle until it is waited for.
    """

    def __init__(self, folder: Path, num_workers: int, **changes: Any) -> None:
        self.store = make_store(folder / "run", sweep_config(**changes))
        self._places = folder / "places"
        self._places.mkdir()
        (self._places / HELD).touch()
        self._executor = RayExecutor(partial(NotingWorker, folder=self._places))
        self._controller = make_controller(self.store, self._executor, num_workers)
        self._thread = threading.Thread(target=self._controller.run)
        self._thread.start()

    @property
    def ended(self) -> set[int]:
        return {result.number for result in self.store.results}

    def subjects(self, action: str) -> set[int]:
        """The trials that it was decided for."""
        decisions = [d for d in self.store.decisions if d["action"] == action]
        return {int(d["subject"].removeprefix("trial ")) for d in decisions}

    def have_checkpoints(self, *trials: int) -> bool:
        return all(self.store.checkpoints(trial) for trial in trials)

    def node_of(self, trial: int) -> str:
        """Where the trial was put first."""
        assigned = [d for d in self.store.decisions if d["action"] == "assign"]
        reason = next(d["reason"] for d in assigned if d["subject"] == f"trial {trial}")
        pack = re.search(r"pack (\d+)", reason)
        assert pack is not None
        return (self._places / f"{pack[1]}-0").read_text()

    def let_go(self) -> None:
        (self._places / HELD).unlink(missing_ok=True)

    def wait(self) -> None:
        self.let_go()
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), "the sweep did not end"

    def close(self) -> None:
        self.let_go()
        self._controller.request_stop()
        self._thread.join(TIMEOUT_S)
        self._executor.close()


@pytest.fixture
def run(three_nodes: LocalCluster, tmp_path: Path) -> Iterator[Callable[..., RunningSweep]]:
    running: list[RunningSweep] = []

    def start(num_workers: int, **changes: Any) -> RunningSweep:
        running.append(RunningSweep(tmp_path, num_workers, **changes))
        return running[-1]

    yield start
    for sweep in running:
        sweep.close()


@pytest.mark.parametrize("lost_size", SIZES)
def test_a_sweep_survives_the_loss_of_any_worker_node(
    three_nodes: LocalCluster, run: Callable[..., RunningSweep], lost_size: int
) -> None:
    # The longest begin: one is in each of three packs, and trial 0 follows where one is over.
    space = {"steps": [4, 10, 11, 12]}
    sweep = run(3, search__space=space, resources__slots_per_pack=1)
    wait_until(lambda: sweep.have_checkpoints(1, 2, 3), "training")
    lost = three_nodes.of_size(lost_size)
    hit = {trial for trial in (1, 2, 3) if sweep.node_of(trial) == lost}
    assert len(hit) == lost_size
    three_nodes.kill(lost)
    # Its workers outlive their raylet by a moment, and could end their trials in it.
    wait_until(lambda: sweep.subjects("retry_trial") == hit, "the loss")
    sweep.wait()
    assert {result.state for result in sweep.store.results} == {"finished"}
    attempts = {result.number: result.attempt for result in sweep.store.results}
    assert attempts == {trial: 2 if trial in hit else 1 for trial in range(4)}
    assert sweep.subjects("resume_trial") == hit
    resumed = [d for d in sweep.store.decisions if d["action"] == "resume_trial"]
    assert all(first_step_of(decision) > 0 for decision in resumed)


def first_step_of(resumed: Mapping[str, Any]) -> int:
    return int(resumed["reason"].rpartition(" ")[2])


def test_a_node_without_work_is_free_and_the_sweep_goes_on_when_it_is_taken_away(
    three_nodes: LocalCluster, run: Callable[..., RunningSweep]
) -> None:
    space = {"steps": [4, 5, 6, 12]}
    sweep = run(3, search__space=space, resources__slots_per_pack=1)
    wait_until(lambda: sweep.ended == {0, 1, 2}, "the short trials")
    (idle,) = set(three_nodes.node_ids()) - {sweep.node_of(3)}
    wait_until(lambda: three_nodes.is_free(idle), "a node without work")
    three_nodes.remove(idle)
    assert sweep.ended == {0, 1, 2}
    sweep.wait()
    assert [(r.state, r.attempt) for r in sweep.store.results] == [("finished", 1)] * 4


def test_a_sweep_takes_turns_with_one_that_makes_no_claims_and_says_that_it_waits(
    three_nodes: LocalCluster,
    run: Callable[..., RunningSweep],
    tmp_path: Path,
    environment: Mapping[str, str],
) -> None:
    space = {"steps": [40, 10_000, 10_001]}
    first = run(3, search__space=space, resources__slots_per_pack=1)
    wait_until(lambda: first.have_checkpoints(0, 1, 2), "a sweep that has the whole cluster")
    make_store(tmp_path / "other", sweep_config(search__space={"steps": [4, 5]}))
    other = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.driver", "other"],
        cwd=tmp_path,
        env=at(three_nodes, environment),
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout is not None
        queued = next(line for line in other.stdout if line.startswith("pack "))
        assert not first.ended
        first.let_go()
        rest, _ = other.communicate(timeout=TIMEOUT_S)
    assert other.returncode == 0
    assert queued.strip() == (
        "pack 0: waits in Ray's queue until 1 x 1 CPU core are free: others on this cluster, such "
        "as another sweep, hold what it has"
    )
    own = [line for line in rest.splitlines() if not line.startswith("sweep: ")]
    assert not any("Ray's queue" in line for line in own)
    assert first.ended == {0}, "the other one had what the first's ended pack gave back"
    assert len(RunStore.open(tmp_path / "other").results) == 2


def under_way(run_dir: Path) -> bool:
    """Whether one trial is over and another has a checkpoint but is not over."""
    over = {path.parent.name for path in run_dir.glob("trials/*/result.json")}
    saved = {path.parts[-5] for path in run_dir.glob("trials/*/attempts/*/*/checkpoint.json")}
    return bool(over and saved - over)


def lose_everything(
    command: list[str], cwd: Path, run_dir: Path, environment: Mapping[str, str]
) -> None:
    """Run the command on a cluster, and take both away in the middle of its sweep."""
    with local_cluster(1) as cluster:
        driver = subprocess.Popen(
            command,
            cwd=cwd,
            env=at(cluster, environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

        def middle() -> bool:
            assert driver.poll() is None, driver.communicate()[0]
            return under_way(run_dir)

        wait_until(middle, "the middle of the sweep")
        driver.kill()
        cluster.lose_power()
        driver.communicate()


def at(cluster: LocalCluster, environment: Mapping[str, str]) -> dict[str, str]:
    # Ray sets it where it has started a cluster before: the next ones there ask for its token.
    mode = {name: os.environ[name] for name in ("RAY_AUTH_MODE",) if name in os.environ}
    return {**environment, **mode, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}


def assert_went_on(store: RunStore) -> None:
    assert [(r.state, r.attempt) for r in store.results] == [("finished", 1), ("finished", 2)]
    (resumed,) = [d for d in store.decisions if d["action"] == "resume_trial"]
    assert first_step_of(resumed) > 0


@pytest.mark.slow
def test_losing_the_head_with_the_driver_is_survived_by_starting_again_on_a_new_cluster(
    tmp_path: Path, environment: Mapping[str, str]
) -> None:
    store = make_store(tmp_path / "run", sweep_config(search__space={"steps": [4, 100]}))
    driver = [sys.executable, "-m", "tests.integration.driver", "run"]
    lose_everything(driver, tmp_path, tmp_path / "run", environment)
    assert [result.number for result in store.results] == [0]
    with local_cluster(1) as cluster:
        subprocess.run(driver, cwd=tmp_path, env=at(cluster, environment), check=True)
    assert_went_on(store)


@pytest.mark.slow
def test_a_submitted_sweep_survives_the_loss_of_the_head_by_the_same_entrypoint_again(
    tmp_path: Path, tiny_base: Path, as_on_a_node: Mapping[str, str], uri: str
) -> None:
    """As the operator posts it to a new head, or a user submits it again to a new cluster."""
    changes: dict[str, Any] = {"tracking__uri": uri, "registry__register_winner": False}
    changes |= {"search__space": {"steps": [4, 400]}, "evaluation__every_steps": None}
    config = load_config(write_config(tmp_path, tiny_base, **changes), [])
    submission = plan_ray_job(str(tmp_path / "shared"), 60, config, None).submission
    run_dir = Path(submission.run_dir)
    driver = ["sh", "-c", submission.entrypoint]
    lose_everything(driver, tmp_path, run_dir, as_on_a_node)
    with local_cluster(1) as cluster:
        done = subprocess.run(
            driver,
            cwd=tmp_path,
            env=at(cluster, as_on_a_node),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on with {run_dir}" in done.stdout
    store = RunStore.open(run_dir)
    assert_went_on(store)
    assert store.read("done")

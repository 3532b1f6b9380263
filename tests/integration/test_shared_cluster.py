"""Two sweeps, each with a driver of its own, on one Ray cluster."""

import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from cluster.ray_executor import RayExecutor
from cluster.ray_runtime import ray_cluster
from cluster.ray_sharing import RaySharing
from orchestrator.sweep.own_share import OwnShare
from orchestrator.sweep.run_store import RunStore
from orchestrator.sweep.simulated import SimulatedWorker
from tests.integration.driver import claimant
from tests.integration.test_nodes import at, first_step_of, wait_until
from tests.nodes import local_cluster
from tests.sweeps import make_controller, make_store, sweep_config

NUM_CORES = 2
LONG = {"steps": [10_000, 10_001]}


def endless_sweep(folder: Path, priority: int) -> RunStore:
    """Of a pack on each core."""
    config = sweep_config(
        search__space=LONG,
        max_restarts=0,
        resources={"slots_per_pack": 1, "num_workers": NUM_CORES, "priority": priority},
    )
    return make_store(folder, config)


def reasons(store: RunStore, action: str) -> list[str]:
    return [d["reason"] for d in store.decisions if d["action"] == action]


@pytest.mark.slow
def test_a_sweep_gives_its_workers_to_one_of_higher_priority_and_has_them_back_when_that_is_killed(
    tmp_path: Path, environment: Mapping[str, str]
) -> None:
    low, high = (endless_sweep(tmp_path / name, n) for n, name in enumerate(("low", "high")))
    with local_cluster(NUM_CORES) as cluster, ray_cluster(cluster.address) as nodes:
        executor = RayExecutor(partial(SimulatedWorker, step_s=0.05))
        sharing = RaySharing(claimant(low, nodes))
        controller = make_controller(low, executor, NUM_CORES, own_share=OwnShare(sharing))
        with closing(sharing), closing(executor):
            thread = threading.Thread(target=controller.run)
            thread.start()
            wait_until(lambda: all(map(low.checkpoints, (0, 1))), "a sweep that has both cores")
            driver = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.driver", "high"],
                cwd=tmp_path,
                env=at(cluster, environment),
            )
            wait_until(lambda: all(map(high.checkpoints, (0, 1))), "another that has both cores")
            assert thread.is_alive()
            assert len(reasons(low, "yield_pack")) == NUM_CORES
            assert reasons(low, "resume_trial") == []
            driver.kill()
            driver.wait()
            wait_until(lambda: len(reasons(low, "resume_trial")) == NUM_CORES, "both cores again")
            controller.request_stop()
            thread.join()
    assert reasons(low, "share") == [
        "may use 0 of 2 CPU cores and could use 2 (priority 0); high may use 2 (priority 1)",
        "may use all workers that it can use",
    ]
    assert reasons(high, "share") == reasons(low, "retry_trial") == low.results == []
    resumed = [d for d in low.decisions if d["action"] == "resume_trial"]
    assert all(first_step_of(decision) > 0 for decision in resumed)

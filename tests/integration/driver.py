"""A driver in a process of its own: `python -m tests.integration.driver FOLDER [STEP_S]`.

Runs the sweep in FOLDER, or goes on with it, by simulated workers on the cluster at RAY_ADDRESS,
which it shares with other sweeps; says what a sweep in a terminal without windows says.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from cluster.ray_executor import RayExecutor
from cluster.ray_runtime import ray_cluster
from cluster.ray_sharing import RaySharing, pools
from jobs.display import SweepDisplay
from orchestrator.planning.capacity import Node
from orchestrator.sweep.own_share import OwnShare
from orchestrator.sweep.run_store import RunStore
from orchestrator.sweep.sharing import Claimant
from orchestrator.sweep.simulated import SimulatedWorker
from tests.sweeps import make_controller


def main(folder: str, step_s: str = "0.05") -> None:
    store = RunStore.open(Path(folder))
    executor = RayExecutor(partial(SimulatedWorker, step_s=float(step_s)), queued_after_s=0.5)
    observe = SweepDisplay(store).observe
    with store.locked(), ray_cluster(None) as nodes:
        sharing = RaySharing(claimant(store, nodes))
        num_workers = store.sweep.config.resources.num_workers or 1
        share = OwnShare(sharing)
        with closing(sharing), closing(executor):
            assert make_controller(store, executor, num_workers, observe, own_share=share).run()


def claimant(store: RunStore, nodes: Sequence[Node]) -> Claimant:
    resources = store.sweep.config.resources
    taken_from = pools(resources, "cpu", (), nodes)
    return Claimant(store.sweep.run_id, resources.priority, time.time(), taken_from)


if __name__ == "__main__":
    main(*sys.argv[1:])

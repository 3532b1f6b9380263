"""A driver in a process of its own: `python -m tests.integration.driver FOLDER [STEP_S]`.

Runs the sweep in FOLDER, or goes on with it, by simulated workers on the cluster at RAY_ADDRESS;
says what a sweep in a terminal without windows says.
"""

import sys
from functools import partial
from pathlib import Path

from cluster.ray_executor import RayExecutor
from cluster.ray_runtime import ray_cluster
from jobs.display import SweepDisplay
from orchestrator.sweep.run_store import RunStore
from orchestrator.sweep.simulated import SimulatedWorker
from tests.sweeps import make_controller


def main(folder: str, step_s: str = "0.05") -> None:
    store = RunStore.open(Path(folder))
    executor = RayExecutor(partial(SimulatedWorker, step_s=float(step_s)), queued_after_s=0.5)
    observe = SweepDisplay(store).observe
    with store.locked(), ray_cluster(None):
        assert make_controller(store, executor, num_workers=1, observe=observe).run()
        executor.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

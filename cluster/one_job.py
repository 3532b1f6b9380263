"""One job on a worker's share of the cluster, before any pack holds it.

In: the device and the cores of a worker. Out: a function that calls a picklable job there and
returns what it returns.
"""

from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.ray_executor import device_environment
from orchestrator.errors import ClusterError, OrchestratorError


def run_on_worker(device: str, cpus: int) -> Callable[[Callable[[], Any]], Any]:
    def run(job: Callable[[], Any]) -> Any:
        """Raises what the job raises, if it is one of the project's errors; else ClusterError."""
        options = {
            "num_cpus": cpus,
            "num_gpus": 1 if device == "cuda" else 0,
            "runtime_env": {"env_vars": device_environment(device, cpus)},
        }
        try:
            return ray.get(ray.remote(**options)(_call).remote(job))
        except RayTaskError as error:
            if isinstance(error.cause, OrchestratorError | OSError):
                raise error.cause from None
            raise ClusterError(f"a worker's job failed: {error}") from error
        except RayError as error:
            raise ClusterError(f"a worker's job failed: {error}") from error

    return run


def _call(job: Callable[[], Any]) -> Any:
    return job()

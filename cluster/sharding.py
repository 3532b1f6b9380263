"""Dataset preparation on a pool of Ray actors.

A RunTasks (orchestrator/data/prepare.py): runs a picklable function over tasks and gives the
results in their order. A task may run twice, when an actor dies and is replaced.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util import ActorPool

from orchestrator.errors import ClusterError, OrchestratorError

T = TypeVar("T")
R = TypeVar("R")

TASK_RETRIES = 3


# Actors for which a busy cluster has no core yet are not waited for once others are there.
START_TIMEOUT_S = 5.0


class _ShardingActor:
    def ready(self) -> None:
        pass

    def run(self, function: Callable[[T], R], task: T) -> R:
        return function(task)


class RayTasks:
    """Callable as run_tasks(function, tasks)."""

    def __init__(self, num_actors: int) -> None:
        self._num_actors = num_actors

    def __call__(self, function: Callable[[T], R], tasks: Sequence[T]) -> list[R]:
        """Raises what `function` raises, if it is one of the project's errors."""
        if not tasks:
            return []
        remote = ray.remote(
            num_cpus=1,
            max_restarts=-1,
            max_task_retries=TASK_RETRIES,
            runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}},
        )(_ShardingActor)
        actors = [remote.remote() for _ in range(min(self._num_actors, len(tasks)))]
        try:
            pool = ActorPool(_started(actors))
            results = pool.map(lambda actor, task: actor.run.remote(function, task), tasks)
            return list(results)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, OrchestratorError | OSError):
                raise cause from None
            raise ClusterError(f"a sharding task failed: {error}") from error
        except RayError as error:
            raise ClusterError(f"sharding failed: {error}") from error
        finally:
            for actor in actors:
                ray.kill(actor)


def _started(actors: Sequence[Any]) -> list[Any]:
    """The actors that run: at least one, and all that start within the time."""
    pings = {actor.ready.remote(): actor for actor in actors}
    ray.wait(list(pings), num_returns=1)
    ready, _ = ray.wait(list(pings), num_returns=len(pings), timeout=START_TIMEOUT_S)
    return [pings[ping] for ping in ready]

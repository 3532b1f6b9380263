"""Dataset preparation on a pool of Ray actors.

A RunTasks (orchestrator/data/prepare.py): runs a picklable function over tasks and yields the
results in their order. A task goes to an actor when that actor is idle, never before; the task of
an actor that is lost, alone or with its node, goes to another one.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import ray
from ray.exceptions import (
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from orchestrator.errors import ClusterError, OrchestratorError

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

LOSSES_PER_TASK = 3  # then it is the task that ends its actors, by its memory for example
# A node's first actor starts a process and imports this project: some seconds, more on a busy node.
QUEUED_AFTER_S = 30.0
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


class RayTasks:
    """Callable as run_tasks(function, tasks) while it is entered; leaving it ends the actors."""

    def __init__(
        self,
        num_actors: int,
        queued_after_s: float = QUEUED_AFTER_S,
        warn: Callable[[str], None] = log.warning,
    ) -> None:
        # One at least: where a cluster grows by itself, asking for it is what makes it grow.
        self._num_actors = max(1, num_actors)
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        """Actors by the ref of their readiness. On a busy cluster some may never get a core."""
        self._warn = warn
        self._queued_after_s: float | None = queued_after_s
        """None once it was said that no actor has got a core yet."""

    def __enter__(self) -> "RayTasks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _end([*self._idle, *self._starting.values()])
        self._idle, self._starting = [], {}

    def __call__(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        """Raises what `function` raises, if it is one of the project's errors.

        Raises:
            ClusterError: Ray failed, or a task's actor was lost again and again.
        """
        # Actors that start already, for earlier tasks, may be lost with their node as well.
        run = _Run(function, tasks, LOSSES_PER_TASK * len(tasks) + len(self._starting))
        try:
            for number in range(len(tasks)):
                while number not in run.results:
                    self._advance(run)
                yield run.results.pop(number)
        except RayTaskError as error:
            if isinstance(error.cause, OrchestratorError | OSError):
                raise error.cause from None
            raise ClusterError(f"a sharding task failed: {error}") from error
        except RayError as error:
            raise ClusterError(f"sharding failed: {error}") from error
        finally:
            _end([actor for actor, _ in run.running.values()])

    def _advance(self, run: "_Run") -> None:
        """Give work to whoever is idle, wait for something to end, take it in."""
        num_actors = len(self._idle) + len(self._starting) + len(run.running)
        wanted = min(self._num_actors, len(run.waiting) + len(run.running))
        for _ in range(wanted - num_actors):
            actor = _actor_class().remote()
            self._starting[actor.ready.remote()] = actor
        while run.waiting and self._idle:
            run.give(self._idle.pop())
        timeout_s = None if run.running else self._queued_after_s
        ready, _ = ray.wait([*run.running, *self._starting], timeout=timeout_s)
        if not ready:
            self._queued_after_s = None
            self._warn(
                "preparing the data waits in Ray's queue until 1 CPU core is free: others on this "
                "cluster, such as another sweep, hold what it has"
            )
            return
        (ref,) = ready
        actor = self._starting.pop(ref, None)
        try:
            if actor is None:
                actor = run.running[ref][0]
                run.take(ref)
            else:
                ray.get(ref)
            self._idle.append(actor)
        except (RayActorError, ObjectLostError, OutOfMemoryError) as error:
            # The idle ones may be lost with the same node: each would cost the task another loss.
            _end([actor, *self._idle])
            self._idle = []
            if run.put_back(ref):
                raise ClusterError(
                    f"sharding failed: actors are lost again and again ({error}): look at Ray's "
                    "log, and lower data.slice_bytes if they run out of memory"
                ) from error


class _Run:
    """One function over some tasks: what waits, what runs where, what is done."""

    def __init__(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], most_losses: int
    ) -> None:
        self.tasks = tasks
        self.waiting = deque(range(len(tasks)))
        self.running: dict[Any, tuple[Any, int]] = {}
        self.results: dict[int, Any] = {}
        self._function = function
        self._losses = [0] * len(tasks)
        self._losses_left = most_losses

    def give(self, actor: Any) -> None:
        number = self.waiting.popleft()
        self.running[actor.run.remote(self._function, self.tasks[number])] = (actor, number)

    def take(self, ref: Any) -> None:
        """Raises what the task raised; it then counts as running still."""
        result = ray.get(ref)
        _, number = self.running.pop(ref)
        self.results[number] = result

    def put_back(self, ref: Any) -> bool:
        """An actor is lost, and the task that it ran, if any, is to run again. Whether that has
        happened too often."""
        self._losses_left -= 1
        if ref not in self.running:
            return self._losses_left < 0
        _, number = self.running.pop(ref)
        self.waiting.appendleft(number)
        self._losses[number] += 1
        return self._losses[number] == LOSSES_PER_TASK or self._losses_left < 0


class _ShardingActor:
    def ready(self) -> None:
        pass

    def run(self, function: Callable[[T], R], task: T) -> R:
        return function(task)


def _actor_class() -> Any:
    return ray.remote(
        num_cpus=1,
        max_restarts=0,
        scheduling_strategy="SPREAD",
        runtime_env={"env_vars": ENVIRONMENT},
    )(_ShardingActor)


def _end(actors: Sequence[Any]) -> None:
    for actor in actors:
        ray.kill(actor)

"""Packs as Ray actors, each in a placement group of its own.

An Executor (orchestrator/sweep/executor.py). One actor is one pack worker: it loads the base once
and answers `advance` calls until it is told to leave. Restarting is the controller's decision,
never Ray's, so that an attempt is counted and its checkpoints are chosen.
"""

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.records import Directive, Event, PackLost, PackSpec
from orchestrator.sweep.executor import WorkerFactory, answer, pack_worker


class _PackActor:
    """Runs in the worker process."""

    def __init__(self, spec: PackSpec, factory: WorkerFactory) -> None:
        self._spec = spec
        self._factory = factory

    def load(self) -> list[Event]:
        def load() -> list[Event]:
            self._worker = self._factory(self._spec)
            return [self._worker.load()]

        return answer(self._spec.pack, load)

    def advance(self, directives: Sequence[Directive]) -> list[Event]:
        return answer(self._spec.pack, lambda: self._worker.advance(directives))


class RayExecutor:
    def __init__(self, factory: WorkerFactory = pack_worker) -> None:
        self._factory = factory
        self._actors: dict[int, Any] = {}
        self._groups: dict[int, Any] = {}
        self._answers: dict[Any, int] = {}  # a reference -> its pack

    def start_pack(self, spec: PackSpec) -> None:
        bundle: dict[str, float] = {"CPU": spec.cpus}
        if spec.device == "cuda":
            bundle["GPU"] = 1
        group = self._groups[spec.pack] = placement_group([bundle], strategy="STRICT_PACK")
        options = {
            "num_cpus": spec.cpus,
            "num_gpus": bundle.get("GPU", 0),
            "max_restarts": 0,
            "runtime_env": {"env_vars": worker_environment(spec)},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group=group),
        }
        actor = ray.remote(**options)(_PackActor).remote(spec, self._factory)
        self._actors[spec.pack] = actor
        self._answers[actor.load.remote()] = spec.pack

    def advance(self, pack: int, directives: Sequence[Directive]) -> None:
        self._answers[self._actors[pack].advance.remote(list(directives))] = pack

    def poll(self, timeout_s: float) -> list[tuple[int, list[Event]]]:
        if not self._answers:
            return []
        ready, _ = ray.wait(list(self._answers), num_returns=1, timeout=timeout_s)
        if ready:  # take all that are there
            references = list(self._answers)
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        return [(pack, self._read(reference, pack)) for reference, pack in self._pop(ready)]

    def stop_pack(self, pack: int) -> None:
        self._answers = {ref: owner for ref, owner in self._answers.items() if owner != pack}
        actor = self._actors.pop(pack, None)
        if actor is not None:
            ray.kill(actor)
        group = self._groups.pop(pack, None)
        if group is not None:
            remove_placement_group(group)

    def close(self) -> None:
        for pack in list(self._actors):
            self.stop_pack(pack)

    def _pop(self, references: Sequence[Any]) -> list[tuple[Any, int]]:
        return [(reference, self._answers.pop(reference)) for reference in references]

    @staticmethod
    def _read(reference: Any, pack: int) -> list[Event]:
        try:
            events: list[Event] = ray.get(reference)
            return events
        except RayError as error:  # the process or its node is gone, or Ray ended it for memory
            message = str(error).strip().splitlines()[0]
            return [PackLost(pack, "worker_lost", f"{type(error).__name__}: {message}")]


def worker_environment(spec: PackSpec) -> dict[str, str]:
    """Environment of a pack worker."""
    environment = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if spec.device == "cpu":
        # More threads than cores, or waiting by spinning, cost up to 8 times: 15 s against 1.7 s
        # a step of a 4-bit model on 2 cores.
        environment |= {"OMP_NUM_THREADS": str(spec.cpus), "OMP_WAIT_POLICY": "passive"}
        # DeepSpeed would take a GPU that it sees, and warn where it sees none.
        environment["DS_ACCELERATOR"] = "cpu"
    return environment

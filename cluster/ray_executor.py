"""Packs as Ray actors, those of a pack in a placement group of their own.

An Executor (orchestrator/sweep/executor.py). One actor is one worker of a pack: it loads the base
once and answers `advance` calls until it is told to leave. Restarting is the controller's decision,
never Ray's, so that an attempt is counted and its checkpoints are chosen.
"""

import math
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.files import cache_dir
from orchestrator.records import (
    Directive,
    Event,
    GroupPlace,
    PackLost,
    PackPlaced,
    PackQueued,
    PackSpec,
)
from orchestrator.sweep.executor import (
    Worker,
    WorkerFactory,
    answer,
    pack_worker,
    prepare_worker,
)

# A node has 1 of its accelerator's type, whatever the number of GPUs: ray.util.accelerators.
ACCELERATOR_PART = 0.001
# Ray places a pack within a second where there is room.
QUEUED_AFTER_S = 10.0


class _PackActor:
    """Runs in the worker process."""

    def __init__(self, name: str, factory: WorkerFactory) -> None:
        self._name = name
        self._factory = factory
        self._worker: Worker
        self._reserved: socket.socket

    def __repr__(self) -> str:
        """What Ray's dashboard calls it, and `jobs logs --worker` finds it by; Ray asks once."""
        return self._name

    def prepare(self, prepare: Callable[[], None]) -> None:
        prepare()

    def meeting_point(self) -> str:
        """An init_method at this node, with a port that is kept free for this process."""
        # Bound but not listening: nobody else is given the port, while torch, which sets
        # SO_REUSEADDR as well, can listen on it once the base is loaded.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("", 0))
        return f"tcp://{ray.util.get_node_ip_address()}:{self._reserved.getsockname()[1]}"

    def load(self, spec: PackSpec, world_rank: int, init_method: str) -> list[Event]:
        self._spec, self._world_rank = spec, world_rank

        def load() -> list[Event]:
            place = GroupPlace(world_rank, spec.world_size, init_method)
            self._worker = self._factory(spec, place)
            return [self._worker.load()]

        return self._answer(load)

    def advance(self, directives: Sequence[Directive]) -> list[Event]:
        return self._answer(lambda: self._worker.advance(directives))

    def _answer(self, step: Callable[[], list[Event]]) -> list[Event]:
        events = answer(self._spec.pack, step)
        return events if self._world_rank == 0 else _losses(events)


@dataclass
class _Pack:
    actors: list[Any]
    """By world_rank."""
    placement_group: Any
    pending: list[Any]
    """References to answers that are still to come."""
    events: list[Event]
    """Of the answers that have come."""
    needs: str
    """In words."""
    look_at: float
    """When to see whether it waits in Ray's queue; monotonic seconds."""
    queued: bool = False
    """When that was last looked at."""


@dataclass(frozen=True)
class _Spare:
    """A worker's process with its place, before there is a pack for it."""

    device: str
    cpus: int
    actor: Any
    placement_group: Any


class RayExecutor:
    def __init__(
        self, factory: WorkerFactory = pack_worker, queued_after_s: float = QUEUED_AFTER_S
    ) -> None:
        self._factory = factory
        self._queued_after_s = queued_after_s
        self._packs: dict[int, _Pack] = {}
        self._spares: list[_Spare] = []

    def start_spares(
        self, count: int, device: str, cpus: int, prepare: Callable[[], None] = prepare_worker
    ) -> None:
        """Begin with the processes of so many workers before it is known what they will train:
        starting one and importing its libraries takes some 10 s. Each holds its share of the node
        from now on, so nothing but packs may need any before the packs are planned."""
        for number in range(count):
            actors, group = self._actors([f"spare worker {number}"], _bundle(device, cpus), device)
            actors[0].prepare.remote(prepare)  # if that fails, loading does, and says so
            self._spares.append(_Spare(device, cpus, actors[0], group))

    def start_pack(self, spec: PackSpec) -> None:
        bundle = _bundle(spec.device, spec.cpus, spec.accelerator)
        if (spare := self._spare_for(spec)) is not None:
            actors, group = [spare.actor], spare.placement_group
        else:
            self._end_spares()  # they may hold what this pack needs
            names = [f"pack {spec.pack} worker {rank}" for rank in range(spec.world_size)]
            actors, group = self._actors(names, bundle, spec.device, spec.accelerator)
        # A reference: Ray hands each actor its value once there is one, and nothing waits here.
        init_method = actors[0].meeting_point.remote() if spec.world_size > 1 else ""
        pending = [actor.load.remote(spec, rank, init_method) for rank, actor in enumerate(actors)]
        needs = f"{spec.world_size} x {_words(bundle)}"
        look_at = time.monotonic() + self._queued_after_s
        self._packs[spec.pack] = _Pack(actors, group, pending, [], needs, look_at)

    def _actors(
        self, names: Sequence[str], bundle: Mapping[str, float], device: str, accelerator: str = ""
    ) -> tuple[list[Any], Any]:
        """One for each name, and the placement group that they have to themselves."""
        # PACK: as few nodes as possible; more than one only if no node has room for all.
        group = placement_group([dict(bundle)] * len(names), strategy="PACK")
        actors = []
        for number, name in enumerate(names):
            options = {
                "num_cpus": bundle["CPU"],
                "num_gpus": bundle.get("GPU", 0),
                "accelerator_type": accelerator or None,
                "max_restarts": 0,
                "runtime_env": {"env_vars": device_environment(device, int(bundle["CPU"]))},
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=number
                ),
            }
            actors.append(ray.remote(**options)(_PackActor).remote(name, self._factory))
        return actors, group

    def _spare_for(self, spec: PackSpec) -> _Spare | None:
        if spec.world_size > 1 or spec.accelerator:
            return None
        for spare in self._spares:
            if (spare.device, spare.cpus) == (spec.device, spec.cpus):
                self._spares.remove(spare)
                return spare
        return None

    def _end_spares(self) -> None:
        for spare in self._spares:
            _end([spare.actor], spare.placement_group)
        self._spares = []

    def advance(self, pack: int, directives: Sequence[Directive]) -> None:
        advanced = self._packs[pack]
        assert not advanced.pending, "the pack has not answered yet"
        advanced.events = []
        advanced.pending = [actor.advance.remote(list(directives)) for actor in advanced.actors]

    def poll(self, timeout_s: float) -> list[tuple[int, list[Event]]]:
        self._end_spares()  # the packs that they were for are started by now
        deadline = time.monotonic() + timeout_s
        while references := [ref for pack in self._packs.values() for ref in pack.pending]:
            left_s = max(0.0, deadline - time.monotonic())
            ready, _ = ray.wait(references, num_returns=1, timeout=left_s)
            if not ready:
                break
            # take all that are there
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
            if answers := self._take(ready):
                return answers + self._queue_news()
        return self._queue_news()

    def stop_pack(self, pack: int) -> None:
        stopped = self._packs.pop(pack, None)
        if stopped is not None:
            _end(stopped.actors, stopped.placement_group)

    def close(self) -> None:
        self._end_spares()
        for pack in list(self._packs):
            self.stop_pack(pack)

    def _queue_news(self) -> list[tuple[int, list[Event]]]:
        """Of packs that begin to wait, or wait no longer. Ray is asked once of a pack that does not
        wait, and again and again of one that does."""
        news: list[tuple[int, list[Event]]] = []
        now = time.monotonic()
        for number, pack in self._packs.items():
            if now < pack.look_at:
                continue
            # Not its `wait(0)`: that gives up before it has looked.
            waits = placement_group_table(pack.placement_group)["state"] == "PENDING"
            pack.look_at = now + self._queued_after_s if waits else math.inf
            if pack.queued and not waits:
                news.append((number, [PackPlaced(number)]))
            if waits and not pack.queued:
                reason = (
                    f"waits in Ray's queue until {pack.needs} are free: others on this cluster, "
                    "such as another sweep, hold what it has"
                )
                news.append((number, [PackQueued(number, reason)]))
            pack.queued = waits
        return news

    def _take(self, ready: Sequence[Any]) -> list[tuple[int, list[Event]]]:
        """What the packs say to which this was the last answer, or the first to tell of a loss."""
        answers: list[tuple[int, list[Event]]] = []
        for number, pack in self._packs.items():
            came = [ref for ref in pack.pending if ref in ready]
            pack.pending = [ref for ref in pack.pending if ref not in ready]
            pack.events += [event for ref in came for event in _read(ref, number)]
            if lost := _losses(pack.events):
                pack.pending = []  # the other workers may wait for the lost one
                pack.events = lost[:1]
            if came and not pack.pending:
                pack.look_at = math.inf  # it has its place
                answers.append((number, pack.events))
        return answers


def _bundle(device: str, cpus: int, accelerator: str = "") -> dict[str, float]:
    """One worker's share of a node."""
    bundle: dict[str, float] = {"CPU": cpus}
    if device == "cuda":
        bundle["GPU"] = 1
    if accelerator:
        bundle[accelerator_resource(accelerator)] = ACCELERATOR_PART
    return bundle


def _end(actors: Sequence[Any], group: Any) -> None:
    for actor in actors:
        ray.kill(actor)
    remove_placement_group(group)


def _words(bundle: Mapping[str, float]) -> str:
    """Of one worker's share of a node: `1 GPU and 4 CPU cores`."""
    cores = f"{bundle['CPU']:g} CPU core" + ("" if bundle["CPU"] == 1 else "s")
    return f"1 GPU and {cores}" if "GPU" in bundle else cores


def _losses(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, PackLost)]


def _read(reference: Any, pack: int) -> list[Event]:
    try:
        events: list[Event] = ray.get(reference)
        return events
    except RayError as error:  # the process or its node is gone, or Ray ended it for memory
        message = str(error).strip().splitlines()[0]
        return [PackLost(pack, "worker_lost", f"{type(error).__name__}: {message}")]


def accelerator_resource(kind: str) -> str:
    return f"accelerator_type:{kind}"


def device_environment(device: str, cpus: int) -> dict[str, str]:
    """Environment of whoever computes on a device with so many cores."""
    environment = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if device == "cpu":
        # More threads than cores, or waiting by spinning, cost up to 8 times: 15 s against 1.7 s
        # a step of a 4-bit model on 2 cores.
        environment |= {"OMP_NUM_THREADS": str(cpus), "OMP_WAIT_POLICY": "passive"}
        # DeepSpeed would take a GPU that it sees, and warn where it sees none.
        environment["DS_ACCELERATOR"] = "cpu"
    else:
        # Compiled kernels outlive the worker, and its partners find them.
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir() / "inductor")
    return environment

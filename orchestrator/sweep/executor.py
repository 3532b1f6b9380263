"""The seam between the controller and whatever runs pack workers.

Executor is the protocol; InProcessExecutor runs packs in this very process, one after another, for
`orchestrator train` and for tests. The Ray executor lives in the cluster package. One contract
suite, tests/contract/test_executor.py, holds them to the same behaviour.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from orchestrator.errors import (
    BaseModelUnreachable,
    DataError,
    DataUnreachable,
    OrchestratorError,
    TrialFailed,
    is_disk_full,
    is_out_of_memory,
)
from orchestrator.garbage import without_collections
from orchestrator.records import ALONE, Directive, Event, GroupPlace, PackLost, PackReady, PackSpec


class Worker(Protocol):
    """What an executor runs: orchestrator.training.pack.PackWorker, or a stand-in.

    Of the workers of one pack all get the same calls; the one of world_rank 0 speaks for them.
    """

    def load(self) -> PackReady: ...

    def advance(self, directives: Sequence[Directive]) -> list[Event]: ...


WorkerFactory = Callable[[PackSpec, GroupPlace], Worker]


class Executor(Protocol):
    """Runs packs. A pack answers each start or `advance` once, and then waits for the next.

    A pack of several workers has answered when all of them have; it is lost with any of them, and
    then answers at once. A lost pack must be stopped: its other workers may wait for the lost one.
    """

    def start_pack(self, spec: PackSpec) -> None:
        """Begin loading; its first answer is PackReady or PackLost. Before it a PackQueued may come
        from poll, alone: where others hold what the pack needs, it waits for its turn; and then a
        PackPlaced, alone, when that has come, unless the answer is there by then."""
        ...

    def advance(self, pack: int, directives: Sequence[Directive]) -> None:
        """Let a pack that has answered go on. Returns at once. The answer may be empty: all it then
        says is that the pack gets on."""
        ...

    def poll(self, timeout_s: float) -> list[tuple[int, list[Event]]]:
        """Answers that have come in; waits for the first at most `timeout_s`."""
        ...

    def stop_pack(self, pack: int) -> None:
        """End the pack's workers at once, wherever they are and though they hang. Safe for a pack
        that is gone."""
        ...

    def close(self) -> None:
        """End all workers. Safe to call twice."""
        ...


def pack_worker(spec: PackSpec, place: GroupPlace) -> Worker:
    with without_collections():
        from orchestrator.training.pack import PackWorker

    return PackWorker(spec, place)


def prepare_worker() -> None:
    """Import what `pack_worker` and its load need."""
    with without_collections():
        from orchestrator.training.libraries import import_libraries
        from orchestrator.training.pack import PackWorker  # noqa: F401

        import_libraries()


def answer(pack: int, step: Callable[[], list[Event]]) -> list[Event]:
    """Run one step of a worker; whatever it raises becomes a PackLost event."""
    try:
        return step()
    except Exception as error:  # one of the two broad edges: a worker's error must reach the sweep
        return [_lost(pack, error)]


class InProcessExecutor:
    def __init__(self, factory: WorkerFactory = pack_worker) -> None:
        self._factory = factory
        self._workers: dict[int, Worker] = {}
        self._due: dict[int, Callable[[], list[Event]]] = {}

    def start_pack(self, spec: PackSpec) -> None:
        assert spec.world_size == 1, "one process is one worker"

        def load() -> list[Event]:
            worker = self._workers[spec.pack] = self._factory(spec, ALONE)
            return [worker.load()]

        self._due[spec.pack] = load

    def advance(self, pack: int, directives: Sequence[Directive]) -> None:
        worker = self._workers[pack]
        self._due[pack] = lambda: worker.advance(directives)

    def poll(self, timeout_s: float) -> list[tuple[int, list[Event]]]:
        for pack, step in list(self._due.items()):  # the one that has waited longest
            del self._due[pack]
            events = answer(pack, step)
            if any(isinstance(event, PackLost) for event in events):
                self.stop_pack(pack)
            return [(pack, events)]
        return []

    def stop_pack(self, pack: int) -> None:
        self._workers.pop(pack, None)
        self._due.pop(pack, None)

    def close(self) -> None:
        self._workers.clear()
        self._due.clear()


def _lost(pack: int, error: Exception) -> PackLost:
    if is_disk_full(error):
        return PackLost(pack, "disk_full", f"{error}: free space, then resume")
    if isinstance(error, DataUnreachable | BaseModelUnreachable):
        return PackLost(pack, "worker_lost", str(error), unreachable=True)
    if isinstance(error, ConnectionError):  # a partner in the same pack
        return PackLost(pack, "worker_lost", str(error))
    if isinstance(error, TrialFailed):
        return PackLost(pack, error.reason, error.message)
    if isinstance(error, DataError):
        return PackLost(pack, "data_error", str(error))
    if is_out_of_memory(error):
        return PackLost(
            pack,
            "out_of_memory",
            f"{error}: lower trial.micro_batch_size, data.block_length or "
            "resources.slots_per_pack, or set trial.gradient_checkpointing: true, in a new sweep",
        )
    may_pass = not isinstance(error, OrchestratorError)
    return PackLost(pack, "raised", f"{type(error).__name__}: {error}", may_pass)

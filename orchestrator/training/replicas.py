"""The seam for what the workers of a pack do together: adding up and gathering tensors.

In: a worker's GroupPlace. Out: its Replicas. A worker that is alone takes the same path, and its
sums are what they were.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor

from orchestrator.errors import is_out_of_memory
from orchestrator.records import Device, GroupPlace
from orchestrator.training.process_group import PARTNER_TIMEOUT_S, join_group, leave_group
from orchestrator.training.watch import Watch

# At once: what is gathered may be more than the GPU has left.
GATHERED_ELEMENTS = 2**24
# Loads of a machine's workers stand in line, each of which may take minutes. One that hangs is
# noticed by its pack's silence, one that dies by Ray.
LOADING_PATIENCE = timedelta(days=1)


class Replicas(Protocol):
    world_rank: int
    world_size: int

    def loaded(self) -> None:
        """This worker has its base: wait for those that load theirs, however long it takes.

        Raises:
            ConnectionError: world_rank 0 is gone.
        """
        ...

    def sum(self, tensor: Tensor) -> None:
        """Replace the tensor by the sum over all workers, which gets the same bits everywhere.

        All workers must call this equally often, each time with equal shapes and types. On a GPU it
        is queued like a kernel.

        Raises:
            ConnectionError: a partner is gone, or did not come in time: says who. On a GPU this may
                come later, as the end of the process, whose log says who.
        """
        ...

    def gather(self, tensor: Tensor) -> Tensor | None:
        """All workers' tensors, [W, ...] on the CPU, for worker 0; None for the others.

        All workers must call this equally often, each time with equal shapes and types.

        Raises:
            ConnectionError: as `sum`.
        """
        ...

    def waiting(self) -> AbstractContextManager[None]:
        """Inside, this worker may wait for the others in collectives of a library's.

        Raises:
            ConnectionError: as `sum`.
        """
        ...

    def close(self) -> None:
        """Safe to call twice."""
        ...


def join(place: GroupPlace, device: Device, timeout_s: float = PARTNER_TIMEOUT_S) -> Replicas:
    """Meet the other workers of the pack; a process can do so for one pack at a time.

    Raises:
        ConnectionError: they did not all come in time, or cannot be reached.
    """
    if place.world_size == 1:
        return Alone()
    return ProcessGroupReplicas(place, device, timeout_s)


def agree(replicas: Replicas, number: int, device: torch.device) -> bool:
    """Whether all workers, which must all call this, have the same number; they all get the same
    answer. Numbers are alike exactly if they do not vary: the sum alone may be that of others."""
    sums = torch.tensor([number, number**2], dtype=torch.float64, device=device)
    replicas.sum(sums)
    total, squares = sums.tolist()
    return bool(squares * replicas.world_size == total**2)


class Alone:
    world_rank = 0
    world_size = 1

    def loaded(self) -> None:
        pass

    def sum(self, tensor: Tensor) -> None:
        pass

    def gather(self, tensor: Tensor) -> Tensor | None:
        return tensor.detach().cpu()[None]

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        pass


class ProcessGroupReplicas:
    def __init__(self, place: GroupPlace, device: Device, timeout_s: float) -> None:
        self.world_rank = place.world_rank
        self.world_size = place.world_size
        self._device = device
        self._watch: Watch | None = None
        with self.waiting():
            store = join_group(place, device, timeout_s)
            self._store, watched = store.clone(), store.clone()
        stuck = _end if device == "cuda" else None  # gloo raises
        self._watch = Watch(watched, place.world_rank, place.world_size, timeout_s, stuck)

    def loaded(self) -> None:
        names = [f"loaded/{rank}" for rank in range(self.world_size)]
        with self._named():  # not a place where somebody may be missing
            self._store.set(names[self.world_rank], "")
            self._store.wait(names, LOADING_PATIENCE)

    def sum(self, tensor: Tensor) -> None:
        with self.waiting():
            torch.distributed.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> Tensor | None:
        flat = tensor.detach().reshape(-1)
        gathered = torch.empty(self.world_size, len(flat), dtype=flat.dtype)
        for start in range(0, len(flat), GATHERED_ELEMENTS):
            part = flat[start : start + GATHERED_ELEMENTS].to(self._device)
            parts = [torch.empty_like(part) for _ in range(self.world_size)]
            with self.waiting():
                torch.distributed.all_gather(parts, part)
            for rank, other in enumerate(parts):
                gathered[rank, start : start + len(part)] = other
        return gathered.view(-1, *tensor.shape) if self.world_rank == 0 else None

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        leave_group()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A lost partner is no fault of this worker's: let its error say so, for the controller
        starts a pack again that was lost, and seeks the fault of one that raised among its
        trials."""
        if self._watch is not None:
            self._watch.came()
        with self._named():
            yield

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not _is_partners(error):
                raise
            text = str(error)
            missing = self._watch.missing() if self._watch and "imed out" in text else ""
            raise ConnectionError(
                f"worker {self.world_rank} of {self.world_size} has lost a partner: "
                f"{missing + ': ' if missing else ''}{text}"
            ) from error


def _is_partners(error: RuntimeError) -> bool:
    """gloo's errors have no type of their own, but name its source files. On a GPU any earlier
    kernel's error may come out of a collective, also as a RuntimeError; and NCCL may have no memory
    for its buffers."""
    lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
    return lost and not is_out_of_memory(error)


def _end(missing: str) -> None:
    """A GPU waits in vain, and the thread that waits for it cannot be told."""
    logging.getLogger(__name__).critical("%s: ending this process", missing)
    os._exit(1)

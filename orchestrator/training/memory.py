"""What a worker may use of its device's memory, and what it has used."""

import logging
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from orchestrator.records import Device

log = logging.getLogger(__name__)

# Linux counts ru_maxrss in KiB, macOS in bytes.
RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


# A segment that can grow is not cut into pieces that nothing fits into: on cards just as large as
# planned, six of 15 packs ran out of memory with 0.3 to 3.2 GiB of it in such pieces
# (benchmarks/results/planner_memory_first.json).
ALLOCATOR_SETTINGS = "expandable_segments:True"
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def cap_memory(fraction: float) -> None:
    """Beyond this part of its GPU the worker runs out of memory: an error that becomes a smaller
    plan, where it would else take what other processes on the GPU need. Comes before all that
    allocates there."""
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):  # the user's own settings stay
        # By a call, though there is no public one: a variable that is set here comes too late where
        # torch has read it already.
        torch._C._accelerator_setAllocatorSettings(ALLOCATOR_SETTINGS)
    torch.cuda.set_per_process_memory_fraction(fraction)


class Gauge(Protocol):
    """Of one worker's memory. Bytes."""

    def tensors(self) -> int:
        """The most that tensors took since the last call, or since the start."""
        ...

    def beside(self) -> int:
        """What is taken now beside the tensors."""
        ...

    def pools(self) -> int:
        """What recorded graphs keep now that is counted for no tensor."""
        ...


class PeakMemory:
    """The most that a worker held while each of its trials was in it. The gauge is read where a
    trial comes or goes, so that a step costs nothing."""

    def __init__(self, gauge: Gauge) -> None:
        self.tensor_bytes = 0
        """The most since the worker's start, of tensors alone."""
        self._gauge = gauge
        self._peaks: dict[int, int] = {}

    def join(self, slot: int) -> None:
        self._read()
        self._peaks[slot] = 0

    def leave(self, slot: int) -> int:
        """The peak of the trial that was in the slot."""
        self._read()
        return self._peaks.pop(slot)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While another program is built: what goes into its pool are still tensors, which must not
        be counted twice."""
        self._read()
        yield
        self._read(with_pools=False)

    def _read(self, with_pools: bool = True) -> None:
        tensors = self._gauge.tensors()
        self.tensor_bytes = max(self.tensor_bytes, tensors)
        if self._peaks:
            held = tensors + self._gauge.beside() + (self._gauge.pools() if with_pools else 0)
            self._peaks = {slot: max(peak, held) for slot, peak in self._peaks.items()}


def memory_gauge(device: Device) -> Gauge:
    return GpuGauge() if device == "cuda" else ProcessGauge()


class ProcessGauge:
    """On a CPU: the worker's process, whose peak the system never counts anew."""

    def tensors(self) -> int:
        return peak_memory_bytes("cpu")

    def beside(self) -> int:
        return 0

    def pools(self) -> int:
        return 0


class GpuGauge:
    """Beside the tensors: CUDA's context and loaded kernels. What paged optimizers keep is not
    counted: it may leave the GPU."""

    def __init__(self) -> None:
        self._outside = 0

    def tensors(self) -> int:
        found = peak_memory_bytes("cuda")
        torch.cuda.reset_peak_memory_stats()
        return found

    def beside(self) -> int:
        # Where pages of managed memory lie, here or on the host, the driver does not say.
        if not paged_bytes():
            self._outside = outside_bytes() or self._outside
        return self._outside

    def pools(self) -> int:
        return pool_bytes()[1]


def peak_memory_bytes(device: Device) -> int:
    """Most bytes held at once: of tensors on a GPU, since torch's counters were last reset; of the
    process on a CPU, since its start."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES


def pool_bytes() -> tuple[int, int]:
    """Bytes of the pools of recorded graphs, and of those what no tensor uses now: nobody else can
    use it. Needs a GPU."""
    private = [
        segment
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if tuple(segment["segment_pool_id"]) != (0, 0)
    ]
    total = sum(segment["total_size"] for segment in private)
    return total, total - sum(segment["allocated_size"] for segment in private)


def paged_bytes() -> list[int]:
    """Of all paged tensors that this process ever made: bitsandbytes 0.50 frees none."""
    from bitsandbytes.functional import GlobalPageManager

    paged = GlobalPageManager.get_instance().paged_tensors
    return [tensor.numel() * tensor.element_size() for tensor in paged]


def outside_bytes() -> int | None:
    """What the driver counts for this process without what torch's allocator holds: CUDA's context
    and loaded kernels. None where it does not tell this process's memory from that of others, as
    for a part of a GPU. Needs a GPU."""
    import pynvml

    try:
        with driver_handle() as handle:
            found: Any = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError as error:
        log.debug("the memory of CUDA's context is unknown: %s", error)
        return None
    here = [entry.usedGpuMemory for entry in found if entry.pid == os.getpid()]
    if not here and len(found) <= 1:  # in a container, under another number
        free, total = torch.cuda.mem_get_info()
        here = [total - free]
    if not here or not here[0]:
        return None
    return max(0, int(here[0]) - torch.cuda.memory_reserved())


@contextmanager
def driver_handle() -> Iterator[Any]:
    """What the driver is asked about this process's GPU by, whatever its number on the machine."""
    import pynvml

    pynvml.nvmlInit()
    try:
        uuid = torch.cuda.get_device_properties(0).uuid
        yield pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    finally:
        pynvml.nvmlShutdown()

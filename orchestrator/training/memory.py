"""What a worker may use of its device's memory, and what it has used."""

import os
import resource
import sys

import torch

from orchestrator.records import Device

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


def peak_memory_bytes(device: Device) -> int:
    """Most bytes held at once since the worker's start: of GPU memory, or resident on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES

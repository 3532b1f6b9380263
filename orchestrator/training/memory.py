"""What a worker may use of its device's memory, and what it has used."""

import resource
import sys

import torch

from orchestrator.records import Device

# Linux counts ru_maxrss in KiB, macOS in bytes.
RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


def cap_memory(fraction: float) -> None:
    """Beyond this part of its GPU the worker runs out of memory: an error that becomes a smaller
    plan, where it would else take what other processes on the GPU need."""
    torch.cuda.set_per_process_memory_fraction(fraction)


def peak_memory_bytes(device: Device) -> int:
    """Most bytes held at once since the worker's start: of GPU memory, or resident on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES

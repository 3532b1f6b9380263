"""What a worker has used of its device's memory."""

import resource
import sys

import torch

from orchestrator.records import Device

# Linux counts ru_maxrss in KiB, macOS in bytes.
RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


def peak_memory_bytes(device: Device) -> int:
    """Most bytes held at once since the worker's start: of GPU memory, or resident on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES

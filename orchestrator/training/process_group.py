"""DeepSpeed's start in a worker process: its accelerator, its process group, nothing compiled.

A group has one process as yet. Whoever makes it larger changes the store, rank and world size here.
"""

import atexit
import os
from typing import Any

import torch

from orchestrator.records import Device
from orchestrator.training.quiet import quiet_libraries


def start_deepspeed(device: Device) -> Any:
    """The imported module. The group is made once per process and lives as long."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # the device's number, which DeepSpeed insists on
    with quiet_libraries():
        import deepspeed
        from deepspeed import comm, ops
    if comm.is_initialized():
        return deepspeed
    backend = "nccl" if device == "cuda" else "gloo"
    # A store in memory needs no port and no file.
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    atexit.register(torch.distributed.destroy_process_group)
    with quiet_libraries():
        # A CPU operation that only inference with several processes uses; compiling it takes 35 s.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
    return deepspeed

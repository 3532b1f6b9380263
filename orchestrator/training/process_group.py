"""The torch process group of a worker, and DeepSpeed's start in it with nothing compiled.

A process has one default group: the one in which the workers of a pack meet, or else one of a
single process, which DeepSpeed insists on.
"""

import atexit
import os
import sys
from datetime import timedelta
from typing import Any, cast
from urllib.parse import urlsplit

import torch

from orchestrator.records import ALONE, Device, GroupPlace
from orchestrator.training.quiet import quiet_libraries

BACKENDS: dict[Device, str] = {"cpu": "gloo", "cuda": "nccl"}
# Partners wait for each other while one loads its base from a cold disk, compiles, or saves a
# checkpoint. A dead one is noticed sooner, by Ray; this is for one that is cut off or stuck. It is
# NCCL's own default.
PARTNER_TIMEOUT_S = 600.0
# NCCL ends the process without a name for who is missing: a Watch is to be first.
NCCL_PATIENCE = 1.1


def join_group(place: GroupPlace, device: Device, timeout_s: float = PARTNER_TIMEOUT_S) -> Any:
    """Make the default group; returns the store in which its processes met, once all are there."""
    options: dict[str, Any] = {}
    timeout = timedelta(seconds=timeout_s)
    store: Any
    if place.world_size == 1:
        # A store in memory needs no port and no file.
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    else:
        meeting = urlsplit(place.init_method)
        first = place.world_rank == 0
        store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
            cast(str, meeting.hostname), cast(int, meeting.port), place.world_size, first, timeout
        )
        if device == "cuda":  # connect now, not in the first collective
            options["device_id"] = torch.device("cuda", torch.cuda.current_device())
            timeout *= NCCL_PATIENCE
    torch.distributed.init_process_group(
        BACKENDS[device],
        rank=place.world_rank,
        world_size=place.world_size,
        timeout=timeout,
        store=store,
        **options,
    )
    atexit.register(leave_group)
    return store


def leave_group() -> None:
    """Safe to call twice."""
    atexit.unregister(leave_group)
    if torch.distributed.is_initialized():
        # DeepSpeed's own call lets go of the groups that it made, too.
        deepspeed = sys.modules.get("deepspeed.comm")
        started = deepspeed is not None and deepspeed.is_initialized()
        (deepspeed if started else torch.distributed).destroy_process_group()  # type: ignore[union-attr]


def start_deepspeed(device: Device) -> Any:
    """The imported module, started in the default group; once per process, for its life."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # the device's number, which DeepSpeed insists on
    with quiet_libraries():
        import deepspeed
        from deepspeed import comm, ops
    if comm.is_initialized():
        return deepspeed
    if not torch.distributed.is_initialized():
        join_group(ALONE, device)
    with quiet_libraries():
        # A CPU operation that only inference with several processes uses; compiling it takes 35 s.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=BACKENDS[device], auto_mpi_discovery=False)
    return deepspeed

"""What this machine may use: the cores, GPUs and memory given to this process, not all it has.

In: the affinity, cgroup limits and CUDA_VISIBLE_DEVICES of this process. Out: a Node. Imports no
torch: a dry run needs it too, and no process but a worker may initialise CUDA.
"""

import itertools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.planning.capacity import Node

NVIDIA_DEVICES = Path("/proc/driver/nvidia/gpus")
CGROUPS = Path("/sys/fs/cgroup")

log = logging.getLogger(__name__)


def this_machine() -> Node:
    visible = _visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    gpu_bytes, gpu_kind = gpus_here(visible)
    return Node(_num_cpus(), _num_gpus(visible), gpu_bytes, memory_bytes(CGROUPS), gpu_kind)


def gpus_here(visible: Sequence[str] | None = None) -> tuple[int, str]:
    """Memory of the GPU that has least, and the name that all have, of those `visible`, given as
    indices or UUIDs; None: of all. 0 and empty if NVIDIA's management library is absent or does not
    say, or if names differ."""
    if not any(NVIDIA_DEVICES.glob("*")):
        return 0, ""
    try:
        import pynvml  # of nvidia-ml-py; it asks the driver and leaves CUDA alone
    except ImportError:
        return 0, ""
    try:
        return ask_gpus(pynvml, visible)
    except (pynvml.NVMLError, ValueError) as error:  # ValueError: a name that is no index
        log.warning("the GPUs' memory is unknown: %s", error)
        return 0, ""


def ask_gpus(nvml: Any, visible: Sequence[str] | None) -> tuple[int, str]:
    """`nvml` is the pynvml module. Raises its NVMLError."""
    nvml.nvmlInit()
    try:
        if visible is None:
            visible = [str(index) for index in range(nvml.nvmlDeviceGetCount())]
        handles = [
            nvml.nvmlDeviceGetHandleByUUID(name)
            if name.startswith(("GPU-", "MIG-"))
            else nvml.nvmlDeviceGetHandleByIndex(int(name))
            for name in visible
        ]
        totals = [int(nvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles]
        names = {str(nvml.nvmlDeviceGetName(handle)) for handle in handles}
        return min(totals, default=0), names.pop() if len(names) == 1 else ""
    finally:
        nvml.nvmlShutdown()


def memory_bytes(cgroups: Path) -> int:
    """Of this machine, or what its container may use; 0 if unknown."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # a system without these names
        return 0
    for file in (cgroups / "memory.max", cgroups / "memory" / "memory.limit_in_bytes"):
        try:
            return min(total, int(file.read_text()))
        except (OSError, ValueError):  # no cgroup of this version, or the limit is `max`
            continue
    return total


def _num_cpus() -> int:
    # sched_getaffinity is Linux's alone.
    given = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1))(0)
    return max(1, int(min(len(given), _cgroup_cpus())))


def _cgroup_cpus() -> float:
    """The quota of a container, such as `docker run --cpus 4` sets."""
    new, old = CGROUPS / "cpu.max", CGROUPS / "cpu"
    try:
        if new.exists():
            quota, period = new.read_text().split()
        else:
            quota = (old / "cpu.cfs_quota_us").read_text()
            period = (old / "cpu.cfs_period_us").read_text()
        cpus = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # no cgroup, or the quota is `max`
        return float("inf")
    return cpus if cpus > 0 else float("inf")  # -1 is no quota


def _num_gpus(visible: Sequence[str] | None) -> int:
    there = len(list(NVIDIA_DEVICES.glob("*")))
    return there if visible is None else min(there, len(visible))


def _visible_gpus(setting: str | None) -> list[str] | None:
    """Of CUDA_VISIBLE_DEVICES; None where all are visible."""
    if setting is None:
        return None
    names = [name.strip() for name in setting.split(",")]
    # CUDA stops at the first that is none.
    return list(itertools.takewhile(lambda name: name not in ("", "-1", "NoDevFiles"), names))

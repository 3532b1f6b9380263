"""What this machine may use: the CPU cores and GPUs that this process was given, not all it has.

In: the affinity, cgroup limits and CUDA_VISIBLE_DEVICES of this process. Out: a Node. Imports no
torch: a dry run needs the count too.
"""

import os
from pathlib import Path

from orchestrator.planning.capacity import Node

NVIDIA_DEVICES = Path("/proc/driver/nvidia/gpus")
CGROUPS = Path("/sys/fs/cgroup")


def this_machine() -> Node:
    return Node(_num_cpus(), _num_gpus())


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


def _num_gpus() -> int:
    there = len(list(NVIDIA_DEVICES.glob("*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return there
    count = 0
    for device in visible.split(","):
        if device.strip() in ("", "-1", "NoDevFiles"):  # CUDA stops at the first that is none
            break
        count += 1
    return min(there, count)

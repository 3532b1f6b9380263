"""How much of their CPUs, memory and GPUs the machines of a sweep use while it trains.

A thread takes a sample of every node now and then and appends it to system/NODE.jsonl in the run
folder, from where it is shown. In: a function that samples nodes. Names of values are those of
MLflow's system metrics (3.17, mlflow/system_metrics), so that its UI knows them. Imports psutil and
pynvml inside functions.
"""

import logging
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.files import append_json_line
from orchestrator.planning.machine import NVIDIA_DEVICES

EVERY_S = 10.0
MEGABYTE = 1e6

Values = dict[str, float]
SampleNodes = Callable[[], dict[str, Values]]
"""Values by the name of the node."""

log = logging.getLogger(__name__)


def sample_this_node() -> dict[str, Values]:
    return {platform.node(): sample()}


@contextmanager
def recorded_use(
    folder: Path, sample_nodes: SampleNodes = sample_this_node, every_s: float = EVERY_S
) -> Iterator[None]:
    """Inside, samples are taken; `folder` is the run folder."""
    stopped = threading.Event()

    def follow() -> None:
        first = _last_steps(folder)
        while True:
            for node, values in sample_nodes().items():
                step = first[node] = first.get(node, -1) + 1
                row = {"time": time.time(), "step": step, "values": values}
                try:
                    append_json_line(folder / "system" / f"{node}.jsonl", row)
                except OSError as error:  # such as a full disk, of which others tell
                    log.warning("the machines' use is no longer recorded: %s", error)
                    return
            if stopped.wait(every_s):
                return

    thread = threading.Thread(target=follow, name="machine use", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(every_s)


def sample() -> Values:
    import psutil

    memory, disk, network = (
        psutil.virtual_memory(),
        psutil.disk_usage("/"),
        psutil.net_io_counters(),
    )
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_megabytes": disk.used / MEGABYTE,
        "disk_usage_percentage": disk.percent,
        "network_receive_megabytes": network.bytes_recv / MEGABYTE,
        "network_transmit_megabytes": network.bytes_sent / MEGABYTE,
    }
    return values | _gpus()


def _gpus() -> Values:
    if not any(NVIDIA_DEVICES.glob("*")):
        return {}
    try:
        import pynvml  # of nvidia-ml-py; it asks the driver and leaves CUDA alone
    except ImportError:
        return {}
    values: Values = {}
    try:
        pynvml.nvmlInit()
        try:
            for index in range(pynvml.nvmlDeviceGetCount()):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
                busy = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
                watts = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
                values |= {
                    f"gpu_{index}_memory_usage_percentage": 100 * memory.used / memory.total,
                    f"gpu_{index}_memory_usage_megabytes": memory.used / MEGABYTE,
                    f"gpu_{index}_utilization_percentage": float(busy),
                    f"gpu_{index}_power_usage_watts": watts,
                }
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:  # a GPU may not say all of it
        log.debug("the GPUs' use is unknown: %s", error)
    return values


def _last_steps(folder: Path) -> dict[str, int]:
    """Of a sweep that is resumed: samples are numbered on."""
    counts = {}
    for path in (folder / "system").glob("*.jsonl"):
        with path.open("rb") as file:
            counts[path.stem] = sum(1 for _ in file) - 1
    return counts

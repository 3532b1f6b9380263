"""Start a local Ray or attach to a running one, and say what it has.

In: an address or None. Out: ClusterResources while the context lasts. A local Ray that was started
here is ended here; it also ends when this process is killed.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ClusterError

# Nothing large travels through Ray's object store: stages hand over files. 80 MB is near its least.
LOCAL_OBJECT_STORE_BYTES = 80 * 2**20


@dataclass(frozen=True)
class ClusterResources:
    num_cpus: int
    num_gpus: int
    num_nodes: int

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus else "cpu"


@contextmanager
def ray_cluster(address: str | None) -> Iterator[ClusterResources]:
    """Attach to `address` (or RAY_ADDRESS; `auto` finds a running one), else start a local Ray.

    Raises:
        ClusterError: Ray cannot be reached or started.
    """
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    # Ray 2.60 warns on every start about a future default for actors without GPUs.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "configure_logging": True,
    }
    try:
        if address:
            ray.init(address=address, namespace="orchestrator", **quiet)
        else:
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                namespace="orchestrator",
                **quiet,
            )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
        place = f"the Ray cluster at {address}" if address else "a local Ray"
        remedy = (
            "check --ray-address and RAY_ADDRESS, or leave both out to start a local Ray"
            if address
            else "see the logs in /tmp/ray/session_latest/logs"
        )
        raise ClusterError(f"cannot use {place}: {error}: {remedy}") from error
    try:
        total = ray.cluster_resources()
        yield ClusterResources(int(total.get("CPU", 0)), int(total.get("GPU", 0)), len(ray.nodes()))
    finally:
        ray.shutdown()

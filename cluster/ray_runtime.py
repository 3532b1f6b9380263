"""Start a local Ray or attach to a running one, and say what it has.

In: an address or None. Out: its nodes while the context lasts. A local Ray that was started
here is ended here; it also ends when this process is killed.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.errors import ClusterError
from orchestrator.planning.capacity import Node
from orchestrator.planning.machine import this_machine

# Nothing large travels through Ray's object store: stages hand over files. 80 MB is near its least.
LOCAL_OBJECT_STORE_BYTES = 80 * 2**20


@contextmanager
def ray_cluster(address: str | None) -> Iterator[list[Node]]:
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
                num_cpus=int(this_machine().num_cpus),  # Ray 2.60 does not honour CPU affinity
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
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield [Node(found.get("CPU", 0), found.get("GPU", 0)) for found in resources]
    finally:
        ray.shutdown()

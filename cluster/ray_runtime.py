"""Start a local Ray or attach to a running one, and say what it has.

In: an address or None. Out: its nodes while the context lasts. A local Ray that was started
here is ended here; it also ends when this process is killed.

Ray counts cores and GPUs, but does not say how much memory a GPU has: each node of a cluster is
asked by a task that takes neither.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ClusterError, NeverStarted
from orchestrator.planning.capacity import Node
from orchestrator.planning.machine import gpus_here, this_machine

# Nothing large travels through Ray's object store: stages hand over files. 80 MB is near its least.
LOCAL_OBJECT_STORE_BYTES = 80 * 2**20
# A node's first task starts a process and imports Ray there: some seconds, more on a busy node.
MEMORY_TIMEOUT_S = 60.0

ROOM_POLL_S = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Awaited:
    """Workers that a cluster which grows by itself must have room for before the work begins."""

    num_workers: int
    cpus: int
    gpus: int
    """Of one worker."""
    timeout_s: float


def running_cluster(address: str | None) -> str | None:
    """The cluster that a command's `address` means; None where it has to start a Ray of its own."""
    if address in (None, "", "auto"):
        # Ray's own `auto` takes the last cluster that was started on this machine, even from within
        # a job of another one.
        return os.environ.get("RAY_ADDRESS") or address or None
    return address


@contextmanager
def ray_cluster(address: str | None, awaited: Awaited | None = None) -> Iterator[list[Node]]:
    """Attach to `address` (or RAY_ADDRESS; `auto` finds a running one), else start a local Ray.

    Raises:
        ClusterError: Ray cannot be reached or started; NeverStarted: it has no room for what is
            awaited.
    """
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    # Ray 2.60 warns on every start about a future default for actors without GPUs.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    address = running_cluster(address)
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
        if awaited is not None:
            _await_room(awaited)
        yield _nodes(asks=bool(address))
    finally:
        ray.shutdown()


def release_room() -> None:
    """Let the autoscaler take nodes that nothing runs on."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[])


def _await_room(awaited: Awaited) -> None:
    import ray
    from ray.autoscaler.sdk import request_resources

    worker = {"CPU": awaited.cpus} | ({"GPU": awaited.gpus} if awaited.gpus else {})
    request_resources(bundles=[worker] * awaited.num_workers)
    deadline = time.monotonic() + awaited.timeout_s
    while True:
        totals = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(min(int(has.get(k, 0) // n) for k, n in worker.items()) for has in totals)
        if room >= awaited.num_workers:
            return
        if time.monotonic() >= deadline:
            raise NeverStarted(
                f"the cluster has room for {room} of {awaited.num_workers} workers of {worker} "
                f"after {awaited.timeout_s:.0f} s: ask for fewer, or see why no node is added"
            )
        time.sleep(ROOM_POLL_S)


def _nodes(asks: bool) -> list[Node]:
    """The nodes that are alive; their memory from a task on each of them, or this machine's."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    if asks:
        memories = _memories([node["NodeID"] for node in alive])
    else:
        machine = this_machine()
        memories = [(machine.gpu_memory_bytes, machine.memory_bytes)] * len(alive)
    return [
        Node(
            node["Resources"].get("CPU", 0),
            node["Resources"].get("GPU", 0),
            *memory,
            gpu_kind=accelerator(node["Resources"]),
        )
        for node, memory in zip(alive, memories, strict=True)
    ]


def accelerator(resources: Mapping[str, float]) -> str:
    """H100 of `accelerator_type:H100`, which Ray gives a node with such GPUs."""
    kinds = (name.partition(":")[2] for name in resources if name.startswith("accelerator_type:"))
    return next(kinds, "")


def _memories(node_ids: Sequence[str]) -> list[tuple[int, int]]:
    """Each node's least GPU memory and its own memory, in bytes; 0 where a node does not answer."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(_memory_here)
    asked = [
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote()
        for node_id in node_ids
    ]
    ray.wait(asked, num_returns=len(asked), timeout=MEMORY_TIMEOUT_S)
    memories = []
    for node_id, reference in zip(node_ids, asked, strict=True):
        try:
            memories.append(ray.get(reference, timeout=0))
        except RayError as error:  # it is gone, too busy, or has another version of this project
            log.warning("node %s does not say how much memory it has: %s", node_id, error)
            ray.cancel(reference, force=True)
            memories.append((0, 0))
    return memories


def _memory_here() -> tuple[int, int]:
    # Ray hides all GPUs from a task that takes none: all of the node's are looked at.
    return gpus_here()[0], this_machine().memory_bytes

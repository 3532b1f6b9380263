"""Ray clusters of several nodes on this machine: each node is a raylet of its own."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import ray
from ray._private.state import available_resources_per_node
from ray.cluster_utils import Cluster

from orchestrator.records import Event, GroupPlace, PackReady, PackSpec
from orchestrator.sweep.simulated import SimulatedWorker, _SimulatedSlot

OBJECT_STORE_BYTES = 80 * 2**20
ACCELERATORS = {2: "H100", 1: "A100"}
"""By a node's cores, what it says that its GPUs are, of which it has none."""


class LocalCluster:
    """A head that trains nothing, as on Kubernetes, and worker nodes; nodes are named by their ids.

    What it says about sizes and free cores needs this process to be a driver of the cluster.
    """

    def __init__(self) -> None:
        head = {
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_system_config": {"metrics_report_interval_ms": 500},  # 10 s else
        }
        self._cluster = Cluster(initialize_head=True, head_node_args=head)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, num_cpus: int) -> None:
        kind = {f"accelerator_type:{ACCELERATORS[num_cpus]}": 1} if num_cpus in ACCELERATORS else {}
        self._cluster.add_node(
            num_cpus=num_cpus, object_store_memory=OBJECT_STORE_BYTES, resources=kind
        )

    def node_ids(self) -> list[str]:
        return [node.node_id for node in self._cluster.worker_nodes]

    def of_size(self, num_cpus: int) -> str:
        (found,) = [node for node, cpus in self._sizes().items() if cpus == num_cpus]
        return found

    def missing(self, sizes: Sequence[int]) -> list[int]:
        """Of these, the sizes that no node has."""
        return list((Counter(sizes) - Counter(self._sizes().values())).elements())

    def is_free(self, node: str) -> bool:
        """Whether nothing holds any of its cores."""
        available = available_resources_per_node().get(node, {})
        return bool(available.get("CPU", 0) == self._sizes()[node])

    def exported_metrics(self) -> str:
        """What Prometheus would read of the head, where this driver is."""
        port = self._cluster.head_node.metrics_export_port
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            return str(response.read().decode())

    def kill(self, node: str) -> None:
        """As if its machine lost power."""
        self._cluster.remove_node(self._node(node), allow_graceful=False)

    def remove(self, node: str) -> None:
        """As a cluster that scales down does it."""
        self._cluster.remove_node(self._node(node))

    def lose_power(self) -> None:
        """Every process of every node, the head's first."""
        for node in self._cluster.list_all_nodes():
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        self._cluster.worker_nodes.clear()
        self._cluster.head_node = None

    def shutdown(self) -> None:
        if self._cluster.head_node is not None:
            self._cluster.shutdown()

    def _node(self, node_id: str) -> Any:
        (found,) = [node for node in self._cluster.worker_nodes if node.node_id == node_id]
        return found

    def _sizes(self) -> dict[str, int]:
        cpus = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in ray.nodes()}
        return {node: cpus[node] for node in self.node_ids()}


@contextmanager
def local_cluster(*sizes: int) -> Iterator[LocalCluster]:
    """Worker nodes of so many CPU cores each."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    cluster = LocalCluster()
    try:
        for num_cpus in sizes:
            cluster.add(num_cpus)
        yield cluster
    finally:
        cluster.shutdown()


HELD = "held"
HELD_AFTER_STEPS = 8


class NotingWorker(SimulatedWorker):
    """Leaves a file PACK-WORLD_RANK in `folder` with the node that it is on.

    While there is a file HELD, a trial stops after HELD_AFTER_STEPS: so a sweep has a middle that
    lasts until a test has done there what it must, however slow the machine.
    """

    def __init__(self, spec: PackSpec, place: GroupPlace, folder: Path) -> None:
        super().__init__(spec, place)
        self._file = folder / f"{spec.pack}-{place.world_rank}"
        self._held = folder / HELD

    def load(self) -> PackReady:
        self._file.write_text(node_here())
        return super().load()

    def _step(self, slot: _SimulatedSlot) -> list[Event]:
        while slot.step >= HELD_AFTER_STEPS and self._held.exists():
            time.sleep(0.02)
        return super()._step(slot)


def node_here(_: object = None) -> str:
    """Id of the node that this process is on."""
    time.sleep(0.2)  # so that one actor cannot take all tasks of a test
    return str(ray.get_runtime_context().get_node_id())

"""How many workers fit the machines, and their memory, node by node: a worker never spans two.

In: resources, the device, and each node's CPU cores, GPUs and memory. Out: the number of workers,
and the least memory that one of them has. Pure.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config import ResourcesConfig
from orchestrator.errors import ConfigError


@dataclass(frozen=True)
class Node:
    num_cpus: float
    num_gpus: float
    gpu_memory_bytes: int = 0
    """Of each GPU; the least where they differ. 0: unknown."""
    memory_bytes: int = 0
    """Of the node itself, as far as it may be used. 0: unknown."""
    gpu_kind: str = ""
    """As Ray or the driver calls its GPUs. Empty: unknown."""


def worker_count(resources: ResourcesConfig, device: str, nodes: Sequence[Node]) -> int:
    """`resources.num_workers`, else all that fit; `device` is cpu or cuda.

    Raises:
        ConfigError: fewer fit than are asked for, or than one pack needs, or none at all.
    """
    per_worker, wanted = resources.cpus_per_worker, resources.num_workers
    fitting = sum(fitting_workers(node, per_worker, device) for node in nodes)
    if fitting and (wanted is None or wanted <= fitting):
        check_pack_fits(resources, {"": wanted or fitting})
        return wanted or fitting
    if device == "cuda" and not any(node.num_gpus >= 1 for node in nodes):
        raise ConfigError("resources.device: cuda, but there is no GPU: set auto or cpu")
    there = _described(nodes, device)
    gpu = " and 1 GPU" if device == "cuda" else ""
    if fitting:
        raise ConfigError(
            f"resources: {wanted} workers of {_cores(per_worker)}{gpu} do not fit "
            f"{there}: {fitting} fit: lower num_workers or cpus_per_worker"
        )
    remedy = f"lower cpus_per_worker={per_worker}" if per_worker > 1 else "give Ray CPU cores"
    raise ConfigError(f"resources: no worker of {_cores(per_worker)}{gpu} fits {there}: {remedy}")


def check_pack_fits(resources: ResourcesConfig, counts: Mapping[str, int]) -> None:
    """`counts` of the workers of each kind, by its name: a pack has workers of one.

    Raises:
        ConfigError: a pack is to have more workers than there are of any kind.
    """
    needed = resources.workers_per_pack or 1
    most = max(counts.values())
    if needed <= most:
        return
    there = "there is 1" if most == 1 else f"there are {most}"
    alike = ""
    if len(counts) > 1:
        alike = " of one kind of GPU"
        there = "there are " + " and ".join(f"{count} x {name}" for name, count in counts.items())
    raise ConfigError(
        f"resources.workers_per_pack={needed} needs as many workers{alike}, but {there}: "
        f"set it to {most} or less"
    )


def check_step_program(resources: ResourcesConfig, device: str) -> None:
    """Raises ConfigError if the device cannot run it."""
    if resources.step_program == "graph" and device == "cpu":
        raise ConfigError(
            "resources.step_program: graph needs GPUs, but the device is cpu: set auto or compiled"
        )


def worker_memory_bytes(
    resources: ResourcesConfig, device: str, nodes: Sequence[Node], num_workers: int
) -> int:
    """Memory of the worker that has least, on whichever nodes the workers will run; 0 if a node's
    is unknown. On a CPU the workers of a node share its memory evenly."""
    if device != "cuda":
        return _part_of_node_bytes(resources, device, nodes, num_workers)
    per_worker = resources.cpus_per_worker
    fitting = [node for node in nodes if fitting_workers(node, per_worker, device)]
    return min((node.gpu_memory_bytes for node in fitting), default=0)


def host_memory_bytes(resources: ResourcesConfig, nodes: Sequence[Node], num_workers: int) -> int:
    """A GPU worker's part of its node's own memory, which the node's workers share evenly: the
    least; 0 if a node's is unknown."""
    return _part_of_node_bytes(resources, "cuda", nodes, num_workers)


def _part_of_node_bytes(
    resources: ResourcesConfig, device: str, nodes: Sequence[Node], num_workers: int
) -> int:
    fitting = [(node, fitting_workers(node, resources.cpus_per_worker, device)) for node in nodes]
    parts = [node.memory_bytes // min(count, num_workers) for node, count in fitting if count]
    return min(parts, default=0)


def fitting_workers(node: Node, cpus_per_worker: int, device: str) -> int:
    by_cpus = int(node.num_cpus // cpus_per_worker)
    return min(by_cpus, int(node.num_gpus)) if device == "cuda" else by_cpus


def _described(nodes: Sequence[Node], device: str) -> str:
    """`2 nodes of 8 CPU cores, 1 node of 4 CPU cores`."""
    kinds = Counter(
        _cores(node.num_cpus) + (f" and {node.num_gpus:g} GPUs" if device == "cuda" else "")
        for node in nodes
    )
    return (
        ", ".join(
            f"{count} node{'s' if count > 1 else ''} of {kind}" for kind, count in kinds.items()
        )
        or "0 nodes"
    )


def _cores(count: float) -> str:
    return f"{count:g} CPU core" + ("" if count == 1 else "s")

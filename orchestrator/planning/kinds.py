"""Kinds of workers: those of one sweep may have different GPUs.

In: nodes. Out: WorkerKinds, the fastest first. Pure, no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config import ResourcesConfig
from orchestrator.planning.capacity import Node, fitting_workers, host_memory_bytes
from orchestrator.planning.gpus import Gpu, find_gpu, relative_speed


@dataclass(frozen=True)
class WorkerKind:
    """Workers that are alike: a pack has workers of one kind, and is planned for it."""

    name: str
    """As Ray calls the accelerator, such as H100."""
    count: int
    memory_bytes: int
    """Of the one that has least."""
    speed: float = 1.0
    """Relative to the others."""
    host_memory_bytes: int = 0
    """A worker's part of its node's own memory, the least. 0: unknown."""
    limit: int | None = None
    """Of `count`, those that the sweep may use now, where others on its cluster claim some too."""
    queued: int = 0
    """Of `count`, those that packs wait for in Ray's queue: lost, or held by somebody else."""

    @property
    def usable(self) -> int:
        return self.count if self.limit is None else min(self.count, self.limit)

    @property
    def at_hand(self) -> int:
        return max(0, self.usable - self.queued)


def longest_for(
    kind: WorkerKind, num_slots: int, kinds: Sequence[WorkerKind], work_left: int
) -> float:
    """Blocks of the longest trial that a pack of this kind should still begin: a longer one would
    end sooner if it waited until faster workers have trained all that waits before it."""
    faster = [other for other in kinds if other.speed > kind.speed and other.at_hand]
    if not faster:
        return math.inf
    capacity = sum(other.at_hand * other.speed for other in faster)
    best = max(other.speed for other in faster)
    return work_left / (capacity * num_slots * (1 / kind.speed - 1 / best))


ALIKE = WorkerKind("", 0, 0)
"""Of all workers, where there is one kind: the premises say what they have."""


def worker_kinds(
    resources: ResourcesConfig, nodes: Sequence[Node], num_workers: int
) -> tuple[WorkerKind, ...]:
    """Of the `num_workers` GPUs that are used, the fastest first; empty where all are alike."""
    names = {node.gpu_kind for node in nodes if node.num_gpus >= 1}
    if len(names) < 2:
        return ()
    kinds = []
    left = num_workers
    for name in sorted(names, key=lambda name: (-relative_speed(name), name)):
        mine = [node for node in nodes if node.gpu_kind == name and node.num_gpus >= 1]
        there = sum(fitting_workers(node, resources.cpus_per_worker, "cuda") for node in mine)
        count = min(left, there)
        if count:
            memory_bytes = min(node.gpu_memory_bytes for node in mine)
            host_bytes = host_memory_bytes(resources, mine, count)
            kinds.append(WorkerKind(name, count, memory_bytes, relative_speed(name), host_bytes))
            left -= count
    return tuple(kinds)


def known_gpus(nodes: Sequence[Node]) -> dict[str, Gpu]:
    """By the name of the workers' kind, as worker_kinds has it, of those that gpus.py knows."""
    names = {node.gpu_kind for node in nodes if node.num_gpus >= 1}
    return {
        name if len(names) > 1 else ALIKE.name: gpu for name in names if (gpu := find_gpu(name))
    }

"""Samples of the other nodes of a Ray cluster: an actor on each of them, which takes no core.

Out: a function for orchestrator.sweep.machine_use.recorded_use. A node that does not answer in time
is left out of that sample.
"""

import platform
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.sweep.machine_use import SampleNodes, Values, sample, sample_this_node

ANSWER_TIMEOUT_S = 5.0


class _Sampler:
    def sample(self) -> tuple[str, Values]:
        return platform.node(), sample()


def node_sampler() -> SampleNodes:
    """Of this node by a plain call; call it while Ray is there."""
    here = ray.get_runtime_context().get_node_id()
    actor = ray.remote(num_cpus=0, max_restarts=-1)(_Sampler)
    others: list[Any] = [
        actor.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here
    ]

    def sample_nodes() -> dict[str, Values]:
        found = sample_this_node()
        asked = [actor.sample.remote() for actor in others]
        ready, _ = (
            ray.wait(asked, num_returns=len(asked), timeout=ANSWER_TIMEOUT_S) if asked else ([], [])
        )
        for reference in ready:
            try:
                node, values = ray.get(reference)
            except RayError:  # the node is gone
                continue
            found[node] = values
        return found

    return sample_nodes

"""An adapter's rank and scaling, layer by layer.

In: an AdapterConfig and layer names. Out: numbers. Pure.
"""

import math

from orchestrator.config import AdapterConfig
from orchestrator.planning.patterns import matched


def rank_of(adapter: AdapterConfig, layer: str) -> int:
    key = matched(adapter.rank_pattern, layer)
    return adapter.rank if key is None else adapter.rank_pattern[key]


def alpha_of(adapter: AdapterConfig, layer: str) -> float:
    key = matched(adapter.alpha_pattern, layer)
    return adapter.alpha if key is None else adapter.alpha_pattern[key]


def scaling_of(adapter: AdapterConfig, layer: str) -> float:
    """What the layer's update is multiplied by."""
    rank = rank_of(adapter, layer)
    return alpha_of(adapter, layer) / (math.sqrt(rank) if adapter.rslora else rank)


def largest_rank(adapter: AdapterConfig) -> int:
    return max(adapter.rank, *adapter.rank_pattern.values(), 0)

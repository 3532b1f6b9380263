"""An adapter's rank and scaling, layer by layer.

In: an AdapterConfig and layer names. Out: numbers. Pure.
"""

import math
from collections.abc import Iterable

from orchestrator.config import AdapterConfig
from orchestrator.planning.patterns import matched, unmatched
from orchestrator.planning.shape import BaseShape

BYTES_PER_SAVED_PARAM = 4  # adapters are saved in fp32


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


def idle_patterns(adapter: AdapterConfig, targets: Iterable[str]) -> list[str]:
    """What is to be said of keys of patterns that match none of the layers it targets."""
    names = list(targets)
    return [
        f"adapter.{field}: {key!r} matches no layer that adapter.target_modules names: leave it "
        "out, or name the layer there"
        for field in ("rank_pattern", "alpha_pattern")
        for key in unmatched(getattr(adapter, field), names)
    ]


def saved_bytes(adapter: AdapterConfig, shape: BaseShape) -> int:
    """Of the adapter's weights, without the file's header."""
    layers = shape.targets(adapter.target_modules)
    params = sum(
        rank_of(adapter, layer.name) * (layer.in_features + layer.out_features) for layer in layers
    )
    params += sum(layer.out_features for layer in layers) if adapter.use_dora else 0
    return BYTES_PER_SAVED_PARAM * params


def largest_rank(adapter: AdapterConfig) -> int:
    return max(adapter.rank, *adapter.rank_pattern.values(), 0)

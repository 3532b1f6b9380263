"""Bits for each layer under a memory budget: those with which the base loses least.

In: what each layer's loss of bits costs, measured by training/sensitivity.py, and a QuantConfig
with bit_width auto. Out: an Allocation. Pure, no torch; scipy, imported where it is used, finds
one width a layer, with the least sum of losses, to a ten-thousandth, within the budget.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from orchestrator.config import QuantConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.bits import GIB, bits_of, stored_bits
from orchestrator.planning.patterns import as_pattern
from orchestrator.planning.shape import BaseShape, Linear

WIDTHS = (4, 8, 16)
# Of a base in 32 bits, where the arithmetic is float32: an average counts those values as 16 bits.
AVERAGE_DTYPE_BYTES = 2


@dataclass(frozen=True)
class LayerLoss:
    """What a layer's bits cost the base."""

    name: str
    num_params: int
    loss_increase: Mapping[int, float]
    """Bits -> expected increase of the loss of a token, in nats."""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "LayerLoss":
        increases = {int(bits): value for bits, value in record["loss_increase"].items()}
        return cls(record["name"], record["num_params"], increases)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Allocation:
    bit_width_pattern: dict[str, int]
    """Of all layers."""
    average_bits: float
    """That a weight takes, constants included."""
    num_layers: dict[str, int]
    """Layers by their bits."""
    loss_increase: float
    """Expected, in nats a token, against 16 bits everywhere."""
    loss_increase_uniform: dict[str, float]
    """The same with as many bits everywhere."""

    @property
    def reason(self) -> str:
        counts = ", ".join(f"{count} at {bits} bits" for bits, count in self.num_layers.items())
        four = self.loss_increase_uniform["4"]
        return (
            f"{counts}: {self.average_bits:.3f} bits a weight, expected loss "
            f"+{self.loss_increase:.2g} against +{four:.2g} with 4 bits everywhere"
        )

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Allocation":
        return cls(**{field.name: record[field.name] for field in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def allocate(
    quant: QuantConfig, layers: Sequence[LayerLoss], plain_bytes: int, dtype_bytes: int
) -> Allocation:
    """`plain_bytes` of the base are those that no bit-width touches.

    Raises:
        ConfigError: the budget is less than the layers take at the fewest bits that they may have.
    """
    num_params = sum(layer.num_params for layer in layers)
    choices, costs, budget = _within_budget(quant, layers, plain_bytes, dtype_bytes)
    widths = _least_loss(layers, choices, costs, budget)
    stored = {width: stored_bits(quant, width, AVERAGE_DTYPE_BYTES) for width in WIDTHS}
    average = sum(layer.num_params * stored[widths[layer.name]] for layer in layers) / num_params
    counts = Counter(widths.values())
    return Allocation(
        as_pattern(widths),
        average,
        {str(bits): counts[bits] for bits in sorted(counts)},
        total_increase(layers, widths),
        {str(bits): total_increase(layers, dict.fromkeys(widths, bits)) for bits in WIDTHS},
    )


def total_increase(layers: Iterable[LayerLoss], widths: Mapping[str, int]) -> float:
    return math.fsum(layer.loss_increase[widths[layer.name]] for layer in layers)


def resolved(quant: QuantConfig, allocation: Allocation) -> QuantConfig:
    """With every layer's bits said, so that whoever loads the base again makes the same."""
    return QuantConfig.model_validate(
        quant.model_dump()
        | {
            "bit_width_pattern": allocation.bit_width_pattern,
            "average_bits": round(allocation.average_bits, 3),
            "budget_gib": None,
        }
    )


def check_budget(quant: QuantConfig, shape: BaseShape, dtype_bytes: int) -> None:
    """Before anything is measured.

    Raises:
        ConfigError: the budget is less than the fewest bits take.
    """
    _within_budget(quant, shape.linears, shape.num_plain_params * dtype_bytes, dtype_bytes)


def _within_budget(
    quant: QuantConfig, layers: Sequence[Linear | LayerLoss], plain_bytes: int, dtype_bytes: int
) -> tuple[dict[str, tuple[int, ...]], dict[int, float], float]:
    """Each layer's widths, what a weight takes at each, and the bits that all may take."""
    if quant.budget_gib is None:
        assert quant.average_bits is not None
        num_params = sum(layer.num_params for layer in layers)
        dtype_bytes, budget = AVERAGE_DTYPE_BYTES, quant.average_bits * num_params
    else:
        budget = 8 * (quant.budget_gib * GIB - plain_bytes)
    costs = {bits: stored_bits(quant, bits, dtype_bytes) for bits in WIDTHS}
    choices = {layer.name: _choices(quant, layer.name) for layer in layers}
    _check_budget(quant, layers, choices, costs, budget, plain_bytes)
    return choices, costs, budget


def _choices(quant: QuantConfig, name: str) -> tuple[int, ...]:
    """A layer that the user gave bits keeps them."""
    bits = bits_of(quant, name)
    return WIDTHS if bits is None else (bits,)


def _check_budget(
    quant: QuantConfig,
    layers: Sequence[Linear | LayerLoss],
    choices: Mapping[str, Sequence[int]],
    costs: Mapping[int, float],
    budget: float,
    plain_bytes: int,
) -> None:
    least = sum(layer.num_params * costs[min(choices[layer.name])] for layer in layers)
    if least <= budget:
        return
    given = ", ".join(f"{name}: {bits}" for name, bits in quant.bit_width_pattern.items())
    fewest = "at the fewest" + (f" with quant.bit_width_pattern={{{given}}}" if given else "")
    if quant.budget_gib is None:
        average = least / sum(layer.num_params for layer in layers)
        raise ConfigError(
            f"quant.average_bits={quant.average_bits:g} is less than the {average:.3f} bits that a "
            f"weight takes {fewest}: set quant.average_bits to {_up(average)} or more"
        )
    gib = (least / 8 + plain_bytes) / GIB
    raise ConfigError(
        f"quant.budget_gib={quant.budget_gib:g} is less than the {gib:.3f} GiB that the base takes "
        f"{fewest.replace('fewest', 'fewest bits', 1)}: set quant.budget_gib to {_up(gib)} or more"
    )


def _up(value: float) -> float:
    return math.ceil(value * 1000) / 1000


def _least_loss(
    layers: Sequence[LayerLoss],
    choices: Mapping[str, Sequence[int]],
    costs: Mapping[int, float],
    budget: float,
) -> dict[str, int]:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    options = [(place, bits) for place, layer in enumerate(layers) for bits in choices[layer.name]]
    losses = np.array([layers[place].loss_increase[bits] for place, bits in options])
    sizes = np.array([layers[place].num_params * costs[bits] for place, bits in options])
    one_each = np.zeros((len(layers), len(options)))
    one_each[[place for place, _ in options], range(len(options))] = 1
    found = milp(
        losses / (losses.max() or 1.0),
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(sizes / budget, -np.inf, 1),
        ],
    )
    assert found.x is not None, found.message
    taken = zip(options, found.x, strict=True)
    return {layers[place].name: bits for (place, bits), share in taken if share > 0.5}

"""Bits for each layer under a budget: pure choices over made-up sensitivities."""

import itertools
import random

import pytest

from orchestrator.config import QuantConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.allocation import (
    GIB,
    WIDTHS,
    LayerLoss,
    allocate,
    resolved,
    total_increase,
)
from orchestrator.planning.bits import average_bits, bits_of, linear_bytes, stored_bits
from orchestrator.planning.shape import Linear


def layers(count: int, seed: int = 0) -> list[LayerLoss]:
    draw = random.Random(seed)
    found = []
    for number in range(count):
        loss = draw.expovariate(1.0) * 0.01
        found.append(
            LayerLoss(
                f"model.layers.{number}.proj",
                draw.choice((1024, 4096, 16384)),
                {4: loss, 8: loss / 200, 16: 0.0},
            )
        )
    return found


def auto(**fields: object) -> QuantConfig:
    return QuantConfig.model_validate({"bit_width": "auto", **fields})


def cost(some: list[LayerLoss], widths: dict[str, int], quant: QuantConfig) -> float:
    return sum(layer.num_params * stored_bits(quant, widths[layer.name]) for layer in some)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("average", [4.2, 5.0, 7.5, 12.0])
def test_no_other_choice_within_the_budget_loses_less(seed: int, average: float) -> None:
    some = layers(6, seed)
    quant = auto(average_bits=average)
    found = allocate(quant, some, 0, 2)
    budget = average * sum(layer.num_params for layer in some)
    names = [layer.name for layer in some]
    best = min(
        total_increase(some, widths)
        for choice in itertools.product(WIDTHS, repeat=len(some))
        if cost(some, widths := dict(zip(names, choice, strict=True)), quant) <= budget
    )
    assert found.loss_increase == pytest.approx(best, rel=1e-3, abs=1e-9)
    assert found.average_bits <= average
    assert sum(found.num_layers.values()) == len(some)


def test_more_bits_never_cost_more_loss_and_sixteen_everywhere_cost_none() -> None:
    some = layers(40)
    losses = [
        allocate(auto(average_bits=average), some, 0, 2).loss_increase
        for average in (4.2, 4.5, 5, 6, 8, 10, 16)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0
    assert losses[2] < allocate(auto(average_bits=5), some, 0, 2).loss_increase_uniform["4"]


def test_a_budget_in_gib_holds_the_whole_base() -> None:
    some = layers(40)
    linears = [Linear(layer.name, layer.num_params // 32, 32) for layer in some]
    plain = 10**5
    quant = auto(budget_gib=3.5e5 / GIB)
    found = resolved(quant, allocate(quant, some, plain, 4))
    assert linear_bytes(found, linears, 4) + plain <= 3.5e5
    assert linear_bytes(found, linears, 4) + plain > 3.4e5, "and uses it"
    assert found.budget_gib is None
    # In 32 bits what is not quantised takes twice the bytes that the average counts.
    assert average_bits(found, linears) <= 8 * linear_bytes(found, linears, 4) / sum(
        linear.num_params for linear in linears
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"average_bits": 4.05}, "average_bits=4.05 is less than the 4.127 bits .* to 4.127"),
        ({"budget_gib": 1e-5}, "budget_gib=1e-05 is less than the .* GiB"),
        (
            {"average_bits": 5, "bit_width_pattern": {"proj": 8}},
            "is less than the 8.127 bits that a weight takes at the fewest",
        ),
    ],
)
def test_a_budget_that_no_map_fits_is_refused_with_the_least_that_one_does(
    fields: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        allocate(auto(**fields), layers(10), 0, 2)


def test_layers_that_were_given_bits_keep_them() -> None:
    some = layers(20)
    given = {r"layers\.(0|1)\.proj": 16, r"layers\.2\.proj": 4}
    quant = auto(average_bits=9, bit_width_pattern=given)
    found = resolved(quant, allocate(quant, some, 0, 2))
    assert [bits_of(found, f"model.layers.{n}.proj") for n in (0, 1, 2)] == [16, 16, 4]
    assert all(bits_of(found, layer.name) is not None for layer in some)
    assert QuantConfig.model_validate(found.model_dump(mode="json")) == found


def test_sixteen_bits_everywhere_are_an_average_of_sixteen_whatever_the_arithmetic() -> None:
    some = layers(4)
    quant = auto(budget_gib=1)
    for dtype_bytes in (2, 4):
        assert resolved(quant, allocate(quant, some, 0, dtype_bytes)).average_bits == 16


def test_a_record_of_a_layer_comes_back_as_it_was() -> None:
    (one,) = layers(1)
    record = {"name": one.name, "num_params": one.num_params}
    texts = {str(bits): value for bits, value in one.loss_increase.items()}  # as JSON has it
    assert LayerLoss.from_json(record | {"loss_increase": texts}) == one

"""Which layer has how many bits, and what these cost."""

import json

import pytest
from pydantic import ValidationError

from orchestrator.config import QuantConfig
from orchestrator.planning.bits import (
    GIB,
    average_bits,
    base_linear_bytes,
    bits_of,
    linear_bytes,
    stored_bits,
)
from orchestrator.planning.patterns import as_pattern, unmatched
from orchestrator.search.space import ask, num_trials
from orchestrator.sweep.bits import auto_settings
from tests.sweeps import LLAMA_8B, sweep_config

NAMES = [linear.name for linear in LLAMA_8B.linears]


def test_a_layer_has_the_bits_of_the_longest_pattern_that_matches_it() -> None:
    pattern = {"down_proj": 8, r"model\.layers\.3\.mlp\.down_proj": 16, "layers.3.*": 4}
    quant = QuantConfig(bit_width=16, bit_width_pattern=pattern)
    assert bits_of(quant, "model.layers.2.mlp.down_proj") == 8
    assert bits_of(quant, "model.layers.3.mlp.down_proj") == 16
    assert bits_of(quant, "model.layers.3.mlp.up_proj") == 4
    assert bits_of(quant, "model.layers.2.mlp.xdown_proj") == 16, "an ending begins after a dot"


def test_a_map_does_not_depend_on_the_order_of_its_keys() -> None:
    """JSON records are written with sorted keys."""
    one = QuantConfig(bit_width_pattern={"layers.3.*": 4, "down_proj": 8})
    other = QuantConfig.model_validate(json.loads(json.dumps(one.model_dump(), sort_keys=True)))
    assert one == other
    assert hash(one) == hash(other)
    assert {bits_of(one, name) == bits_of(other, name) for name in NAMES} == {True}


def test_a_map_of_all_layers_is_written_short_and_means_the_same() -> None:
    widths = {name: (4, 8, 16)[sum(map(ord, name)) % 3] for name in NAMES}
    pattern = as_pattern(widths)
    assert len(pattern) <= 21, "three widths of seven kinds of layers"
    quant = QuantConfig(bit_width="auto", average_bits=9, bit_width_pattern=pattern)
    assert {name: bits_of(quant, name) for name in NAMES} == widths
    assert as_pattern({"head": 4, "10": 8}) == {"head": 4, "10": 8}


def test_double_quantisation_saves_what_the_paper_says() -> None:
    """QLoRA, arXiv:2305.14314, section 3: from 0.5 to 0.127 bits per parameter."""
    once, twice = (stored_bits(QuantConfig(double_quant=double), 4) for double in (False, True))
    assert once == 4.5
    assert once - twice == pytest.approx(0.373, abs=0.001)


def test_bytes_are_those_of_each_layer_at_its_own_bits() -> None:
    quant = QuantConfig(bit_width_pattern={"down_proj": 8, "q_proj": 16}, double_quant=False)
    sizes = {"down_proj": 8.5, "q_proj": 16}
    expected = sum(
        linear.num_params * sizes.get(linear.name.rpartition(".")[2], 4.5) / 8
        for linear in LLAMA_8B.linears
    )
    assert linear_bytes(quant, LLAMA_8B.linears) == expected
    assert average_bits(quant, LLAMA_8B.linears) == 8 * expected / LLAMA_8B.num_linear_params
    whole = QuantConfig(bit_width=16)
    assert linear_bytes(whole, LLAMA_8B.linears, 4) == 4 * LLAMA_8B.num_linear_params
    llm_int8 = linear_bytes(QuantConfig(bit_width=8), LLAMA_8B.linears)
    assert llm_int8 < linear_bytes(
        QuantConfig(bit_width=8, int8_type="blockwise"), LLAMA_8B.linears
    )


def test_only_bases_that_a_trial_may_ask_for_are_measured() -> None:
    search = {
        "space": {
            "quant.bit_width": [4, 16, "auto"],
            "quant.average_bits": [5.0, 6.0],
            "quant.quant_type": ["nf4", "fp4"],
        },
        "conditions": {"quant.quant_type": {"quant.bit_width": [4]}},
    }
    found = list(auto_settings(sweep_config(search=search)))
    assert [(quant.average_bits, quant.quant_type) for quant in found] == [
        (5.0, "nf4"),
        (6.0, "nf4"),
    ]


def test_bases_that_hang_on_another_field_are_measured_with_and_without_it() -> None:
    search = {
        "space": {"adapter.rank": [4, 8], "quant.quant_type": ["fp4"]},
        "conditions": {"quant.quant_type": {"adapter.rank": [4]}},
    }
    quant = {"bit_width": "auto", "average_bits": 5}
    found = list(auto_settings(sweep_config(search=search, trial__quant=quant)))
    assert [quant.quant_type for quant in found] == ["fp4", "nf4"]
    search = {
        "space": {
            "adapter.rank": [4, 8],
            "quant.bit_width": ["auto"],
            "quant.average_bits": [5.0],
            "quant.budget_gib": [1.0],
        },
        "conditions": {
            "quant.average_bits": {"adapter.rank": [4]},
            "quant.budget_gib": {"adapter.rank": [8]},
        },
    }
    found = list(auto_settings(sweep_config(search=search)))
    assert [(quant.average_bits, quant.budget_gib) for quant in found] == [(5.0, None), (None, 1.0)]


def test_auto_is_taken_at_its_average_until_it_has_chosen() -> None:
    quant = QuantConfig(bit_width="auto", average_bits=5)
    assert average_bits(quant, LLAMA_8B.linears) == pytest.approx(5)
    assert bits_of(quant, NAMES[0]) is None


def test_a_budget_is_taken_whole_until_the_map_is_chosen_and_16_bits_are_the_most() -> None:
    plain = 2 * LLAMA_8B.num_plain_params
    for budget in (6, 14):
        quant = QuantConfig(bit_width="auto", budget_gib=budget)
        assert base_linear_bytes(quant, LLAMA_8B, 2) + plain == budget * GIB
    ample = QuantConfig(bit_width="auto", budget_gib=100)
    assert base_linear_bytes(ample, LLAMA_8B, 2) == 2 * LLAMA_8B.num_linear_params
    all_four = QuantConfig(bit_width="auto", budget_gib=14, bit_width_pattern={".*": 4})
    assert base_linear_bytes(all_four, LLAMA_8B, 2) == linear_bytes(QuantConfig(), LLAMA_8B.linears)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bit_width": "auto"}, "needs average_bits or budget_gib, one of them, but got none"),
        (
            {"bit_width": "auto", "average_bits": 5, "budget_gib": 1},
            "one of them, but got average_bits and budget_gib",
        ),
        ({"bit_width_pattern": {"(": 4}}, "'\\(' is no regular expression"),
        ({"bit_width_pattern": {"q_proj": 5}}, "Input should be 2, 3, 4, 8 or 16"),
    ],
)
def test_a_map_that_cannot_be_read_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        QuantConfig.model_validate(fields)


def test_a_pattern_that_matches_nothing_is_found() -> None:
    assert unmatched({"q_proj": 4, "w_proj": 8}, NAMES) == ["w_proj"]


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
def test_maps_and_auto_are_values_that_a_search_can_try(sampler: str) -> None:
    maps = [{}, {"down_proj": 8}, {"q_proj": 16, "k_proj": 16}]
    space = {"quant.bit_width_pattern": maps, "quant.bit_width": [4, "auto"]}
    config = sweep_config(
        search={"space": space, "sampler": sampler, "num_trials": 6}, trial__quant__average_bits=5
    )
    known = []
    for _ in range(num_trials(config.search)):
        known.append(ask(config, known, []))
    assert all(trial.config.quant.bit_width_pattern in maps for trial in known)
    if sampler == "grid":
        assert len({trial.config.quant for trial in known}) == 6

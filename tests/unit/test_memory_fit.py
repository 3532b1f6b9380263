"""What a pack gives up for memory, in which order, and what it never changes."""

from typing import Any

import pytest

from orchestrator.config import StrategyConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.fit import (
    BUDGET_FRACTION,
    OUT_OF_MEMORY_FACTOR,
    Fit,
    after_out_of_memory,
    fit,
)
from orchestrator.planning.memory import GIB, estimate_memory
from orchestrator.planning.options import (
    PackWish,
    Premises,
    balanced_slots,
    full_card_tokens,
    pack_load,
    pack_options,
)
from orchestrator.planning.shape import BaseShape, UnknownShape
from orchestrator.records import Device
from tests.sweeps import LLAMA_8B, LLAMA_HALF_B, NO_BASE, pack_wish, premises, sweep_config


def fitted(memory_gib: float, *arguments: Any, **changes: Any) -> Fit:
    return fit(*asked(memory_gib, *arguments, **changes))


def asked(
    memory_gib: float,
    shape: BaseShape | UnknownShape = LLAMA_8B,
    device: Device = "cuda",
    share: int = 4,
    batch_size: int = 2,
    bit_width: int = 4,
    zero: bool = False,
    **changes: Any,
) -> tuple[Premises, PackWish]:
    """For trials of `batch_size` blocks of 1,024 tokens; `changes` are settings of the sweep."""
    config = sweep_config(trial__quant__bit_width=bit_width, **changes)
    strategy = StrategyConfig(kind="zero", stage=2) if zero else StrategyConfig()
    wish = pack_wish(config, share, batch_size, strategy)
    return premises(config, device, shape, int(memory_gib * GIB)), wish


def choices(found: Fit) -> tuple[bool, bool, int, int]:
    """(dequantised once, recomputation, micro-batch, slots)"""
    return (
        found.dequantise_once,
        found.gradient_checkpointing,
        found.micro_batch_size,
        found.num_slots,
    )


def test_a_large_gpu_gives_up_nothing() -> None:
    assert choices(fitted(141)) == (True, False, 2, 4)


def test_what_does_not_fit_gives_up_residency_then_blocks_then_slots_then_activations() -> None:
    sizes = [size / 2 for size in range(200, 18, -1)]
    seen = [choices(fitted(size)) for size in sizes]
    order = [choice for n, choice in enumerate(seen) if n == 0 or choice != seen[n - 1]]
    assert order == [
        (True, False, 2, 4),
        (False, False, 2, 4),
        (True, False, 1, 4),  # the room that a smaller pass makes holds the values again
        (False, False, 1, 4),
        (False, False, 2, 2),
        (False, False, 1, 2),
        (False, False, 2, 1),
        (False, True, 2, 4),  # 1 block of 1 slot is a pass of 1,024 tokens: rather the whole batch
        (False, True, 1, 4),
        (False, True, 2, 2),
        (False, True, 1, 2),
        (False, True, 2, 1),
        (False, True, 1, 1),
    ]


@pytest.mark.parametrize(
    ("setting", "order"),
    [
        # 1 block is a pass of 1,024 tokens: too few to be better than recomputation.
        (None, [(4, False), (2, False), (4, True), (2, True), (1, False), (1, True)]),
        (False, [(4, False), (2, False), (1, False)]),
        (True, [(4, True), (2, True), (1, True)]),
    ],
)
def test_passes_shrink_to_2048_tokens_before_anything_is_computed_again(
    setting: bool | None, order: list[tuple[int, bool]]
) -> None:
    wished = asked(80, share=1, batch_size=4, trial__gradient_checkpointing=setting)
    options = [o for o in pack_options(*wished) if not (o.dequantise_once or o.in_place)]
    assert [(o.micro_batch_size, o.gradient_checkpointing) for o in options] == order


def test_copies_of_the_adapter_are_given_up_last_of_all() -> None:
    large: dict[str, Any] = {"search__space": {"adapter.rank": [256]}}
    wished = asked(80, **large)
    *_, smallest, in_place = (pack_load(*wished, option) for option in pack_options(*wished))
    needed = estimate_memory(LLAMA_8B, smallest).total_bytes
    assert estimate_memory(LLAMA_8B, in_place).total_bytes < needed - GIB // 2
    found = fitted((needed / BUDGET_FRACTION - GIB // 4) / GIB, **large)
    assert (found.step_program, choices(found)) == ("in_place", (False, True, 1, 1))
    assert f"step program in_place: graph needs {needed / GIB:.1f} GiB" in found.reasons
    assert found.fits


@pytest.mark.parametrize(
    "changes", [{"zero": True}, {"resources__step_program": "graph"}, {"device": "cpu"}]
)
def test_a_step_in_place_is_not_for_packs_that_are_told_otherwise(changes: dict[str, Any]) -> None:
    assert not any(option.in_place for option in pack_options(*asked(80, **changes)))


def test_a_step_in_place_has_one_slot() -> None:
    found = fitted(141, resources__step_program="in_place")
    assert (found.step_program, found.num_slots) == ("in_place", 1)


def test_a_smaller_pass_is_shown_with_what_a_larger_one_would_need() -> None:
    found = fitted(31, share=2, batch_size=8)
    assert "4 of 8 blocks in a pass: 8 need 37.9 GiB without recomputation" in found.reasons


@pytest.mark.parametrize("memory_gib", [8, 12, 16, 24, 40, 80, 141])
def test_what_is_chosen_fits_or_is_said_not_to(memory_gib: int) -> None:
    found = fitted(memory_gib)
    assert found.memory is not None
    assert found.budget_bytes == int(0.9 * memory_gib * GIB)
    fits = found.memory.total_bytes <= found.budget_bytes
    assert ("does not fit" in found.reasons[-1]) != fits


def test_where_nothing_fits_the_least_is_chosen_and_the_plan_says_so() -> None:
    found = fitted(4)
    assert choices(found) == (False, True, 1, 1)
    assert found.reasons[-1].startswith("does not fit, the least is 7.8 ")
    assert found.reasons[-1].endswith("GiB of 3.6 GiB")


@pytest.mark.parametrize("memory_gib", [4, 24, 141, 0])
@pytest.mark.parametrize("setting", [True, False])
def test_user_settings_are_kept(memory_gib: int, setting: bool) -> None:
    found = fitted(
        memory_gib,
        trial__gradient_checkpointing=setting,
        trial__micro_batch_size=2,
        resources__dequantise_once=setting,
        resources__slots_per_pack=3,
        resources__step_program="compiled",
    )
    assert choices(found) == (setting, setting, 2, 3)
    assert found.step_program == "compiled"


def test_an_evaluation_that_costs_more_than_training_is_named() -> None:
    reasons = fitted(8, LLAMA_HALF_B, "cpu", evaluation__batch_size=64).reasons
    assert any(reason.startswith("evaluation.batch_size=64 takes") for reason in reasons)


@pytest.mark.parametrize(("device", "memory_gib"), [("cpu", 8), ("cuda", 20)])
def test_answers_that_cost_more_than_training_are_named(device: Device, memory_gib: int) -> None:
    def reasons(task: dict[str, Any]) -> str:
        return " ".join(fitted(memory_gib, LLAMA_8B, device, evaluation__task=task).reasons)

    assert "evaluation.task.batch_size=64 takes" in reasons({"batch_size": 64})
    assert "evaluation.task.batch_size" not in reasons({"batch_size": 1})
    assert "evaluation.task.batch_size" not in reasons({"batch_size": 64, "max_examples": 1})


def test_each_choice_is_shown_with_what_the_other_would_need() -> None:
    slots, micro, residency, recomputation, program, expected = fitted(16, batch_size=1).reasons
    assert slots == "4 slots for 4 (at most 8)"
    assert micro == "all 1 block in one pass"
    assert residency == "dequantised at every use: once needs 22.7 GiB"
    assert recomputation == (
        "recomputation in 28 of 32 layers: without it 25.5 GiB, or 1 slot, a pass of less than "
        "2,048 tokens"
    )
    assert program == "step program graph"
    assert expected.endswith("of 14.4 GiB")


def test_fewer_slots_are_shown_with_what_more_would_mean() -> None:
    slots = fitted(24, batch_size=1).reasons[0]
    assert slots == "2 slots for 4: more would mean 4 slots with recomputation"
    assert fitted(11.75).reasons[0] == "1 slot for 4: 2 need 10.7 GiB"


def test_a_pass_of_one_trial_is_not_larger_than_fills_the_gpu() -> None:
    found = fitted(141, batch_size=32)
    assert (found.micro_batch_size, found.num_slots) == (8, 1)
    assert "8 of 32 blocks in a pass, which fill the GPU" in found.reasons
    assert fitted(141, LLAMA_HALF_B, batch_size=32).micro_batch_size == 16


@pytest.mark.parametrize(
    ("params", "tokens"),
    [(0.5e9, 16_384), (1e9, 16_384), (4e9, 12_288), (7e9, 8_192), (70e9, 8_192)],
)
def test_a_larger_base_fills_a_gpu_with_fewer_tokens(params: float, tokens: int) -> None:
    assert full_card_tokens(int(params)) == tokens


@pytest.mark.parametrize(
    ("share", "most", "first"), [(18, 16, 9), (16, 16, 16), (17, 16, 9), (5, 4, 3), (1, 4, 1)]
)
def test_waves_are_even(share: int, most: int, first: int) -> None:
    counts = balanced_slots(share, most)
    assert counts[0] == first
    assert counts[-1] == 1
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"memory_gib": 0}, "the size of the cuda worker's memory cannot be read"),
        ({"memory_gib": 141, "shape": NO_BASE}, "there is no base"),
    ],
)
def test_where_a_gpus_memory_is_unknown_little_of_it_is_taken(
    arguments: dict[str, Any], why: str
) -> None:
    found = fitted(share=9, batch_size=32, **arguments)
    assert choices(found) == (False, True, 1, 3)
    assert found.memory is None
    assert "1 block in a pass, as the memory is unknown" in found.reasons
    assert "recomputation, as the memory is unknown" in found.reasons
    assert why in found.reasons[-1]


def test_where_a_cpus_memory_is_unknown_nothing_is_traded_for_it() -> None:
    found = fitted(0, NO_BASE, "cpu", share=9, batch_size=32)
    assert choices(found) == (False, False, 32, 3)


def test_each_loss_of_a_pack_to_its_memory_makes_the_next_one_smaller_until_nothing_is_left() -> (
    None
):
    given, wish = asked(141)
    lost = fit(given, wish)
    seen = [lost]
    while learned := after_out_of_memory(given, wish, lost):
        given, reason = learned
        assert lost.memory is not None
        assert f"{lost.memory.total_bytes / GIB:.1f} GiB were expected" in reason
        lost = fit(given, wish)
        seen.append(lost)
    needs = [found.memory.total_bytes for found in seen if found.memory is not None]
    for more, less in zip(needs[:-2], needs[1:-1], strict=True):
        assert less <= OUT_OF_MEMORY_FACTOR * more
    assert needs == sorted(needs, reverse=True)
    assert choices(lost) == (False, True, 1, 1)  # the last option of all
    assert len(seen) > 3


def test_a_loss_that_was_planned_before_another_teaches_the_same_once() -> None:
    given, wish = asked(141)
    lost = fit(given, wish)
    first = after_out_of_memory(given, wish, lost)
    assert first is not None
    assert after_out_of_memory(first[0], wish, lost) == first


@pytest.mark.parametrize("memory_gib", [0, 24, 141])
def test_a_pack_whose_options_are_all_set_learns_nothing_from_its_loss(memory_gib: int) -> None:
    given, wish = asked(
        memory_gib,
        trial__gradient_checkpointing=False,
        trial__micro_batch_size=2,
        resources__dequantise_once=False,
        resources__slots_per_pack=3,
    )
    assert after_out_of_memory(given, wish, fit(given, wish)) is None


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        ({}, "graph"),
        ({"bit_width": 16}, "graph"),
        ({"bit_width": 8}, "eager"),
        ({"zero": True}, "eager"),
        ({"device": "cpu"}, "eager"),
        ({"bit_width": 8, "resources__step_program": "graph"}, "eager"),
        ({"device": "cpu", "resources__step_program": "compiled"}, "compiled"),
    ],
)
def test_the_step_program_follows_the_device_and_the_base(
    arguments: dict[str, Any], program: str
) -> None:
    assert fitted(141, **arguments).step_program == program


def test_a_graph_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="graph needs GPUs"):
        fitted(8, device="cpu", resources__step_program="graph")


def test_only_four_bits_are_dequantised_once() -> None:
    assert fitted(141).dequantise_once
    assert fitted(64, LLAMA_HALF_B, "cpu").dequantise_once
    assert not fitted(141, bit_width=16).dequantise_once
    assert not fitted(141, bit_width=8, resources__dequantise_once=True).dequantise_once

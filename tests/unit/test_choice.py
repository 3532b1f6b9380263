"""Where a GPU's rates are known, a pack takes what trains its trials soonest."""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.planning.choice import EQUALLY_FAST, Costs
from orchestrator.planning.fit import BUDGET_FRACTION, Fit, after_out_of_memory, fit
from orchestrator.planning.gpus import GPUS
from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.memory import GIB
from orchestrator.planning.options import Option, PackWish, Premises
from orchestrator.planning.packs import premises_for
from orchestrator.planning.shape import BaseShape
from tests.sweeps import LLAMA_8B, llama_shape, pack_wish, premises, sweep_config

SHAPES = {
    "3B": llama_shape(36, 2048, 11_008, 16, 2, 151_936),
    "8B": LLAMA_8B,
    "14B": llama_shape(48, 5120, 13_824, 40, 8, 152_064),
    "32B": llama_shape(64, 5120, 27_648, 40, 8, 152_064),
    "70B": llama_shape(80, 8192, 28_672, 64, 8, 128_256),
}


def asked(
    shape: str, gpu: str, block: int, batch_size: int, share: int, **changes: Any
) -> tuple[Premises, PackWish]:
    """For trials of `batch_size` blocks of `block` tokens; `changes` are settings of the sweep."""
    config = sweep_config(data__block_length=block, **changes)
    known = GPUS[gpu]
    given = premises(config, "cuda", SHAPES[shape], known.memory_bytes)
    return replace(given, gpu=known), pack_wish(config, share, batch_size)


def taken(found: Fit) -> Option:
    return Option(
        found.num_slots,
        found.micro_batch_size,
        found.gradient_checkpointing,
        found.dequantise_once,
        found.step_program == "in_place",
        found.kept_layers,
    )


def least_seconds(given: Premises, wish: PackWish, shape: BaseShape) -> float:
    """Of all that fits, whether the planner would think of it or not."""
    costs = Costs(given, wish, shape)
    budget = int(BUDGET_FRACTION * given.worker_memory_bytes)
    blocks = wish.worker_blocks
    divisors = [count for count in range(1, blocks + 1) if blocks % count == 0]
    every = [
        Option(slots, micro, kept < shape.num_layers, resident, kept_layers=kept % shape.num_layers)
        for slots, micro, resident, kept in itertools.product(
            range(1, wish.share + 1), divisors, (False, True), range(0, shape.num_layers + 1, 4)
        )
    ]
    fitting = [option for option in every if costs.needed(option) <= budget]
    return min(costs.seconds(option, wish.share) for option in fitting)


CASES = [
    ("32B", "H200", 1024, 1, 8),
    ("8B", "A100", 2048, 1, 8),
    ("14B", "A10G", 1024, 16, 2),
    ("70B", "H200", 4096, 1, 4),
    ("3B", "A10G", 512, 16, 8),
    ("8B", "T4", 512, 4, 4),
    ("8B", "H200", 512, 4, 8),
    ("14B", "A100", 1024, 7, 8),
]


@pytest.mark.parametrize("case", CASES)
def test_what_is_taken_is_nearly_as_fast_as_the_best_that_fits(
    case: tuple[str, str, int, int, int],
) -> None:
    given, wish = asked(*case)
    found = fit(given, wish)
    shape = SHAPES[case[0]]
    assert found.fits
    own = Costs(given, wish, shape).seconds(taken(found), wish.share)
    assert own <= 1.03 * least_seconds(given, wish, shape)


def test_fewer_slots_are_taken_rather_than_recomputation_and_the_plan_says_why() -> None:
    found = fit(*asked("32B", "H200", 1024, 1, 8))
    assert taken(found) == Option(4, 1, False, True)
    assert found.reasons[0] == (
        "4 slots for 8: 8 slots with recomputation, dequantised at every use would take 1.02 times "
        "as long"
    )


def test_recomputation_is_taken_where_it_is_faster_than_what_fits_without_and_says_so() -> None:
    given, wish = asked("3B", "H200", 128, 1, 16)
    found = fit(replace(given, worker_memory_bytes=int(5.75 * GIB)), wish)
    assert taken(found) == Option(2, 1, True, False, kept_layers=16)
    assert (
        "recomputation in 20 of 36 layers: without it 5.5 GiB, or 1 slot, which would take 1.42 "
        "times as long" in found.reasons
    )


def test_a_step_in_place_is_not_taken_where_a_recorded_one_fits_with_more_recomputation() -> None:
    found = fit(*asked("8B", "A10G", 1024, 4, 2, search__space={"adapter.rank": [256]}))
    assert found.step_program == "graph"
    assert found.fits
    assert found.gradient_checkpointing


def test_with_memory_to_spare_nothing_is_given_up() -> None:
    assert taken(fit(*asked("8B", "H200", 1024, 2, 4))) == Option(4, 2, False, True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("setting", [True, False])
def test_what_the_user_set_is_kept_however_long_it_takes(
    case: tuple[str, str, int, int, int], setting: bool
) -> None:
    found = fit(
        *asked(
            *case,
            trial__gradient_checkpointing=setting,
            trial__micro_batch_size=1,
            resources__dequantise_once=setting,
            resources__slots_per_pack=2,
        )
    )
    assert taken(found) == Option(2, 1, setting, setting)


@pytest.mark.parametrize("case", CASES)
def test_selective_recomputes_just_as_many_layers_as_the_memory_asks_for(
    case: tuple[str, str, int, int, int],
) -> None:
    setting: dict[str, Any] = {
        "trial__gradient_checkpointing": "selective",
        "trial__micro_batch_size": case[3],
        "resources__slots_per_pack": case[4],
    }
    given, wish = asked(*case, **setting)
    found = fit(given, wish)
    option, costs = taken(found), Costs(given, wish, SHAPES[case[0]])
    assert option.gradient_checkpointing
    layers = SHAPES[case[0]].num_layers
    words = f"recomputation in {layers - option.kept_layers} of {layers} layers, as set"
    assert words in found.reasons
    if found.fits and option.kept_layers < layers - 1:
        one_more = option._replace(kept_layers=option.kept_layers + 1)
        assert costs.needed(one_more) > found.budget_bytes
    if not found.fits:
        assert option.kept_layers == 0


@pytest.mark.parametrize("case", CASES)
def test_each_loss_to_the_memory_leaves_a_smaller_pack_until_nothing_is_left(
    case: tuple[str, str, int, int, int],
) -> None:
    given, wish = asked(*case)
    lost = fit(given, wish)
    needs = [lost.memory.total_bytes if lost.memory else 0]
    while learned := after_out_of_memory(given, wish, lost):
        given, _ = learned
        lost = fit(given, wish)
        needs.append(lost.memory.total_bytes if lost.memory else 0)
        assert needs[-1] < needs[-2]
    assert lost.num_slots == lost.micro_batch_size == 1


def test_each_kind_of_gpu_is_planned_by_its_own_rates() -> None:
    given, wish = asked("8B", "H200", 2048, 1, 8)
    small = GPUS["A100"]
    of_kind = premises_for(WorkerKind("A100-40GB", 8, small.memory_bytes), given)
    assert of_kind.gpu == small
    assert fit(of_kind, wish) == fit(*asked("8B", "A100", 2048, 1, 8))
    unknown = premises_for(WorkerKind("GPU-of-tomorrow", 8, small.memory_bytes), given)
    assert unknown.gpu is None


def test_any_number_of_trials_takes_little_longer_than_with_the_best_number_of_slots() -> None:
    for share in range(1, 17):
        given, wish = asked("8B", "A100", 1024, 2, share)
        own = Costs(given, wish, LLAMA_8B).seconds(taken(fit(given, wish)), share)
        assert own <= EQUALLY_FAST * 1.02 * least_seconds(given, wish, LLAMA_8B)

"""What a search space refuses, and when."""

import time
from typing import Any

import pytest

from orchestrator.config import SweepConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.compatibility import problems
from orchestrator.planning.ranks import saved_bytes
from orchestrator.records import TrialResult, TrialSpec
from orchestrator.search.space import (
    KnownPoints,
    ask,
    check_space,
    has_new_point,
    next_trial,
    num_trials,
)
from tests.sweeps import LLAMA_HALF_B, sweep_config
from tests.unit.test_search import CONDITIONAL, RANGES, ask_all


def refusal(config: SweepConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_space(config)
    return str(caught.value).splitlines()


def test_asking_refuses_no_combination() -> None:
    config = sweep_config(search={"space": {"micro_batch_size": [3]}})
    assert ask(config, [], []).config.micro_batch_size == 3


def test_all_refused_combinations_of_a_grid_are_listed_at_once() -> None:
    config = sweep_config(search={"space": {"adapter.rank": [4, 8], "micro_batch_size": [4, 3]}})
    first, second = refusal(config)
    assert first.startswith("trial 1 (adapter.rank=4, micro_batch_size=3): micro_batch_size must")
    assert second.startswith("trial 3 (adapter.rank=8, micro_batch_size=3): micro_batch_size must")


def test_a_grid_is_checked_no_further_than_it_is_tried() -> None:
    search = {"space": {"micro_batch_size": [4, 3]}, "num_trials": 1}
    check_space(sweep_config(search=search))


def test_the_trial_as_written_is_refused_only_if_it_is_trained() -> None:
    (line,) = refusal(sweep_config(search={}, trial__micro_batch_size=3))
    assert line.startswith("trial: micro_batch_size must divide")
    space = {"micro_batch_size": [2, 4]}
    check_space(sweep_config(search={"space": space}, trial__micro_batch_size=3))


def test_a_big_grid_is_checked_fast_and_its_listing_is_cut() -> None:
    many = list(range(1, 401))
    space = {"micro_batch_size": [1, 3], "adapter.rank": many, "seed": many}
    started = time.process_time()
    lines = refusal(sweep_config(search={"space": space}))
    assert time.process_time() - started < 10
    assert len(lines) == 21
    assert lines[-1] == f"and {400 * 400 - 20} more"


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_sampler_is_refused_only_if_it_begins_with_nothing_that_works(sampler: str) -> None:
    search = {"sampler": sampler, "num_trials": 12, "space": {"micro_batch_size": [3, 5]}}
    expected = 12 if sampler == "random" else 10
    assert len(refusal(sweep_config(search=search))) == expected
    check_space(sweep_config(search=search | {"space": {"micro_batch_size": [3, 5, 2]}}))


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "nsga2"])
def test_what_the_rules_refuse_is_drawn_again(sampler: str) -> None:
    """fp4 is a 4-bit code: at 16 bits it would be a trial for nothing."""
    space = CONDITIONAL["space"] | {"optimizer.learning_rate": RANGES["optimizer.learning_rate"]}
    config = sweep_config(search={"space": space, "sampler": sampler, "num_trials": 24})
    known: list[TrialSpec] = []
    results: list[TrialResult] = []
    while trial := next_trial(config, known, results, most_under_way=1):
        assert problems(trial.config) == []
        known.append(trial)
        loss = 1.0 if trial.config.quant.bit_width == 16 else 2.0
        results.append(TrialResult(trial.number, "finished", 1, 0.0, eval_loss=loss))
    assert {trial.config.quant.bit_width for trial in known} == {4, 16}


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "nsga2"])
def test_adapters_larger_than_allowed_are_drawn_again_where_the_base_is_known(
    sampler: str,
) -> None:
    """Of ranks up to 64, 40 MB allow up to 18 on this base."""
    search = {
        "space": {"adapter.rank": {"low": 1, "high": 64, "integer": True}},
        "sampler": sampler,
        "num_trials": 16,
        "constraints": {"adapter_mb": 40},
    }
    config = sweep_config(search=search)
    points, blind = KnownPoints(config, LLAMA_HALF_B), KnownPoints(config)
    known: list[TrialSpec] = []
    results: list[TrialResult] = []
    while trial := next_trial(config, known, results, 1, points):
        assert saved_bytes(trial.config.adapter, LLAMA_HALF_B) <= 40e6
        known.append(trial)
        results.append(TrialResult(trial.number, "finished", 1, 0.0, eval_loss=1.0))
    assert len(known) == 16
    drawn = [next_trial(config, known[:n], results[:n], 1, blind) for n in range(9)]
    assert any(trial and trial.config.adapter.rank > 18 for trial in drawn)


def test_where_only_refused_points_are_left_none_is_new() -> None:
    space = {"quant.bit_width": [4, 16], "quant.quant_type": ["nf4", "fp4"]}
    config = sweep_config(search={"space": space, "sampler": "random", "num_trials": 9})
    known: list[TrialSpec] = []
    for number in range(3):
        assert has_new_point(config, known, []), number
        known.append(ask(config, known, []))
    assert not has_new_point(config, known, [])


@pytest.mark.parametrize("trial", [{}, {"average_bits": 5}])
@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
def test_a_budget_is_searched_only_where_bits_are_chosen(
    sampler: str, trial: dict[str, Any]
) -> None:
    space = {"quant.average_bits": [5, 6], "quant.bit_width": [4, "auto"]}
    search = {"space": space, "sampler": sampler, "num_trials": 3}
    config = sweep_config(search=search, trial__quant=trial)
    check_space(config)
    assert num_trials(config.search) == 3
    quants = {
        (t.config.quant.bit_width, t.params.get("quant.average_bits")) for t in ask_all(config)
    }
    assert quants == {(4, None), ("auto", 5), ("auto", 6)}


def test_a_point_without_its_budget_is_refused_with_its_title() -> None:
    space = {"quant.average_bits": [5], "quant.bit_width": [4, "auto"], "adapter.rank": [4, 8]}
    conditions = {"quant.average_bits": {"adapter.rank": [4]}}
    (line,) = refusal(sweep_config(search={"space": space, "conditions": conditions}))
    assert line.startswith("trial 3 (quant.bit_width=auto, adapter.rank=8): ")
    assert "needs average_bits or budget_gib" in line


def test_where_lengths_are_searched_a_rung_may_lie_beyond_the_end_of_some() -> None:
    pruner = {"kind": "asha", "rungs": [2, 15]}
    search = {"space": {"steps": [10, 20]}, "pruner": pruner}
    check_space(sweep_config(search=search))
    (line,) = refusal(sweep_config(search=search | {"pruner": pruner | {"rungs": [20, 40]}}))
    assert "got 20 steps, the longest of search.space.steps=20" in line


def test_a_pruner_needs_a_rung_before_the_end() -> None:
    pruner = {"kind": "asha", "rungs": [2, 6]}
    (line,) = refusal(sweep_config(search__pruner=pruner))
    assert line == (
        "search.pruner needs rungs before the end of a trial, but got 6 steps, trial.steps=6: "
        "lower search.pruner.rungs or min_steps, or set pruner: none"
    )
    check_space(sweep_config(search__pruner="asha"))

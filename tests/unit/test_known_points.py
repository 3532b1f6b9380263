"""Which points of a space are taken: by trials of another space, too, and when all are."""

from typing import Any

import pytest

from orchestrator.config import SweepConfig
from orchestrator.records import TrialResult, TrialSpec
from orchestrator.search.space import ask, check_space, first_trials, has_new_point, next_trial
from tests.sweeps import sweep_config

RATES = {"adapter.rank": [8, 16], "optimizer.learning_rate": [1e-2, 1e-1]}


def new_trials(config: SweepConfig, known: list[TrialSpec]) -> list[TrialSpec]:
    """Of a sweep that goes on in another space."""
    trials = list(known)
    while trial := next_trial(config, trials, [], most_under_way=99):
        trials.append(trial)
    return trials[len(known) :]


def test_a_field_that_is_searched_no_more_leaves_its_trials_outside_the_space() -> None:
    known = first_trials(sweep_config(search={"space": RATES}))
    for written, ranks in ((1e-3, [8, 16, 32]), (1e-2, [32])):  # the latter has been trained
        config = sweep_config(
            search={"space": {"adapter.rank": [8, 16, 32]}}, trial__optimizer__learning_rate=written
        )
        assert [trial.config.adapter.rank for trial in new_trials(config, known)] == ranks


def test_a_condition_that_is_new_leaves_out_trials_that_it_would_not_ask_for() -> None:
    space = {"adapter.rank": [8, 16], "adapter.dropout": [0.1, 0.2]}
    known = first_trials(sweep_config(search={"space": space}))
    conditions = {"adapter.dropout": {"adapter.rank": [16]}}
    (new,) = new_trials(sweep_config(search={"space": space, "conditions": conditions}), known)
    assert (new.config.adapter.rank, new.config.adapter.dropout) == (8, 0.0)


def test_a_sampler_is_told_nothing_of_trials_outside_the_space() -> None:
    known = first_trials(sweep_config(search={"space": RATES}))
    search = {"space": {"adapter.rank": {"low": 1, "high": 64, "integer": True}}}
    config = sweep_config(search=search | {"sampler": "tpe", "num_trials": 60})
    results = [TrialResult(n, "finished", 1, 0.0, eval_loss=float(n)) for n in range(4)]
    worse = [TrialResult(n, "finished", 1, 0.0, eval_loss=-float(n)) for n in range(4)]
    asked = ask(config, known * 4, results * 4), ask(config, known * 4, worse * 4)
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    "space",
    [
        {"quant.bit_width": [4, 16], "optimizer.learning_rate": {"low": 1e-4, "high": 1e-2}},
        {"quant.bit_width": [16, "auto"], "quant.budget_gib": {"low": 2.0, "high": 4.0}},
    ],
)
def test_a_range_under_a_condition_lets_no_point_without_it_be_drawn_twice(space: Any) -> None:
    search = {"space": space, "sampler": "random", "num_trials": 16}
    if "quant.budget_gib" not in space:
        search["conditions"] = {"optimizer.learning_rate": {"quant.bit_width": [4]}}
    trials = first_trials(sweep_config(search=search))
    assert len({trial.config.model_dump_json() for trial in trials}) == 16


def test_the_last_new_points_of_a_large_space_are_found() -> None:
    space = {"adapter.rank": list(range(1, 21)), "steps": {"low": 1, "high": 20, "integer": True}}
    search = {"space": space, "sampler": "random", "num_trials": 400}
    trials = first_trials(sweep_config(search=search))
    assert len({str(trial.params) for trial in trials}) == 400
    config = sweep_config(search=search | {"num_trials": 401})
    assert has_new_point(config, trials[:399], [])
    assert not has_new_point(config, trials, [])


def test_nsga2_learns_from_trials_of_the_sampler_before_it() -> None:
    rates = {"low": 1e-5, "high": 1e-2, "log": True}
    space = {
        "adapter.rank": {"low": 1, "high": 64, "integer": True},
        "optimizer.learning_rate": rates,  # with one field a child is a mutation of it alone
    }
    search = {"space": space, "sampler": "random", "num_trials": 24}
    known = first_trials(sweep_config(search=search))

    def rank(sign: float, seed: int) -> int:
        config = sweep_config(search=search | {"sampler": "nsga2", "num_trials": 40, "seed": seed})
        losses = [sign * trial.config.adapter.rank for trial in known]
        ends = [
            TrialResult(number, "finished", 1, 0.0, eval_loss=loss)
            for number, loss in enumerate(losses)
        ]
        asked = ask(config, known, ends)
        assert list(asked.notes.values()) == [1]
        return asked.config.adapter.rank

    small, large = (sum(rank(sign, seed) for seed in range(12)) for sign in (1.0, -1.0))
    assert small < large


def test_patterns_of_fractions_can_be_searched() -> None:
    patterns = [{}, {"q_proj": 0.5}]
    config = sweep_config(search={"space": {"adapter.alpha_pattern": patterns}})
    check_space(config)
    found = [trial.config.adapter.alpha_pattern for trial in first_trials(config)]
    assert found == patterns


def test_where_every_point_is_refused_a_long_range_is_not_gone_through_to_its_end() -> None:
    space = {"schedule.warmup_steps": {"low": 6, "high": 2**40, "integer": True}}  # of six steps
    config = sweep_config(search={"space": space, "sampler": "random", "num_trials": 1})
    (trial,) = first_trials(config)
    assert trial.config.schedule.warmup_steps >= 6

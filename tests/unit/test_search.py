import json
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.config import SweepConfig, TrialConfig
from orchestrator.records import TrialResult, TrialSpec
from orchestrator.search.samplers import SAMPLERS
from orchestrator.search.space import (
    KnownPoints,
    ask,
    bounds,
    check_space,
    first_batch,
    first_trials,
    has_new_point,
    next_trial,
    num_trials,
)
from tests.sweeps import sweep_config

RANGES = {
    "optimizer.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
    "adapter.rank": {"low": 2, "high": 32, "integer": True},
}


def ask_all(config: SweepConfig) -> list[TrialSpec]:
    trials: list[TrialSpec] = []
    results: list[TrialResult] = []
    for number in range(num_trials(config.search)):
        trials.append(ask(config, trials, results))
        results.append(
            TrialResult(
                number, "finished", 1, 0.0, eval_loss=abs(trials[-1].config.adapter.rank - 20)
            )
        )
    return trials


def test_the_grid_holds_every_combination_once_and_changes_the_base_last() -> None:
    trials = ask_all(sweep_config())
    points = [(t.config.quant.bit_width, t.config.adapter.rank) for t in trials]
    assert points == [(4, 4), (4, 16), (16, 4), (16, 16)]


def test_no_space_means_one_trial_as_written() -> None:
    config = sweep_config(search={})
    (trial,) = ask_all(config)
    assert trial.config == config.trial


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "nsga2"])
def test_the_same_seed_asks_for_the_same_trials(sampler: str) -> None:
    search = {"space": RANGES, "sampler": sampler, "num_trials": 14, "seed": 3}
    trials = ask_all(sweep_config(search=search))
    assert trials == ask_all(sweep_config(search=search))
    assert trials != ask_all(sweep_config(search=search | {"seed": 4}))
    assert len({str(trial.params) for trial in trials}) == 14
    assert all(2 <= trial.config.adapter.rank <= 32 for trial in trials)
    assert all(isinstance(trial.params["adapter.rank"], int) for trial in trials)


def test_what_is_asked_next_depends_only_on_the_records() -> None:
    config = sweep_config(search={"space": RANGES, "sampler": "tpe", "num_trials": 14})
    trials = ask_all(config)
    results = [
        TrialResult(t.number, "finished", 1, 0.0, eval_loss=abs(t.config.adapter.rank - 20))
        for t in trials
    ]
    assert ask(config, trials[:12], results[:12]) == trials[12]


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "nsga2"])
def test_no_point_is_drawn_twice_as_long_as_there_is_a_new_one(sampler: str) -> None:
    space = {"adapter.rank": [2, 4, 8], "steps": {"low": 1, "high": 4, "integer": True}}
    trials = ask_all(sweep_config(search={"space": space, "sampler": sampler, "num_trials": 13}))
    points = [str(trial.params) for trial in trials]
    assert len(set(points[:12])) == 12
    assert points[12] in points[:12]


def test_nsga2_draws_its_children_from_what_was_best(recwarn: pytest.WarningsRecorder) -> None:
    early, late = 0, 0
    for seed in range(8):
        search = {"space": RANGES, "sampler": "nsga2", "num_trials": 60, "seed": seed}
        trials = ask_all(sweep_config(search=search))
        misses = [abs(trial.config.adapter.rank - 20) for trial in trials]
        early, late = early + sum(misses[:12]), late + sum(misses[-12:])
        assert {generation for trial in trials for generation in trial.notes.values()} >= {0, 1, 2}
    assert late < 0.85 * early


def test_a_trial_whose_point_is_drawn_again_is_of_nsga2s_generation_all_the_same() -> None:
    lists = {"quant.bit_width": [4, 8, 16], "adapter.rank": [4, 8, 16, 32, 64]}
    search = {"space": lists, "sampler": "nsga2", "num_trials": 15}
    trials = ask_all(sweep_config(search=search))
    assert len({str(trial.params) for trial in trials}) == 15
    assert [list(trial.notes.values())[0] for trial in trials] == [0] * 12 + [1] * 3


def test_a_sampler_that_goes_ahead_knows_just_the_trials_that_it_waits_for() -> None:
    search = {"space": RANGES, "sampler": "tpe", "num_trials": 20, "ahead": 4}
    config = sweep_config(search=search)
    known = ask_all(config)[:14]
    results = [TrialResult(n, "finished", 1, 0.0, eval_loss=float(n)) for n in range(14)]
    assert next_trial(config, known, results[:10], most_under_way=99) is None
    first = next_trial(config, known, results[:11], most_under_way=1)
    assert first is not None
    assert next_trial(config, known, results, most_under_way=1) == first


def test_a_sampler_learns_from_pruned_and_refused_trials() -> None:
    search = {
        "space": {"adapter.rank": {"low": 2, "high": 32, "integer": True}},
        "sampler": "tpe",
        "num_trials": 60,
        "constraints": {"adapter_mb": 1},
    }
    trials: list[TrialSpec] = []
    results: list[TrialResult] = []
    config = sweep_config(search=search)
    while trial := next_trial(config, trials, results, most_under_way=1):
        trials.append(trial)
        rank = trial.config.adapter.rank
        state: Any = "finished" if rank < 8 else "pruned"
        ended = {"eval_loss": 1 / rank, "steps": 6} if state == "pruned" else {"eval_loss": 0.1}
        if rank > 16:
            state, ended = "failed", {"reason": "constraint", "adapter_bytes": rank * 10**5}
        results.append(TrialResult(trial.number, state, 1, 0.0, **ended))
    late = [trial.config.adapter.rank for trial in trials[-20:]]
    assert sum(rank < 8 for rank in late) > 12
    assert sum(rank > 16 for rank in late) < 4


CONDITIONAL = {
    "space": {
        "quant.quant_type": ["nf4", "fp4"],
        "quant.bit_width": [4, 16],
        "adapter.rank": [4, 8],
    },
    "conditions": {"quant.quant_type": {"quant.bit_width": [4]}},
}


def test_a_field_is_searched_only_where_its_condition_holds() -> None:
    config = sweep_config(search=CONDITIONAL)
    points = [
        (t.config.quant.bit_width, t.config.quant.quant_type, t.config.adapter.rank)
        for t in ask_all(config)
    ]
    assert points == [
        (4, "nf4", 4), (4, "fp4", 4), (4, "nf4", 8), (4, "fp4", 8), (16, "nf4", 4), (16, "nf4", 8),
    ]  # fmt: skip
    check_space(config)  # fp4 at 16 bits would be refused


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "nsga2"])
def test_every_sampler_keeps_to_conditions(sampler: str) -> None:
    search = CONDITIONAL | {"sampler": sampler, "num_trials": 30}
    trials = ask_all(sweep_config(search=search))
    for trial in trials:
        assert ("quant.quant_type" in trial.params) == (trial.params["quant.bit_width"] == 4)
    assert {trial.config.quant.quant_type for trial in trials} == {"nf4", "fp4"}


def test_a_widened_grid_asks_for_the_new_points_alone() -> None:
    narrow = ask_all(sweep_config())
    space = {"quant.bit_width": [4, 16], "adapter.rank": [4, 8, 16], "adapter.alpha": [16, 32]}
    wide = sweep_config(search={"space": space})
    known = list(narrow)
    while trial := next_trial(wide, known, [], most_under_way=1):
        known.append(trial)
    assert len(known) == 12  # the narrow ones have an alpha of 32
    assert len({trial.config.model_dump_json() for trial in known}) == 12
    assert known[4].number == 4


def settled(trial: TrialSpec) -> TrialSpec:
    """As a sweep keeps it, with the bits that were chosen in place of what was asked for."""
    content = trial.config.model_dump()
    chosen = {"bit_width_pattern": {"down_proj": 8, ".*": 4}, "average_bits": 4.9}
    content["quant"] |= chosen | {"budget_gib": None}
    stored = json.loads(json.dumps(trial.to_json()))  # where 16 may have become 16.0
    return replace(TrialSpec.from_json(stored), config=TrialConfig.model_validate(content))


AUTO = {"bit_width": "auto", "average_bits": 5}
PATTERNS = [{}, {"down_proj": 8}]


@pytest.mark.parametrize(
    ("narrow", "wide", "num_points"),
    [
        (
            {"quant.average_bits": [6, 7], "quant.bit_width_pattern": PATTERNS},
            {"quant.average_bits": [6, 7], "quant.bit_width_pattern": [*PATTERNS, {"o_proj": 8}]},
            6,
        ),
        (
            {"quant.average_bits": [5, 6]},
            {"quant.average_bits": [5, 6], "quant.bit_width_pattern": PATTERNS},
            4,
        ),
        (
            {"adapter.alpha_pattern": [{}, {"q_proj": 16}], "adapter.rank": [4, 8]},
            {"adapter.alpha_pattern": [{}, {"q_proj": 16}], "adapter.rank": [2, 4, 8]},
            6,
        ),
    ],
)
def test_a_widened_grid_asks_for_no_point_twice_whatever_was_chosen_for_its_trials(
    narrow: dict[str, Any], wide: dict[str, Any], num_points: int
) -> None:
    config = sweep_config(trial__quant=AUTO, search={"space": narrow})
    known = [settled(trial) for trial in first_trials(config)]
    config = sweep_config(trial__quant=AUTO, search={"space": wide})
    while trial := next_trial(config, known, [], most_under_way=1):
        known.append(settled(trial))
        assert len(known) <= num_points
    assert len(known) == num_points


@pytest.mark.parametrize("wide", [[2, 4], [8, 4, 2]])
def test_a_grid_that_is_walked_asks_as_one_that_is_asked_afresh(wide: list[int]) -> None:
    narrow = ask_all(sweep_config(search={"space": {"adapter.rank": [4, 2]}}))
    config = sweep_config(search={"space": {"adapter.rank": wide, "seed": [0, 1]}})
    points, known = KnownPoints(config), list(narrow)
    while trial := next_trial(config, known, [], 1, points):
        assert trial == next_trial(config, known, [], most_under_way=1)
        known.append(trial)
    assert len(known) == 2 * len(wide)
    assert next_trial(config, known, [], 1, points) is None


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe", "gp", "nsga2"])
def test_the_order_in_which_fields_are_written_changes_no_trial(sampler: str) -> None:
    space: dict[str, Any] = {"seed": [0, 1], "adapter.rank": [2, 4, 8], "quant.bit_width": [4, 16]}
    number = {} if sampler == "grid" else {"num_trials": 6}
    written, other = (
        sweep_config(search={"space": dict(items), "sampler": sampler, **number})
        for items in (space.items(), reversed(space.items()))
    )
    assert first_trials(written) == first_trials(other)


def test_samplers_take_numbers_of_patterns_for_what_they_are() -> None:
    space = {"adapter.alpha_pattern": [{}, {"q_proj": 16}], "adapter.rank": [2, 4]}
    trials = ask_all(sweep_config(search={"space": space, "sampler": "tpe", "num_trials": 14}))
    assert len({json.dumps(trial.params, sort_keys=True) for trial in trials}) == 4


BUDGETS: dict[str, Any] = {
    "space": {"quant.budget_gib": [2, 3], "adapter.rank": [4, 8]},
    "sampler": "tpe",
    "num_trials": 40,
}
BUDGET = {"bit_width": "auto", "budget_gib": 2}


def test_samplers_know_trials_of_auto_bits_by_what_was_asked_for() -> None:
    config = sweep_config(trial__quant=BUDGET, search=BUDGETS)
    known: list[TrialSpec] = []
    while len(known) < 4:
        known.append(settled(ask(config, known, [])))
    assert len({str(trial.params) for trial in known}) == 4
    assert not has_new_point(config, known, [])
    assert has_new_point(config, known[:3], [])


def test_tpe_learns_from_trials_of_auto_bits() -> None:
    search = BUDGETS | {"space": {"quant.budget_gib": {"low": 2, "high": 8}}}
    config = sweep_config(trial__quant=BUDGET, search=search)
    known: list[TrialSpec] = []
    budgets: list[float] = []
    results: list[TrialResult] = []
    while trial := next_trial(config, known, results, most_under_way=1):
        assert trial.config.quant.budget_gib is not None
        budgets.append(trial.config.quant.budget_gib)
        known.append(settled(trial))
        loss = abs(budgets[-1] - 6)
        results.append(TrialResult(trial.number, "finished", 1, 0.0, eval_loss=loss))
    early, late = (sum(abs(b - 6) for b in part) for part in (budgets[:10], budgets[-10:]))
    assert late < 0.7 * early


def test_trials_of_a_grid_are_told_to_the_sampler_that_follows_it() -> None:
    results = [TrialResult(n, "finished", 1, 0.0, eval_loss=float(n)) for n in range(4)]
    search = {"space": RANGES, "sampler": "tpe", "num_trials": 30}
    config = sweep_config(search=search | {"num_trials": 5})
    trial = next_trial(config, ask_all(sweep_config()), results, most_under_way=4)
    assert trial is not None
    assert trial.number == 4


def test_tpe_moves_towards_what_was_better() -> None:
    search = {"space": RANGES, "sampler": "tpe", "num_trials": 40}
    ranks = [trial.config.adapter.rank for trial in ask_all(sweep_config(search=search))]
    early = sum(abs(rank - 20) for rank in ranks[:10]) / 10
    late = sum(abs(rank - 20) for rank in ranks[-10:]) / 10
    assert late < 0.7 * early


def test_a_sampler_that_learns_asks_for_its_random_start_at_once_only() -> None:
    search = {"space": RANGES, "sampler": "tpe", "num_trials": 40}
    assert first_batch(sweep_config(search=search).search) == 10
    assert first_batch(sweep_config().search) == 4


TARGETS = {"adapter.target_modules": [["q_proj"], ["q_proj", "v_proj"]]}


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
def test_lists_of_names_can_be_searched_and_survive_the_run_folder(sampler: str) -> None:
    search = {"space": TARGETS | {"adapter.rank": [4, 8]}, "sampler": sampler}
    config = sweep_config(search=search | ({} if sampler == "grid" else {"num_trials": 14}))
    trials = ask_all(config)
    drawn = {trial.params["adapter.target_modules"] for trial in trials}
    assert drawn == {("q_proj",), ("q_proj", "v_proj")}
    for trial in trials:
        assert trial.config.adapter.target_modules == trial.params["adapter.target_modules"]
    results = [TrialResult(t.number, "finished", 1, 0.0, eval_loss=1.0) for t in trials[:-1]]
    stored = [TrialSpec.from_json(json.loads(json.dumps(t.to_json()))) for t in trials[:-1]]
    again, fresh = ask(config, stored, results), ask(config, trials[:-1], results)
    assert again == fresh


def test_slots_have_room_for_every_module_of_the_space() -> None:
    config = sweep_config(search={"space": TARGETS})
    assert bounds(config.trial, config.search).target_modules == ("q_proj", "v_proj")
    everything = {"adapter.target_modules": [["q_proj"], "all-linear"]}
    config = sweep_config(search={"space": everything})
    assert bounds(config.trial, config.search).target_modules == "all-linear"
    config = sweep_config(trial__adapter={"target_modules": ["k_proj"]})
    assert bounds(config.trial, config.search).target_modules == ("k_proj",)


def test_slots_have_room_for_the_largest_rank_of_the_space() -> None:
    config = sweep_config(search={"space": RANGES, "sampler": "random", "num_trials": 2})
    assert bounds(config.trial, config.search).max_rank == 32
    assert bounds(config.trial, sweep_config().search).max_rank == 16


def test_what_is_written_counts_too_where_a_condition_decides_whether_a_field_is_searched() -> None:
    """Where it does not hold, a trial is as written."""
    search = {
        "space": {
            "quant.bit_width": [4, 16],
            "adapter.rank": [2, 4],
            "adapter.target_modules": [["q_proj"]],
            "adapter.dropout": [0.0],
            "adapter.init": ["default"],
            "optimizer.name": ["adamw_8bit"],
        },
        "conditions": {
            field: {"quant.bit_width": [16]}
            for field in (
                "adapter.rank", "adapter.target_modules", "adapter.dropout", "adapter.init",
                "optimizer.name",
            )
        },
    }  # fmt: skip
    written = {"rank": 16, "target_modules": ["v_proj"], "dropout": 0.1, "init": "loftq"}
    config = sweep_config(search=search, trial={"adapter": written, "optimizer": {"name": "adamw"}})
    room = bounds(config.trial, config.search)
    assert room.max_rank == 16
    assert room.target_modules == ("q_proj", "v_proj")
    assert room.dropout
    assert room.loftq
    assert set(room.optimizers) == {"adamw_8bit", "adamw"}
    unconditional = config.search.model_copy(update={"conditions": {}})
    assert bounds(config.trial, unconditional).target_modules == ("q_proj",)


def test_slots_have_room_for_trials_that_were_asked_for_in_a_wider_space() -> None:
    wide = {"rank": 64, "target_modules": ["k_proj"], "dropout": 0.1, "init": "loftq"}
    asked = sweep_config(trial__adapter=wide, trial__optimizer={"name": "adamw_8bit"}).trial
    config = sweep_config(search={"space": TARGETS})
    room = bounds(config.trial, config.search, [asked])
    assert room.max_rank == 64
    assert room.target_modules == ("q_proj", "v_proj", "k_proj")
    assert room.dropout
    assert room.loftq
    assert set(room.optimizers) == {config.trial.optimizer.name, "adamw_8bit"}


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "nsga2"])
def test_another_seed_asks_for_other_trials(sampler: str) -> None:
    drawn = []
    for seed in (0, 1):
        search = {"space": RANGES, "sampler": sampler, "num_trials": 8, "seed": seed}
        config = sweep_config(search=search)
        known: list[TrialSpec] = []
        for _ in range(8):
            known.append(ask(config, known, []))
        drawn.append({json.dumps(spec.params, sort_keys=True) for spec in known})
    assert not drawn[0] & drawn[1]


def test_a_range_may_be_narrowed_to_whole_numbers() -> None:
    search = {"space": {"adapter.alpha": {"low": 8, "high": 32}}, "sampler": "tpe", "num_trials": 4}
    config = sweep_config(search=search)
    first = ask(config, [], [])
    search["space"] = {"adapter.alpha": {"low": 8, "high": 32, "integer": True}}
    second = ask(sweep_config(search=search), [first], [])
    assert second.params["adapter.alpha"] % 1 == 0  # type: ignore[operator]


def test_every_sampler_of_the_schema_exists() -> None:
    choices = SweepConfig.model_json_schema()["$defs"]["SearchConfig"]["properties"]["sampler"]
    assert set(choices["enum"]) == {"grid", *SAMPLERS}


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"pruner": {"kind": "asha", "rungs": [8, 4]}}, "must be steps in ascending order"),
        ({"pruner": {"kind": "asha", "rungs": [4], "min_steps": 2}}, "exclude each other"),
        ({"pruner": {"kind": "none", "rungs": [2]}}, "pruner: none does not read rungs"),
        ({"pruner": {"min_steps": 2}}, "pruner: none does not read min_steps"),
        (
            {"pruner": {"kind": "asha", "startup_trials": 50}},
            "pruner: asha does not read startup_trials, but got startup_trials=50: leave",
        ),
        (
            {"pruner": {"kind": "median", "rungs": [2], "reduction_factor": 3}},
            "pruner: median does not read reduction_factor",
        ),
        ({"space": {"adapter.alpha": [16, 16.0]}}, "space.adapter.alpha lists a value twice"),
        ({"space": {"adapter.alpha_pattern": [{}, {}]}}, "lists a value twice"),
        ({"pruner": "bandit"}, "Input should be 'none', 'asha', 'hyperband' or 'median'"),
        ({"pruner": "asha", "objectives": ["eval_loss", "adapter_bytes"]}, "set pruner: none"),
        ({"objectives": []}, "objectives must name each at least one once"),
        ({"ahead": 4}, "ahead is for samplers that learn"),
        ({"conditions": {"adapter.rank": {"adapter.alpha": [1]}}}, "not in search.space"),
        ({"conditions": {"adapter.rank": {"quant.bit_width": [8]}}}, "must list choices of"),
        (
            {
                "conditions": {
                    "adapter.rank": {"quant.bit_width": [4]},
                    "quant.bit_width": {"adapter.rank": [4]},
                }
            },
            "depends on itself through adapter.rank, quant.bit_width",
        ),
        ({"constraints": {"adapter_mb": 0}}, "Input should be greater than 0"),
    ],
)
def test_a_search_that_cannot_be_meant_is_refused_with_the_rule(
    search: dict[str, Any], words: str
) -> None:
    space = {"quant.bit_width": [4, 16], "adapter.rank": [4, 8]}
    with pytest.raises(ValidationError) as caught:
        sweep_config(search={"space": space} | search)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "pruner",
    [
        {"kind": "none"},
        {"kind": "hyperband", "min_steps": 2, "reduction_factor": 2},
        {"kind": "median", "min_steps": 2, "reduction_factor": 2, "startup_trials": 1},
        {"kind": "median", "rungs": [2, 4], "startup_trials": 1},
    ],
)
def test_a_pruner_comes_back_from_the_run_folder_as_it_was_set(pruner: dict[str, Any]) -> None:
    config = sweep_config(search__pruner=pruner)
    assert SweepConfig.model_validate(config.model_dump(mode="json")) == config

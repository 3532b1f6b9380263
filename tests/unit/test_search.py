import pytest

from orchestrator.config import SweepConfig
from orchestrator.errors import ConfigError
from orchestrator.records import TrialResult, TrialSpec
from orchestrator.search.space import SAMPLERS, ask, bounds, first_batch, num_trials
from tests.sweeps import sweep_config

RANGES = {
    "optimizer.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
    "adapter.rank": {"low": 2, "high": 32, "integer": True},
}


def ask_all(config: SweepConfig) -> list[TrialSpec]:
    trials: list[TrialSpec] = []
    results: list[TrialResult] = []
    for number in range(num_trials(config.search)):
        trials.append(ask(config, "cpu", trials, results))
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


@pytest.mark.parametrize("sampler", ["random", "tpe"])
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
    assert ask(config, "cpu", trials[:12], results[:12]) == trials[12]


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


def test_a_combination_that_cannot_work_names_the_trial() -> None:
    config = sweep_config(search={"space": {"micro_batch_size": [4, 3]}})
    first = ask(config, "cpu", [], [])
    with pytest.raises(ConfigError, match=r"trial 1 \(micro_batch_size=3\): .*must divide"):
        ask(config, "cpu", [first], [])


def test_slots_have_room_for_the_largest_rank_of_the_space() -> None:
    config = sweep_config(search={"space": RANGES, "sampler": "random", "num_trials": 2})
    assert bounds(config.trial, config.search).max_rank == 32
    assert bounds(config.trial, sweep_config().search).max_rank == 16


def test_every_sampler_of_the_schema_exists() -> None:
    choices = SweepConfig.model_json_schema()["$defs"]["SearchConfig"]["properties"]["sampler"]
    assert set(choices["enum"]) == set(SAMPLERS)

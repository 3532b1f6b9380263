"""How far slower kinds of GPUs go in a small sweep, chosen by forecasts of the whole."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory_cases import base_shape
from benchmarks.models import SHAPES
from orchestrator.config import SweepConfig
from orchestrator.planning.durations import Durations
from orchestrator.planning.gpus import GPUS
from orchestrator.planning.kinds import WorkerKind
from orchestrator.records import TrialSpec
from orchestrator.sweep.forecast import forecast
from orchestrator.sweep.policy import SweepView
from orchestrator.sweep.reach import MOST_TRIALS, REACHES, Chosen, best_reach, with_reach
from tests.sweeps import make_store, premises, sweep_config

SMALL_BASE = base_shape(SHAPES["0.5b"])
FAST, SLOW = (
    WorkerKind(name, 1, GPUS[name].memory_bytes, GPUS[name].tflops / GPUS["H200"].tflops)
    for name in ("H200", "L40S")
)
RATES = {"optimizer.learning_rate": [1e-3, 2e-3, 3e-3, 4e-3]}


def config_of(slots: int | None = None, **changes: Any) -> SweepConfig:
    return sweep_config(
        trial__batch_size=4, data__block_length=1024, resources__slots_per_pack=slots, **changes
    )


def durations_of(config: SweepConfig, kinds: Sequence[WorkerKind]) -> Durations:
    least = min(kind.memory_bytes for kind in kinds)
    given = premises(config, "cuda", SMALL_BASE, least)
    return Durations(given, SMALL_BASE, {kind.name: GPUS[kind.name] for kind in kinds})


def trials_of(steps: Sequence[int]) -> list[TrialSpec]:
    return [
        TrialSpec(number, {}, config_of(trial__steps=count).trial)
        for number, count in enumerate(steps)
    ]


def chosen_for(steps: Sequence[int], kinds: Sequence[WorkerKind], slots: int | None) -> Chosen:
    durations = durations_of(config_of(slots), kinds)
    return best_reach(trials_of(steps), kinds, durations.premises, durations)


EXAMPLES = {
    "all would wait for the fast one": ([300] * 4, 1, None, 2.0),
    "the slow one would be waited for": ([400] * 9, 2, 2, 1.0),
    "by the rule alone it would be": ([500, 400, 300, 200, 100] * 3, 1, 1, 0.5),
}


@pytest.mark.parametrize(
    ("steps", "each", "slots", "reach"), EXAMPLES.values(), ids=EXAMPLES.keys()
)
def test_slow_gpus_begin_what_ends_the_sweep_soonest(
    steps: list[int], each: int, slots: int | None, reach: float
) -> None:
    kinds = (replace(FAST, count=each), replace(SLOW, count=each))
    chosen = chosen_for(steps, kinds, slots)
    assert chosen.premises.reach == reach
    assert {span.trial for span in chosen.forecast.spans} == set(range(len(steps)))
    assert chosen.reason.startswith("L40S: trials")
    assert f"forecast {chosen.forecast.makespan_s / 60:.1f} minutes" in chosen.reason
    durations = durations_of(config_of(slots), kinds)
    for other in REACHES:
        given = replace(chosen.premises, reach=other)
        found = forecast(trials_of(steps), kinds, given, durations.block_s, durations.start_s)
        assert found.makespan_s >= chosen.forecast.makespan_s


def test_nothing_is_chosen_where_all_gpus_are_alike_or_trials_are_many() -> None:
    alike = chosen_for([300] * 4, (FAST,), None)
    assert (alike.premises.reach, alike.reason) == (1.0, "")
    many = chosen_for([1] * (MOST_TRIALS + 1), (FAST, SLOW), None)
    assert (many.premises.reach, many.reason) == (1.0, "")


def test_a_sweep_says_what_it_chose_and_a_resume_chooses_for_what_is_left(tmp_path: Path) -> None:
    config = config_of(trial__steps=300, search__space=RATES)
    store = make_store(tmp_path / "sweep", config)
    durations = durations_of(config, (FAST, SLOW))
    trials = trials_of([300] * 4)
    view = SweepView(trials, (), 2, durations.premises, kinds=(FAST, SLOW))
    for trial in trials:
        store.add_trial(trial)
    assert with_reach(store, view, durations).reach == 2.0
    (decision,) = store.decisions
    assert (decision["action"], decision["subject"]) == ("choose_reach", "sweep")
    assert with_reach(store, replace(view, waiting=()), durations).reach == 1.0
    assert len(store.decisions) == 1


def test_nothing_is_chosen_for_gpus_whose_rates_are_not_known(tmp_path: Path) -> None:
    config = config_of(search__space=RATES)
    store = make_store(tmp_path / "sweep", config)
    durations = durations_of(config, (FAST,))
    kinds = (FAST, replace(SLOW, name="X1"))
    view = SweepView(trials_of([300] * 4), (), 2, durations.premises, kinds=kinds)
    assert with_reach(store, view, durations).reach == 1.0
    assert with_reach(store, replace(view, kinds=(FAST, SLOW)), None).reach == 1.0
    assert store.decisions == []

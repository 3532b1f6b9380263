"""A sweep that is killed again and again comes to the same end as one that is left alone."""

import random
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import SweepConfig
from orchestrator.records import (
    Decision,
    Evaluated,
    Event,
    Progress,
    TrialDone,
    TrialResult,
    TrialSpec,
)
from orchestrator.sweep.executor import InProcessExecutor
from orchestrator.sweep.run_store import RunStore
from orchestrator.sweep.selection import select_winner
from orchestrator.sweep.simulated import SimulatedWorker
from orchestrator.sweep.verdicts import recall_pruning
from tests.sweeps import make_controller, make_store, sweep_config

KILLS = 20
RANGES = {
    "optimizer.learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
    "adapter.rank": {"low": 2, "high": 32, "integer": True},
    "quant.bit_width": [4, 16],
}


class Killed(BaseException):
    pass


class MortalStore(RunStore):
    """Its process dies before or after the n-th write of one of the kinds that a sweep makes."""

    lives: float = float("inf")

    def _live(self) -> None:
        self.lives -= 0.5
        if self.lives < 0:
            raise Killed

    def add_trial(self, trial: TrialSpec, refused: TrialResult | None = None) -> None:
        self._live()
        super().add_trial(trial, refused)
        self._live()

    def add_point(self, point: Progress | Evaluated) -> None:
        self._live()
        super().add_point(point)
        self._live()

    def add_decision(self, decision: Decision) -> None:
        self._live()
        super().add_decision(decision)
        self._live()

    def add_done_event(self, event: TrialDone) -> None:
        self._live()
        super().add_done_event(event)
        self._live()

    def finish_trial(self, result: TrialResult) -> None:
        self._live()
        super().finish_trial(result)
        self._live()


def conclusion(store: RunStore) -> dict[str, Any]:
    """What does not depend on when and where it was done: every trial, each verdict about it, how
    it ended, and the winner."""
    verdicts = [d for d in store.decisions if d["action"] in ("keep_trial", "stop_trial")]
    winner = select_winner(store.trials, store.results, store.sweep.config.search)
    return {
        "trials": [(trial.number, trial.params) for trial in store.trials],
        "verdicts": sorted(
            (d["facts"]["trial"], d["facts"]["rung"], d["action"], d["facts"]["eval_loss"])
            for d in verdicts
        ),
        "results": [(r.number, r.state, r.steps, r.eval_loss, r.reason) for r in store.results],
        "winner": winner,
    }


def undisturbed(folder: Path, config: SweepConfig, num_workers: int = 2) -> RunStore:
    store = make_store(folder, config)
    assert make_controller(store, InProcessExecutor(SimulatedWorker), num_workers).run()
    return store


def killed_often(folder: Path, config: SweepConfig, seed: int, num_writes: int) -> RunStore:
    draw = random.Random(seed)
    make_store(folder, config)
    deaths = 0
    while True:
        store = MortalStore.open(folder)
        assert isinstance(store, MortalStore)
        if deaths < KILLS:
            store.lives = draw.uniform(1, 1.5 * num_writes / KILLS)
        num_workers = draw.choice([1, 2, 3])  # and goes on where there is more or less room
        try:
            executor = InProcessExecutor(SimulatedWorker)
            assert make_controller(store, executor, num_workers).run()
        except Killed:
            deaths += 1
        else:
            assert deaths == KILLS
            return store


def num_writes(store: RunStore) -> int:
    points = sum(len(store.points(trial.number)) for trial in store.trials)
    return points + len(store.decisions) + 3 * len(store.trials)


SEARCHES: dict[str, dict[str, Any]] = {
    "random, asha": {"sampler": "random", "space": RANGES, "num_trials": 18, "pruner": "asha"},
    "grid, hyperband": {
        "space": {
            "adapter.rank": [9, 4, 12, 2, 24, 6, 3, 16],
            "quant.bit_width": [4, 16],
        },
        "pruner": {"kind": "hyperband", "reduction_factor": 2, "min_steps": 2},
    },
    "tpe ahead, median": {
        "sampler": "tpe",
        "space": RANGES,
        "num_trials": 18,
        "ahead": 6,
        "pruner": {"kind": "median", "rungs": [2, 5, 9], "startup_trials": 3},
    },
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_sweep_killed_20_times_ends_with_the_same_trials_verdicts_and_winner(
    tmp_path: Path, name: str
) -> None:
    config = sweep_config(search=SEARCHES[name], trial__steps=16, max_restarts=0)
    alone = undisturbed(tmp_path / "alone", config)
    expected = conclusion(alone)
    states = {state for _, state, *_ in expected["results"]}
    assert states == {"finished", "pruned"}
    killed = killed_often(tmp_path / "killed", config, seed=1, num_writes=num_writes(alone))
    assert conclusion(killed) == expected
    assert list(killed.folder.rglob("checkpoint-*")) == []


def test_the_number_of_workers_changes_no_verdict(tmp_path: Path) -> None:
    config = sweep_config(search=SEARCHES["random, asha"], trial__steps=16)
    one = conclusion(undisturbed(tmp_path / "one", config, num_workers=1))
    assert conclusion(undisturbed(tmp_path / "five", config, num_workers=5)) == one


class FirstTrialsComeLast(InProcessExecutor):
    """Pack 1 is given the first trials, and then pack 0 runs alone, as long as there is something
    for it to do."""

    _begun = False

    def poll(self, timeout_s: float) -> list[tuple[int, list[Event]]]:
        self._due = dict(sorted(self._due.items(), reverse=not self._begun))
        self._begun = True
        return super().poll(timeout_s)


def test_trials_that_race_ahead_are_pruned_all_the_same_even_at_their_end(tmp_path: Path) -> None:
    search = SEARCHES["random, asha"] | {"space": {**RANGES, "quant.bit_width": [4]}}
    config = sweep_config(search=search, trial__steps=16, resources__slots_per_pack=2)
    alone = undisturbed(tmp_path / "alone", config, num_workers=1)
    store = make_store(tmp_path / "raced", config)
    assert make_controller(store, FirstTrialsComeLast(SimulatedWorker), num_workers=2).run()
    assert conclusion(store) == conclusion(alone)
    pruned = [result.number for result in store.results if result.state == "pruned"]
    reached = [max(point["step"] for point in store.points(number)) for number in pruned]
    for number in pruned:
        assert not list((store.trial_dir(number) / "attempts").glob("*/adapter"))
    assert 16 in reached  # trained to its end before the first trials came to a rung


class DiesAtAnEnd(RunStore):
    """Its process is killed once a trial is stopped that was trained to its end already."""

    def finish_trial(self, result: TrialResult) -> None:
        super().finish_trial(result)
        if result.state == "pruned" and result.number in self.done_events:
            raise Killed


def test_what_a_kill_left_of_a_trial_that_is_over_goes_at_the_next_start(tmp_path: Path) -> None:
    search = SEARCHES["random, asha"] | {"space": {**RANGES, "quant.bit_width": [4]}}
    config = sweep_config(search=search, trial__steps=16, resources__slots_per_pack=2)
    store = DiesAtAnEnd.open(make_store(tmp_path / "run", config).folder)
    with pytest.raises(Killed):
        make_controller(store, FirstTrialsComeLast(SimulatedWorker), num_workers=2).run()
    (over,) = store.done_events.keys() & {result.number for result in store.results}
    attempt = store.trial_dir(over) / "attempts" / "1"
    assert list(attempt.glob("checkpoint-*"))
    assert (attempt / "adapter").exists()
    again = RunStore.open(store.folder)
    assert make_controller(again, InProcessExecutor(SimulatedWorker)).run()
    assert list(again.folder.rglob("checkpoint-*")) == []
    assert not (attempt / "adapter").exists()


def test_a_resume_goes_by_the_first_report_at_a_rung_as_its_sweep_did(tmp_path: Path) -> None:
    search = {"space": {"adapter.rank": [16, 8]}, "pruner": {"kind": "asha", "rungs": [4]}}
    store = make_store(tmp_path / "run", sweep_config(search=search))
    for number in (0, 1):
        store.add_trial(TrialSpec(number, {}, store.sweep.config.trial))
    for attempt, loss in ((1, 2.0), (2, 2.5)):  # trial 1's worker was lost, and it came by again
        store.add_point(Evaluated(1, attempt, 0.0, 4, 400, loss))
    pruning = recall_pruning(store)
    assert pruning.decide() == []  # trial 0 has not reported
    pruning.report(0, 4, 1.0)
    assert [verdict.eval_loss for verdict in pruning.decide()] == [1.0, 2.0]

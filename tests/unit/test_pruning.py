import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import TrialConfig
from orchestrator.records import TrialSpec
from orchestrator.search.pruning import Pruning, Verdict, rung_steps
from orchestrator.search_config import PrunerConfig
from orchestrator.sweep.executor import InProcessExecutor
from orchestrator.sweep.simulated import SimulatedWorker
from tests.sweeps import make_controller, make_store, sweep_config

Losses = dict[int, dict[int, float]]
"""By trial, by step."""


def trial(number: int, bit_width: int = 4, steps: int = 64) -> TrialSpec:
    config = TrialConfig.model_validate({"steps": steps, "quant": {"bit_width": bit_width}})
    return TrialSpec(number, {}, config)


def make(pruner: PrunerConfig, trials: list[TrialSpec]) -> Pruning:
    pruning = Pruning(pruner)
    for one in trials:
        pruning.add(one)
    return pruning


def random_losses(count: int, rungs: tuple[int, ...], seed: int = 0) -> Losses:
    draw = random.Random(seed)
    quality = [draw.random() for _ in range(count)]
    return {n: {r: quality[n] + 1 / r + 0.1 * draw.random() for r in rungs} for n in range(count)}


def told_in(order: list[tuple[int, int]], pruning: Pruning, losses: Losses) -> set[Verdict]:
    """Reports come in this order of (trial, rung); a stopped trial reports no more, once it is."""
    given: set[Verdict] = set()
    for number, rung in order:
        if not any(v.trial == number and not v.keep for v in given):
            pruning.report(number, rung, losses[number][rung])
            given |= set(pruning.decide())
    return given


@pytest.mark.parametrize(
    ("pruner", "steps", "expected"),
    [
        ({"kind": "asha"}, 100, (6, 25)),
        ({"kind": "asha"}, 1000, (62, 250)),
        ({"kind": "asha"}, 64, (4, 16)),
        ({"kind": "asha"}, 3, (1,)),
        ({"kind": "asha", "min_steps": 10, "reduction_factor": 3}, 100, (10, 30, 90)),
        ({"kind": "median", "rungs": [5, 50, 500]}, 100, (5, 50)),
        ({}, 100, ()),
    ],
)
def test_rungs_are_as_set_or_derived_from_the_steps(
    pruner: dict[str, object], steps: int, expected: tuple[int, ...]
) -> None:
    assert rung_steps(PrunerConfig.model_validate(pruner), trial(0, steps=steps).config) == expected


def test_asha_lets_the_best_quarter_go_on() -> None:
    trials = [trial(number) for number in range(40)]
    pruner = PrunerConfig(kind="asha")
    losses = random_losses(40, (4, 16))
    order = [(number, rung) for rung in (4, 16) for number in range(40)]
    verdicts = told_in(order, make(pruner, trials), losses)
    kept = {v.trial for v in verdicts if v.keep and v.rung == 4}
    ranked = sorted(range(40), key=lambda number: losses[number][4])
    assert set(ranked[:5]) <= kept
    assert 10 <= len(kept) <= 14  # the first ones had few to be compared with
    assert {v.trial for v in verdicts if v.rung == 16} == kept


@pytest.mark.parametrize("kind", ["asha", "hyperband", "median"])
def test_verdicts_do_not_depend_on_the_order_of_reports(kind: str) -> None:
    pruner = PrunerConfig.model_validate({"kind": kind, "reduction_factor": 2, "min_steps": 8})
    trials = [trial(number, bit_width=(4, 16)[number % 2]) for number in range(24)]
    rungs = (8, 16, 32)
    losses = random_losses(24, rungs)
    found = []
    for seed in range(8):
        draw = random.Random(seed)
        todo = {number: list(rungs) for number in range(24)}
        order = []
        while todo:  # each trial passes its rungs in order, the trials in any
            number = draw.choice(list(todo))
            order.append((number, todo[number].pop(0)))
            if not todo[number]:
                del todo[number]
        pruning = make(pruner, trials)
        found.append(told_in(order, pruning, losses) | set(pruning.decide()))
    assert all(verdicts == found[0] for verdicts in found)
    assert {verdict.keep for verdict in found[0]} == {True, False}


def test_trials_of_another_base_do_not_compete() -> None:
    trials = [trial(0, 4), trial(1, 16), trial(2, 4), trial(3, 16)]
    pruning = make(PrunerConfig(kind="asha"), trials)
    for number, loss in enumerate([2.0, 1.0, 1.9, 1.1]):
        pruning.report(number, 4, loss)
    assert {v.trial: v.keep for v in pruning.decide()} == {0: True, 1: True, 2: True, 3: False}


def test_trials_of_another_batch_do_not_compete_unless_they_can_share_a_pack() -> None:
    for micro_batch_size, expected in ((None, True), (4, False)):
        content = {"steps": 64, "micro_batch_size": micro_batch_size}
        configs = [
            TrialConfig.model_validate(content | {"batch_size": batch_size})
            for batch_size in (4, 8)
        ]
        trials = [TrialSpec(number, {}, config) for number, config in enumerate(configs)]
        pruning = make(PrunerConfig(kind="asha"), trials)
        pruning.report(1, 4, 2.0)
        pruning.report(0, 4, 1.0)
        assert {v.trial: v.keep for v in pruning.decide()} == {0: True, 1: expected}


def test_a_verdict_waits_for_the_trials_before_it_and_for_no_other() -> None:
    pruning = make(PrunerConfig(kind="asha"), [trial(n) for n in range(4)])
    pruning.report(2, 4, 3.0)
    assert pruning.decide() == []
    pruning.report(0, 4, 1.0)
    assert [v.trial for v in pruning.decide()] == [0]
    pruning.end(1)  # it failed, and will report no more
    assert [(v.trial, v.keep) for v in pruning.decide()] == [(2, False)]
    assert pruning.decide() == []


def test_a_trial_that_went_on_before_its_verdict_does_not_count_further_up_once_stopped() -> None:
    pruning = make(PrunerConfig(kind="asha"), [trial(n) for n in range(3)])
    pruning.report(1, 4, 2.0)
    pruning.report(1, 16, 0.1)  # far ahead of the trial before it
    assert pruning.decide() == []
    assert not pruning.is_settled(1)
    for number, loss in ((0, 1.0), (2, 0.5)):
        pruning.report(number, 4, loss)
        pruning.report(number, 16, loss)
    verdicts = {(v.trial, v.rung): v.keep for v in pruning.decide()}
    assert verdicts == {(0, 4): True, (1, 4): False, (2, 4): True, (0, 16): True, (2, 16): True}


def test_what_was_decided_before_stands() -> None:
    losses = {0: 1.0, 1: 2.0, 2: 1.5}
    trials = [trial(n) for n in range(3)]
    fresh = make(PrunerConfig(kind="asha"), trials)
    for number in losses:
        fresh.report(number, 4, losses[number])
    first, second, third = fresh.decide()
    again = make(PrunerConfig(kind="asha"), trials)
    again.recall(first)
    again.recall(Verdict(1, 4, True, 2.0))  # an operator's, or another version's
    again.report(2, 4, losses[2])
    assert again.decide() == [third]
    assert again.stopped() == [third]
    assert fresh.stopped() == [second, third]


def test_a_retried_trial_that_comes_by_again_is_not_judged_twice() -> None:
    pruning = make(PrunerConfig(kind="asha"), [trial(0), trial(1)])
    pruning.report(0, 4, 1.0)
    (verdict,) = pruning.decide()
    pruning.report(0, 4, 1.0000001)
    assert pruning.decide() == []
    assert pruning.first_open_rung(0) == 16
    assert verdict.reason == (
        "held-out loss 1.0000 at step 4 is the 1st of 1 so far, and is among the best 1"
    )


def test_hyperband_spares_some_trials_until_later_rungs() -> None:
    pruner = PrunerConfig(kind="hyperband")
    pruning = make(pruner, [trial(n) for n in range(40)])
    sizes = {steps: 0 for steps in ((4, 16), (16,), ())}
    for number in range(40):
        sizes[pruning.rungs(number)] += 1
    assert sizes[4, 16] > sizes[16,] > sizes[()] > 0


def test_median_stops_nobody_until_enough_trials_got_there() -> None:
    pruner = PrunerConfig(kind="median", rungs=(10,), startup_trials=3)
    pruning = make(pruner, [trial(n) for n in range(5)])
    for number, loss in enumerate([1.0, 9.0, 8.0, 8.5, 2.0]):
        pruning.report(number, 10, loss)
    verdicts = pruning.decide()
    assert [verdict.keep for verdict in verdicts] == [True, True, True, False, True]
    assert verdicts[2].reason.endswith("is only the 3rd: 3 come first")
    assert verdicts[3].reason.endswith("is worse than the median of 3 before it, 8.0000")


def test_median_goes_by_the_least_loss_so_far_and_says_so() -> None:
    pruner = PrunerConfig(kind="median", rungs=(4, 16), startup_trials=2)
    pruning = make(pruner, [trial(n) for n in range(4)])
    for number, losses in enumerate([(3.0, 2.0), (3.0, 2.2), (1.5, 9.0), (2.5, 2.4)]):
        pruning.report(number, 4, losses[0])
        pruning.report(number, 16, losses[1])
    last = {v.trial: v for v in pruning.decide() if v.rung == 16}
    assert last[2].keep
    assert last[2].reason == (
        "held-out loss 9.0000 at step 16 does not count: its least so far, 1.5000, is no worse "
        "than the median of 2 before it, 2.1000"
    )
    assert not last[3].keep
    assert last[3].reason.endswith("is worse than the median of 3 before it, 2.2000")


@pytest.mark.parametrize("settings", [{"kind": "asha"}, {"kind": "median", "startup_trials": 2}])
def test_trials_of_different_lengths_compete_at_the_steps_that_they_share(
    settings: dict[str, Any],
) -> None:
    # Rungs at steps 2 and 8 for the even ones, at 8 and 32 for the odd ones.
    pruner = PrunerConfig.model_validate(settings)
    pruning = make(pruner, [trial(n, steps=(32, 128)[n % 2]) for n in range(4)])
    for number in (0, 2):
        pruning.report(number, 2, 3.0)
        pruning.report(number, 8, 1.0)
    for number in (1, 3):
        pruning.report(number, 8, 2.0)
    verdicts = {(v.trial, v.rung): v for v in pruning.decide()}
    assert len(verdicts) == 6
    assert verdicts[2, 2].keep
    assert verdicts[2, 8].keep
    assert not verdicts[3, 8].keep  # though it is better than any loss at step 2
    places = {"asha": "is the 3rd of 4 so far, and is not among the best 1"}
    words = places.get(settings["kind"], "is worse than the median of 3 before it, 1.0000")
    assert verdicts[3, 8].reason == f"held-out loss 2.0000 at step 8 {words}"


def test_nothing_is_stopped_without_a_pruner() -> None:
    pruning = make(sweep_config().search.pruner, [trial(0), trial(1)])
    for number, step in itertools.product((0, 1), (4, 16)):
        pruning.report(number, step, 5.0 * number)
    assert pruning.decide() == []
    assert pruning.is_settled(1)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    "field",
    [
        {"steps": [16, 32, 64]},
        {"batch_size": [4, 8]},
        {"adapter.use_dora": [False, True]},
    ],
    ids=str,
)
def test_no_trial_is_trained_to_its_end_and_pruned_for_it_whatever_is_searched(
    tmp_path: Path, field: dict[str, Any], num_workers: int
) -> None:
    search = {"space": {**field, "adapter.rank": [16, 12, 8, 6, 4, 2]}, "pruner": "asha"}
    config = sweep_config(search=search, trial__steps=16, resources__slots_per_pack=4)
    store = make_store(tmp_path / "run", config)
    assert make_controller(store, InProcessExecutor(SimulatedWorker), num_workers=num_workers).run()
    trained = {t.number: max(p["step"] for p in store.points(t.number)) for t in store.trials}
    ended = [t.number for t in store.trials if trained[t.number] == t.config.steps]
    assert ended == [r.number for r in store.results if r.state == "finished"]
    assert len(ended) < len(trained) / 2

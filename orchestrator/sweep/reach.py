"""How far workers of slower kinds go: which trials they begin that faster ones might end sooner.

In: the trials of a sweep before it begins, kinds of workers and Durations. Out: the best of a few
factors of `kinds.longest_for`, by the forecast of the whole sweep with each. No torch, no Ray.

`longest_for` goes by the work that waits, and takes a pack for full. That is close where many
trials wait. Where few do, what runs counts for as much, and a kind may idle for nothing or begin
what all others wait for in the end; no closed form was found that is right about both.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orchestrator.config import SweepConfig
from orchestrator.planning.durations import Durations
from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.options import Premises
from orchestrator.records import Decision, TrialSpec
from orchestrator.search.space import ask, num_trials
from orchestrator.sweep.admission import Admission
from orchestrator.sweep.forecast import Forecast, forecast
from orchestrator.sweep.policy import SweepView
from orchestrator.sweep.run_store import RunStore, checkpoint_step

ANY = 1e6  # no trial is as long
WORDS = {
    1.0: "trials that faster GPUs would not end sooner",
    0.5: "trials half as long as those that faster GPUs would not end sooner",
    2.0: "trials twice as long as those that faster GPUs would not end sooner",
    ANY: "trials of any length",
}
REACHES = tuple(WORDS)
# Beyond it a sweep is within some percent of its lower bound (docs/performance.md), and four
# forecasts would take seconds.
MOST_TRIALS = 500
# Drawn in a row without one that can be trained: then there are few, if any.
MOST_REFUSED = 100


def with_reach(store: RunStore, view: SweepView, durations: Durations | None) -> Premises:
    """Of a sweep that starts or goes on, by the trials that wait and those that it will ask for,
    where the rates of all its kinds are known."""
    premises, kinds = view.premises, view.kinds
    names = {kind.name for kind in kinds}
    if len(names) < 2 or durations is None or not durations.gpus.keys() >= names:
        return premises
    config = store.sweep.config
    trials = [_what_is_left(store, trial) for trial in view.waiting]
    num_known = len(store.trial_numbers)
    if len(trials) + num_trials(config.search) - num_known > MOST_TRIALS:
        return premises
    admission = Admission(premises, config.search.constraints, kinds)
    trials += later_trials(config, num_known, lambda trial: admission.refused_new(trial) is None)
    chosen = best_reach(trials, kinds, premises, durations)
    if chosen.reason:
        store.add_decision(Decision(time.time(), "choose_reach", "sweep", chosen.reason))
    return chosen.premises


def _what_is_left(store: RunStore, trial: TrialSpec) -> TrialSpec:
    """From its last checkpoint on."""
    checkpoints = store.checkpoints(trial.number)
    if not checkpoints:
        return trial
    steps = max(1, trial.config.steps - checkpoint_step(checkpoints[0]))
    return replace(trial, config=trial.config.model_copy(update={"steps": steps}))


@dataclass(frozen=True)
class Chosen:
    premises: Premises
    forecast: Forecast
    reason: str = ""
    """Empty where there was nothing to choose, or all came to the same."""


def best_reach(
    trials: Sequence[TrialSpec],
    kinds: Sequence[WorkerKind],
    premises: Premises,
    durations: Durations,
) -> Chosen:
    factors = REACHES if len(kinds) > 1 and len(trials) <= MOST_TRIALS else REACHES[:1]
    found = []
    for factor in factors:
        given = replace(premises, reach=factor)
        seen = forecast(trials, kinds, given, durations.block_s, durations.start_s)
        found.append(Chosen(given, seen))
    best = min(found, key=lambda one: (len(one.forecast.waiting), one.forecast.makespan_s))
    if all(one.forecast.makespan_s == best.forecast.makespan_s for one in found):
        return best
    others = (f"{one.forecast.makespan_s / 60:.1f}" for one in found if one is not best)
    slower = " and ".join(kind.name for kind in kinds[1:])
    reason = (
        f"{slower}: {WORDS[best.premises.reach]}; forecast {best.forecast.makespan_s / 60:.1f} "
        f"minutes, with other lengths {', '.join(others)}"
    )
    return replace(best, reason=reason)


def later_trials(
    config: SweepConfig, num_known: int, is_trained: Callable[[TrialSpec], bool]
) -> list[TrialSpec]:
    """In place of those that a sampler will draw once it has results: any that can be trained.
    Where few can, fewer."""
    search, missing = config.search, num_trials(config.search) - num_known
    later: list[TrialSpec] = []
    refused = 0
    for draw in itertools.count(num_known):
        if len(later) >= missing or refused == MOST_REFUSED:
            break
        blind = search.model_copy(update={"sampler": "random", "seed": search.seed + draw})
        trial = ask(config.model_copy(update={"search": blind}), (), ())
        if is_trained(trial):
            later.append(replace(trial, number=num_known + len(later)))
            refused = 0
        else:
            refused += 1
    return later

"""When a trial is stopped early: verdicts at rungs, whatever the order in which reports come in.

In: the trials, and their held-out losses at rungs as they come. Out: Verdicts with reasons. No
clock, no files. Optuna is imported only for judging.

Trials that one pack could train compete: they have the same base and batch, and start one after
another. Trial n's verdict at a rung depends on the reports there of trials
with lower numbers alone, as if they had been trained one after another; so neither a crash nor the
number of workers changes it. It is due once each of those has reported there or is out. Until then
trial n goes on, for a slot that waits costs as much as one that trains.

Optuna's pruners judge. Each rung has a study of its own, to which the trials that reach it are told
in the order of their numbers. The rung is the same unit of the study's resource for all of them,
whatever rungs each has passed before; so rungs may be at any steps, and trials of different lengths
compete at those that they share.
"""

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from orchestrator.config import TrialConfig
from orchestrator.planning.waiting import pack_key
from orchestrator.records import TrialSpec
from orchestrator.search_config import PrunerConfig

if TYPE_CHECKING:
    import optuna

DEFAULT_RUNGS = 2
BEFORE, AT_RUNG = 0, 1
"""Units of the resource in the study of one rung."""

Group = tuple[Any, ...]
"""Trials that compete: the key of their packs, and for hyperband their bracket."""


@dataclass(frozen=True)
class Verdict:
    trial: int
    rung: int
    """Steps."""
    keep: bool
    eval_loss: float
    reason: str = field(compare=False, default="")


def rung_steps(pruner: PrunerConfig, trial: TrialConfig) -> tuple[int, ...]:
    """Steps at which the trial is compared, all of them before its end."""
    if pruner.kind == "none":
        return ()
    if pruner.rungs is not None:
        return tuple(step for step in pruner.rungs if step < trial.steps)
    factor = pruner.reduction_factor
    if pruner.min_steps is None:
        # From the end, as a rung shortly before it would save nothing and take its adapter.
        found = {max(1, trial.steps // factor**back) for back in range(1, DEFAULT_RUNGS + 1)}
        return tuple(sorted(found - {trial.steps}))
    step = pruner.min_steps
    steps = []
    while step < trial.steps:
        steps.append(step)
        step *= factor
    return tuple(steps)


class Pruning:
    """What was reported at rungs, and what is decided there."""

    def __init__(self, pruner: PrunerConfig) -> None:
        self._pruner = pruner
        self._rungs: dict[int, tuple[int, ...]] = {}
        self._members: dict[Group, list[int]] = {}
        self._sizes: dict[Group, int] = {}
        self._reports: dict[tuple[int, int], float] = {}
        self._verdicts: dict[tuple[int, int], Verdict] = {}
        self._over: set[int] = set()
        self._judges: dict[tuple[Group, int], _Judge] = {}
        self._group: dict[int, Group] = {}
        self._group_rungs: dict[Group, set[int]] = {}
        self._changed: set[Group] = set()
        """In which something was heard since it was last decided."""

    def add(self, trial: TrialSpec) -> None:
        """Trials come in the order of their numbers."""
        group: Group = (pack_key(trial.config),)
        steps = rung_steps(self._pruner, trial.config)
        if self._pruner.kind == "hyperband":
            number = self._sizes[group] = self._sizes.get(group, -1) + 1
            bracket = _bracket(number, len(steps) + 1, self._pruner.reduction_factor)
            group, steps = (*group, bracket), steps[bracket:]
        self._rungs[trial.number] = steps
        self._members.setdefault(group, []).append(trial.number)
        self._group[trial.number] = group
        self._group_rungs.setdefault(group, set()).update(steps)
        self._changed.add(group)

    def rungs(self, trial: int) -> tuple[int, ...]:
        return self._rungs[trial]

    def first_open_rung(self, trial: int) -> int | None:
        """The first one that it has not reported at."""
        return next((r for r in self._rungs[trial] if (trial, r) not in self._reports), None)

    def report(self, trial: int, step: int, eval_loss: float) -> None:
        """Only the first report at a rung counts: a retried trial comes by again."""
        if step in self._rungs[trial]:
            self._reports.setdefault((trial, step), eval_loss)
            self._changed.add(self._group[trial])

    def recall(self, verdict: Verdict) -> None:
        """A verdict that was given before: it stands, whatever would be decided now."""
        self._reports[verdict.trial, verdict.rung] = verdict.eval_loss
        self._changed.add(self._group[verdict.trial])
        self._verdicts[verdict.trial, verdict.rung] = verdict

    def end(self, trial: int) -> None:
        """It will report no more."""
        self._over.add(trial)
        self._changed.add(self._group[trial])

    def stopped(self) -> list[Verdict]:
        return [verdict for verdict in self._verdicts.values() if not verdict.keep]

    def is_settled(self, trial: int) -> bool:
        """Whether each of its reports has its verdict."""
        return all(
            (trial, rung) in self._verdicts or (trial, rung) not in self._reports
            for rung in self._rungs[trial]
        )

    def decide(self) -> list[Verdict]:
        """Those that are due now, and were not given before."""
        if self._pruner.kind == "none":
            return []
        changed = [group for group in self._members if group in self._changed]
        self._changed.clear()
        return [verdict for group in changed for verdict in self._decide_in(group)]

    def _decide_in(self, group: Group) -> Iterator[Verdict]:
        members = self._members[group]
        for rung in sorted(self._group_rungs[group]):
            judge = self._judges.setdefault((group, rung), _Judge(self._pruner))
            while judge.place < len(members) and self._is_known(members[judge.place], rung):
                number = members[judge.place]
                judge.place += 1
                if (number, rung) in self._reports and not self._is_stopped(number, rung):
                    if verdict := self._judged(judge, number, rung):
                        yield verdict

    def _is_known(self, trial: int, rung: int) -> bool:
        """Whether it is certain what the trial has to say at the rung."""
        if rung not in self._rungs[trial] or self._is_stopped(trial, rung):
            return True
        before = [step for step in self._rungs[trial] if step < rung]
        if any((trial, step) not in self._verdicts for step in before):
            return trial in self._over and (trial, rung) not in self._reports
        return trial in self._over or (trial, rung) in self._reports

    def _is_stopped(self, trial: int, rung: int) -> bool:
        """At an earlier rung."""
        earlier = self._rungs[trial][: bisect.bisect_left(self._rungs[trial], rung)]
        return any(
            not verdict.keep
            for step in earlier
            if (verdict := self._verdicts.get((trial, step))) is not None
        )

    def _judged(self, judge: "_Judge", trial: int, rung: int) -> Verdict | None:
        """None if it was given before; the judge hears of the trial all the same."""
        steps = [step for step in self._rungs[trial] if step <= rung]
        losses = [self._reports[trial, step] for step in steps]
        keep, reason = judge.hear(losses)
        if (trial, rung) in self._verdicts:
            return None
        reason = f"held-out loss {losses[-1]:.4f} at step {rung} {reason}"
        verdict = Verdict(trial, rung, keep, losses[-1], reason)
        self._verdicts[trial, rung] = verdict
        return verdict


def _bracket(number: int, num_brackets: int, factor: int) -> int:
    """Of the number-th of trials that compete. Brackets get trials in Hyperband's proportion
    (arXiv:1603.06560), in turn: Optuna draws by a hash of a trial's number in its one study."""
    budgets: list[int] = [
        math.ceil(num_brackets * factor ** (num_brackets - 1 - bracket) / (num_brackets - bracket))
        for bracket in range(num_brackets)
    ]
    place = number % sum(budgets)
    # Spread over the turn, so that the first few trials are not all in the first bracket.
    order = sorted(
        ((turn + 0.5) / budget, bracket)
        for bracket, budget in enumerate(budgets)
        for turn in range(budget)
    )
    return int(order[place][1])


class _Judge:
    """One rung of one group: an Optuna study that hears of trials one after another."""

    def __init__(self, pruner: PrunerConfig) -> None:
        self.place = 0
        """Of the group's members, the next to hear of."""
        self._pruner = pruner
        self._heard: list[float] = []
        self._study: optuna.study.Study | None = None

    def hear(self, losses: list[float]) -> tuple[bool, str]:
        """A trial's losses at its rungs up to this one: whether it goes on, and why."""
        import optuna

        if self._study is None:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            sampler = optuna.samplers.RandomSampler(seed=0)
            self._study = optuna.create_study(sampler=sampler, pruner=_optuna_pruner(self._pruner))
        trial, loss = self._study.ask(), losses[-1]
        by_median = self._pruner.kind == "median"
        if by_median:  # MedianPruner goes by a trial's least loss so far
            trial.report(_least(losses), BEFORE)
        trial.report(loss, AT_RUNG)
        stop = trial.should_prune()
        self._study.tell(trial, loss)
        words = self._by_median(losses, stop) if by_median else self._by_place(loss, stop)
        return not stop, words

    def _by_median(self, losses: list[float], stop: bool) -> str:
        """Against the losses at the rung of those before it; Optuna counts none that is NaN."""
        before = [loss for loss in self._heard if not math.isnan(loss)]
        self._heard.append(losses[-1])
        enough = max(1, self._pruner.startup_trials)
        if len(before) < enough:
            return f"is only the {_ordinal(len(before) + 1)}: {enough} come first"
        verb = "is worse than" if stop else "is no worse than"
        words = f"{verb} the median of {len(before)} before it, {median(before):.4f}"
        least = _least(losses)
        if losses[-1] == least:
            return words
        return f"does not count: its least so far, {least:.4f}, {words}"

    def _by_place(self, loss: float, stop: bool) -> str:
        self._heard.append(loss)
        count = len(self._heard)
        place = _ordinal(1 + sum(other < loss for other in self._heard))
        allowed = max(1, count // self._pruner.reduction_factor)
        verb = "is not" if stop else "is"
        return f"is the {place} of {count} so far, and {verb} among the best {allowed}"


def _optuna_pruner(pruner: PrunerConfig) -> "optuna.pruners.BasePruner":
    import optuna

    if pruner.kind == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=pruner.startup_trials)
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=1, reduction_factor=pruner.reduction_factor
    )


def _least(losses: list[float]) -> float:
    """NaN only if all are."""
    return min((loss for loss in losses if not math.isnan(loss)), default=math.nan)


def _ordinal(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{({1: 'st', 2: 'nd', 3: 'rd'}).get(number % 10, 'th')}"

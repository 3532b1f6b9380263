"""What a sweep learns of its packs' speed, and how long the rest of it will take.

In: the closed form (planning/durations.py) and workers' reports; after a crash the rows of
packs.jsonl, which teach the same. Out: rows for packs.jsonl, factors of durations, hours left. No
clock: time is what reports say, so evaluations and waiting do not count. Nothing that judges trials
looks at it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.planning.durations import Durations
from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.measured import Factors, Known, Measurement, Scope
from orchestrator.planning.packs import PackPlan
from orchestrator.planning.waiting import PackKey, Waiting, work
from orchestrator.records import Checkpointed, Event, Progress, TrialOpened, TrialSpec
from orchestrator.sweep.running import RunningPack

# Seconds of steady training after which a pack is measured; and again whenever they have doubled,
# so that a pack of a week has some fifteen rows.
FIRST_AFTER_S = 20.0


@dataclass
class _Meter:
    """Of one pack: sums over its slots' reports, each slot with its share of the pack."""

    occupied: int = 0
    last: dict[int, Progress] = field(default_factory=dict)
    """Of each slot, since its pack was last disturbed. The report after that is from then on what
    the next is compared with: what a slot reports first has warm-up or an evaluation in it."""
    tokens: float = 0.0
    expected_s: float = 0.0
    measured_s: float = 0.0
    due_s: float = FIRST_AFTER_S


class Pace:
    def __init__(
        self, durations: Durations | None = None, earlier: Mapping[Scope, Known] | None = None
    ) -> None:
        """`durations` uncorrected; None where none are known: then nothing is learnt. `earlier` is
        what the sweep began with."""
        self._durations = durations
        self.factors = Factors(earlier)
        self._meters: dict[int, _Meter] = {}
        self._ids: dict[int, int] = {}
        """Of present packs by number. Each start of a sweep counts its packs from 0."""
        self._num_started = 0
        self._plans: dict[PackKey, PackPlan] = {}
        """The last one of each key."""
        self._steps: dict[int, int] = {}

    def recall(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Learn again from what packs.jsonl holds."""
        for row in rows:
            if row["what"] == "start":
                self._enter(row["pack"])
            elif row["what"] == "measured" and row["pack"] in self._ids:
                self.learn(row["pack"], row)

    def start(self, number: int, plan: PackPlan) -> None:
        self._enter(number)
        self._meters[number] = _Meter()
        if self._is_known(plan):
            self._plans[plan.key] = plan

    def take(
        self,
        number: int,
        plan: PackPlan,
        occupied: int,
        event: Event,
        trials: Mapping[int, TrialSpec],
    ) -> dict[str, Any] | None:
        """Facts for a row of packs.jsonl, once the pack is measured by enough. `occupied` slots
        were at work until the event."""
        if isinstance(event, Progress | TrialOpened):
            self._steps[event.trial] = event.step
        durations = self._durations
        if durations is None or plan.kind.name not in durations.gpus:
            return None
        meter = self._meters[number]
        if occupied != meter.occupied or not isinstance(event, Progress | Checkpointed):
            meter.last.clear()
            meter.occupied = occupied
        if not isinstance(event, Progress):
            return None
        before = meter.last.get(event.trial)
        meter.last[event.trial] = event
        if before is None or event.tokens_per_s <= 0:
            return None
        tokens = event.tokens - before.tokens
        blocks = (event.step - before.step) * trials[event.trial].config.batch_size
        block_s = durations.block_s(plan, occupied)
        meter.tokens += tokens
        meter.measured_s += tokens / event.tokens_per_s / occupied
        meter.expected_s += blocks / plan.world_size * block_s / occupied
        if round(meter.measured_s, 3) < round(meter.due_s, 3):  # sums of floats
            return None
        meter.due_s = 2 * meter.measured_s
        return {
            "gpu": durations.gpus[plan.kind.name].name,
            "base": plan.base,
            "tokens": round(meter.tokens),
            "expected_s": round(meter.expected_s, 3),
            "measured_s": round(meter.measured_s, 3),
        }

    def learn(self, number: int, row: Mapping[str, Any]) -> str:
        """From a row that is in packs.jsonl. What to say of it, if anything."""
        measured = Measurement(row["tokens"], row["expected_s"], row["measured_s"])
        return self.factors.add(self._ids[number], row["gpu"], row["base"], measured)

    @property
    def durations(self) -> Durations | None:
        """As far as they were measured; None where none are known."""
        if self._durations is None:
            return None
        return replace(self._durations, factor=self.factors.factor)

    def speeds(self, kinds: Sequence[WorkerKind]) -> tuple[WorkerKind, ...]:
        """The kinds as fast as they are measured, the fastest first."""
        return self.factors.speeds(kinds, self._durations.gpus if self._durations else {})

    def left_s(
        self,
        waiting: Waiting,
        packs: Iterable[RunningPack],
        trials: Mapping[int, TrialSpec],
        num_unasked: int,
        kinds: Sequence[WorkerKind],
    ) -> float | None:
        """Seconds until the last trial is trained, if none is stopped at a rung; None where that is
        not known. Evaluations, loads and idle slots apart."""
        # Of the whole cluster's seconds, for a block.
        speeds = {kind.name: kind.speed for kind in kinds}
        capacity = sum(kind.usable * kind.speed for kind in kinds)
        if not self._plans or not capacity:
            return None
        costs = {
            key: self._block_s(plan, plan.num_slots)
            / plan.num_slots
            * speeds.get(plan.kind.name, 1.0)
            / capacity
            for key, plan in self._plans.items()
        }
        usual = sum(costs.values()) / len(costs)
        left = sum(waiting.work(key) * costs.get(key, usual) for key in waiting.keys)
        if num_unasked:
            mean = sum(work(trial.config) for trial in trials.values()) / len(trials)
            left += num_unasked * mean * usual
        longest = 0.0
        for pack in packs:
            if not self._is_known(pack.plan) or not pack.attempts:
                continue
            configs = {number: trials[number].config for number in pack.attempts}
            blocks = [
                (config.steps - self._steps.get(number, 0)) * config.batch_size
                for number, config in configs.items()
            ]
            left += sum(blocks) * costs[pack.plan.key]
            block_s = self._block_s(pack.plan, len(blocks))
            longest = max(longest, max(blocks) / pack.plan.world_size * block_s)
        return max(left, longest)

    def _is_known(self, plan: PackPlan) -> bool:
        return self._durations is not None and plan.kind.name in self._durations.gpus

    def _block_s(self, plan: PackPlan, occupied: int) -> float:
        """As far as it was measured."""
        assert self._durations is not None
        factor = self.factors.factor(self._durations.gpus[plan.kind.name].name, plan.base)
        return self._durations.block_s(plan, occupied) * factor

    def _enter(self, number: int) -> None:
        self._ids[number] = self._num_started
        self._num_started += 1

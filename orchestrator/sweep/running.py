"""A pack that runs, as its controller keeps it, and where all of them stand."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.planning.measured import Factors
from orchestrator.planning.packs import PackPlan
from orchestrator.records import (
    Directive,
    PackReady,
    PackStanding,
    Standing,
    TrialOpened,
    TrialResult,
    TrialSpec,
)
from orchestrator.sweep.pack_views import PackView


@dataclass
class RunningPack:
    plan: PackPlan
    attempts: dict[int, int] = field(default_factory=dict)
    """Attempt number of each trial in its slots."""
    ready: bool = False
    idle: bool = False
    at_rung: bool = False
    queued: bool = False
    """Its workers wait for room."""
    leave_by: float = math.inf
    """When it is given up if it has been told to leave; monotonic seconds."""
    directives: list[Directive] = field(default_factory=list)
    stopped: list[TrialResult] = field(default_factory=list)
    """Trials that its worker may be saving until it answers: their files stay until then."""
    _seen: PackView | None = None
    _stood: PackStanding | None = None

    @property
    def leaving(self) -> bool:
        return self.leave_by < math.inf

    def view(self, number: int) -> PackView:
        """The one before, where nothing has changed: there may be a thousand packs."""
        seen = self._seen
        now = (len(self.attempts), self.ready, self.idle, self.at_rung, self.leaving)
        if seen and now == (seen.occupied, seen.ready, seen.idle, seen.at_rung, seen.leaving):
            return seen
        plan = self.plan
        self._seen = PackView(
            number,
            plan.key,
            plan.num_slots,
            len(self.attempts),
            self.ready,
            self.idle,
            plan.arithmetic,
            plan.kind.name,
            self.at_rung,
            self.leaving,
        )
        return self._seen

    def standing(self, number: int) -> PackStanding:
        """The one before, where nothing has changed."""
        trials = tuple(self.attempts)
        if self._stood is None or self._stood.trials != trials:
            memory = self.plan.fit.memory
            expected = memory.total_bytes if memory else 0
            self._stood = PackStanding(number, self.plan.num_slots, trials, expected)
        return self._stood

    @property
    def as_planned(self) -> dict[str, Any]:
        """What packs.jsonl tells of its start."""
        memory = self.plan.fit.memory
        return {
            "base": self.plan.key.title,
            "num_slots": self.plan.num_slots,
            "world_size": self.plan.world_size,
            "expected_bytes": memory.total_bytes if memory is not None else None,
        }


def standing(num_trials: int, states: Counter[str], packs: Mapping[int, RunningPack]) -> Standing:
    """`states`: trials that are over, by how. One that is trained, but has a verdict due, counts as
    waiting."""
    stand = tuple(pack.standing(number) for number, pack in packs.items())
    taken = sum(len(pack.trials) for pack in stand)
    return Standing(
        num_trials - states.total() - taken,
        states["finished"],
        states["pruned"],
        states["failed"],
        stand,
    )


def plan_record(
    packs: Iterable[tuple[PackPlan, Sequence[TrialSpec]]], num_workers: int, factors: Factors
) -> dict[str, Any]:
    """What plan.json tells of the packs that a start begins with."""
    return {
        "num_workers": num_workers,
        "speed": factors.to_json(),
        "packs": [
            plan.to_json() | {"trials": [trial.number for trial in members]}
            for plan, members in packs
        ],
    }


def ready_notes(event: PackReady) -> list[str]:
    """What the user should know of a pack that is loaded."""
    program = f"its step program is {event.step_program}: {event.note}" if event.note else ""
    return [words for words in (program, event.base_note) if words]


def why_resumed(event: TrialOpened) -> str:
    """Empty for a trial that begins at its first step."""
    if not event.step and not event.refused_checkpoints:
        return ""
    reason = f"attempt {event.attempt} goes on from step {event.step}"
    if event.note:
        reason += f"; {event.note}"
    if event.refused_checkpoints:
        reason += f"; passed over: {'; '.join(event.refused_checkpoints)}"
    return reason

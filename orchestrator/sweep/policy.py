"""What the controller should do next: a pure function from a snapshot of the sweep to actions.

In: SweepView. Out: actions, each with its reason. No clock, no Ray, no files.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.options import Premises
from orchestrator.planning.packs import (
    PackPlan,
    longest_here,
    one_kind,
    plan_packs,
    what_is_kept,
    why_not_kept,
)
from orchestrator.planning.waiting import Kept, Lines, PackKey, indexed
from orchestrator.records import TrialSpec
from orchestrator.sweep.pack_views import OpenPacks, Packs, PackView, indexed_packs


@dataclass(frozen=True)
class SweepView:
    waiting: Sequence[TrialSpec]
    """Trials that are neither over nor in a slot; a `Waiting` saves sorting them each time."""
    packs: Iterable[PackView]
    """A `Packs` saves going over all of them each time."""
    num_workers: int
    premises: Premises
    interrupted: bool = False
    had: Kept = field(default_factory=dict)
    """What the waiting trials that have a checkpoint were trained with."""
    kinds: tuple[WorkerKind, ...] = ()
    """Of the workers, the fastest first; empty where all are alike."""

    @property
    def all_kinds(self) -> tuple[WorkerKind, ...]:
        return self.kinds or one_kind(self.num_workers, self.premises)


@dataclass(frozen=True)
class StartPack:
    plan: PackPlan
    reason: str = field(default="", compare=False)


@dataclass(frozen=True)
class AssignTrial:
    pack: int
    trial: int
    reason: str = field(default="", compare=False)


@dataclass(frozen=True)
class ReleasePack:
    pack: int
    save: bool
    reason: str = field(default="", compare=False)


@dataclass(frozen=True)
class AbandonPack:
    """End a worker that is still loading."""

    pack: int
    reason: str = field(default="", compare=False)


Action = StartPack | AssignTrial | ReleasePack | AbandonPack


def decide(view: SweepView) -> list[Action]:
    if view.interrupted:
        return list(_interrupt(view))
    waiting = indexed(view.waiting, view.premises)
    half_trained = waiting.among(view.had)
    lines = Lines(waiting, what_is_kept(half_trained, view.had, view.all_kinds, view.premises))
    packs = indexed_packs(view.packs)
    free = _free_workers(view, packs)
    actions: list[Action] = []
    for pack in packs.idle:
        actions += _fill(view, pack, lines)
    open_packs = packs.open
    if free or not _enough(open_packs, lines):
        for alike in open_packs:
            actions += _reserve(view, alike, lines)
    return actions + _start(view, packs, lines, free)


def _interrupt(view: SweepView) -> Sequence[Action]:
    reason = "the sweep was asked to stop"
    return [
        ReleasePack(pack.number, save=True, reason=reason)
        if pack.ready
        else AbandonPack(pack.number, reason=reason)
        for pack in view.packs
        if pack.idle or not pack.ready
    ]


def _fill(view: SweepView, pack: PackView, lines: Lines) -> list[Action]:
    """Give the free slots of a pack that waits to trials; takes them out of `lines`."""
    taken = _take(view, pack, pack.free, lines)
    if not taken and not pack.occupied:
        return [ReleasePack(pack.number, save=False, reason=_why_none(pack, lines))]
    return [
        AssignTrial(pack.number, trial.number, _why_assigned(view, pack, trial)) for trial in taken
    ]


def _why_none(pack: PackView, lines: Lines) -> str:
    waits = "that faster workers would not end sooner " if lines.left(pack.key) else ""
    return f"no trial waits {waits}for a {pack.key.title} base"


def _take(view: SweepView, pack: PackView, most: int, lines: Lines) -> list[TrialSpec]:
    """The next trials for packs like this one: none that faster workers would end sooner."""
    longest = math.inf
    if view.kinds:
        kind = next(kind for kind in view.kinds if kind.name == pack.kind)
        slots = pack.num_slots
        longest = longest_here(pack.key, kind, slots, lines, view.kinds, view.premises)
    return lines.take(pack.key, pack.arithmetic, most, longest)


def _enough(open_packs: Sequence[OpenPacks], lines: Lines) -> bool:
    """Whether there are trials for all slots that these will have free."""
    wanted: Counter[PackKey] = Counter()
    for alike in open_packs:
        wanted[alike.first.key] += alike.free
    return all(
        lines.count(pack.key, pack.arithmetic) >= wanted[pack.key]
        for pack in (alike.first for alike in open_packs)
    )


def _reserve(view: SweepView, alike: OpenPacks, lines: Lines) -> list[Action]:
    """The trials that these packs will take once they have loaded, or answer, are spoken for."""
    left = len(_take(view, alike.first, alike.free, lines))
    if left == alike.free or not alike.loading:
        return []
    actions: list[Action] = []
    for pack in alike:
        if not left and not pack.ready:
            actions.append(AbandonPack(pack.number, _why_none(pack, lines)))
        left -= min(left, pack.free)
    return actions


def _why_assigned(view: SweepView, pack: PackView, trial: TrialSpec) -> str:
    reason = f"a slot of pack {pack.number} is free"
    had = view.had.get(trial.number)
    if had in (None, pack.arithmetic):
        return reason
    why = why_not_kept(trial.config, had, view.all_kinds, view.premises)
    return f"{reason}; planned anew, as it was trained with {had} so far and {why}"


def _free_workers(view: SweepView, packs: Packs) -> list[WorkerKind]:
    """Of each kind; empty where none is free."""
    free = [replace(kind, count=kind.count - packs.workers[kind.name]) for kind in view.all_kinds]
    return free if any(kind.count > 0 for kind in free) else []


def _start(view: SweepView, packs: Packs, lines: Lines, free: Sequence[WorkerKind]) -> list[Action]:
    if not free or not lines.all_left:
        return []
    return [
        StartPack(plan, plan.reason)
        for plan, _ in plan_packs(lines, packs.active, free, view.premises, view.all_kinds)
    ]

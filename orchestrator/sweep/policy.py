"""What the controller should do next: a pure function from a snapshot of the sweep to actions.

In: SweepView. Out: actions, each with its reason. No clock, no Ray, no files.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cached_property

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

# Claims move while a sweep begins, ends or asks for trials: what is over for less is not given up.
SETTLED_AFTER_S = 5.0
# How long a pack may train on to its next rung or checkpoint: one saved at any step is as exact and
# takes about a second, but the passes of a step that is not complete are made again.
RUNG_WITHIN_S = 60.0


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
    limits: Mapping[str, int] = field(default_factory=dict)
    """Workers that the sweep may use now, of the kinds that others on its cluster claim too."""
    over_s: float = 0.0
    """How long its packs have had more than that."""
    queued: AbstractSet[int] = frozenset()
    """Packs whose workers are lost, or held by somebody who makes no claims: they wait in Ray's
    queue."""

    @cached_property
    def all_kinds(self) -> tuple[WorkerKind, ...]:
        kinds = self.kinds or one_kind(self.num_workers, self.premises)
        if self.limits:
            kinds = tuple(replace(kind, limit=self.limits.get(kind.name)) for kind in kinds)
        if self.queued:
            packs = indexed_packs(self.packs)
            queued: Counter[str] = Counter()
            for number in self.queued:
                queued[packs[number].kind] += packs[number].arithmetic.world_size
            kinds = tuple(replace(kind, queued=queued[kind.name]) for kind in kinds)
        return kinds


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


@dataclass(frozen=True)
class YieldPack:
    """End a pack for other sweeps: its trials are saved, and wait; one that loads has none."""

    pack: int
    reason: str = field(default="", compare=False)


Action = StartPack | AssignTrial | ReleasePack | AbandonPack | YieldPack


def decide(view: SweepView) -> list[Action]:
    if view.interrupted:
        return list(_interrupt(view))
    waiting = indexed(view.waiting, view.premises)
    half_trained = waiting.among(view.had)
    lines = Lines(waiting, what_is_kept(half_trained, view.had, view.all_kinds, view.premises))
    packs = indexed_packs(view.packs)
    free = _free_workers(view, packs)
    ended = _give_way(view)
    gone = {action.pack for action in ended}
    actions: list[Action] = [*ended]
    for pack in packs.idle:
        if pack.number not in gone:
            actions += _fill(view, pack, lines)
    open_packs = packs.open
    if not free and _enough(open_packs, lines):
        return actions
    queued: list[OpenPacks] = []
    if view.queued:  # workers that are there do not idle for packs that may wait for ever
        parts = [alike.parted(view.queued) for alike in open_packs]
        open_packs = [others for others, _ in parts if others.views]
        queued = [these for _, these in parts if these.views]
    dropped = [drop for alike in open_packs for drop in _reserve(view, alike, lines)]
    started = _start(view, packs, lines, free)
    dropped += [drop for alike in queued for drop in _reserve(view, alike, lines)]
    return [*actions, *(drop for drop in dropped if drop.pack not in gone), *started]


def _interrupt(view: SweepView) -> Sequence[Action]:
    reason = "the sweep was asked to stop"
    return [
        ReleasePack(pack.number, save=True, reason=reason)
        if pack.ready
        else AbandonPack(pack.number, reason=reason)
        for pack in view.packs
        if pack.idle or not pack.ready
    ]


def workers_over(view: SweepView) -> dict[str, int]:
    """By kind, how many more than its share the sweep has, apart from packs that are leaving."""
    if not view.limits:
        return {}
    held: Counter[str] = Counter()
    for pack in view.packs:
        if not pack.leaving:
            held[pack.kind] += pack.arithmetic.world_size
    return {kind: max(0, held[kind] - limit) for kind, limit in view.limits.items()}


def _give_way(view: SweepView) -> list[YieldPack]:
    """Packs beyond the share, those first that lose least: the ones that load, then the ones with
    the fewest trials, at a rung or a checkpoint if one comes in time."""
    ended: list[YieldPack] = []
    if view.over_s < SETTLED_AFTER_S:
        return ended
    overdue = view.over_s >= RUNG_WITHIN_S
    for kind, over in workers_over(view).items():
        able = [pack for pack in view.packs if pack.kind == kind and _may_go(pack, overdue)]
        for pack in sorted(able, key=lambda pack: (pack.ready, pack.occupied, -pack.number)):
            if over <= 0:
                break
            if pack.arithmetic.world_size > over and not overdue:
                continue  # smaller ones may come to a rung
            over -= pack.arithmetic.world_size
            ended.append(YieldPack(pack.number, f"gives way to another sweep: {_why_now(pack)}"))
    return ended


def _why_now(pack: PackView) -> str:
    if not pack.ready:
        return "it is not loaded yet"
    if not pack.occupied:
        return "it is empty"
    if pack.at_rung:
        return "a trial is at a rung or checkpoint"
    return f"no rung or checkpoint came within {RUNG_WITHIN_S:.0f} s"


def _may_go(pack: PackView, overdue: bool) -> bool:
    return not pack.ready or (pack.idle and (pack.at_rung or not pack.occupied or overdue))


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
        kinds, slots = view.all_kinds, pack.num_slots
        kind = next(kind for kind in kinds if kind.name == pack.kind)
        longest = longest_here(pack.key, kind, slots, lines, kinds, view.premises)
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


def _reserve(view: SweepView, alike: OpenPacks, lines: Lines) -> list[AbandonPack]:
    """The trials that these packs will take once they have loaded, or answer, are spoken for."""
    left = len(_take(view, alike.first, alike.free, lines))
    if left == alike.free or not alike.loading:
        return []
    actions: list[AbandonPack] = []
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
    """Of each kind; empty where none is free. Beside a pack that Ray has no room for there is none
    for another."""
    free = [
        replace(kind, count=max(0, kind.usable - packs.workers[kind.name]) * (not kind.queued))
        for kind in view.all_kinds
    ]
    return free if any(kind.count > 0 for kind in free) else []


def _start(view: SweepView, packs: Packs, lines: Lines, free: Sequence[WorkerKind]) -> list[Action]:
    if not free or not lines.all_left:
        return []
    return [
        StartPack(plan, plan.reason)
        for plan, _ in plan_packs(lines, packs.active, free, view.premises, view.all_kinds)
    ]

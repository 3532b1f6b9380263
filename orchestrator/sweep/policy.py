"""What the controller should do next: a pure function from a snapshot of the sweep to actions.

In: SweepView. Out: actions, each with its reason. No clock, no Ray, no files.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
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
from orchestrator.records import Arithmetic, TrialSpec


@dataclass(frozen=True)
class PackView:
    number: int
    key: PackKey
    num_slots: int
    occupied: int
    ready: bool
    """The base is loaded."""
    idle: bool
    """It has answered and waits to be told to go on."""
    arithmetic: Arithmetic = Arithmetic(1, 1, False)
    kind: str = ""
    """Of its workers."""


@dataclass(frozen=True)
class SweepView:
    waiting: Sequence[TrialSpec]
    """Trials that are neither over nor in a slot; a `Waiting` saves sorting them each time."""
    packs: tuple[PackView, ...]
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


Alike = tuple[PackKey, Arithmetic, str, int]
"""Packs of one key, arithmetic, kind and number of slots."""

Action = StartPack | AssignTrial | ReleasePack | AbandonPack


def decide(view: SweepView) -> list[Action]:
    if view.interrupted:
        return list(_interrupt(view))
    waiting = indexed(view.waiting, view.premises)
    half_trained = waiting.among(view.had)
    lines = Lines(waiting, what_is_kept(half_trained, view.had, view.all_kinds, view.premises))
    free = _free_workers(view)
    actions: list[Action] = []
    others: dict[Alike, list[PackView]] = {}
    for pack in view.packs:
        if pack.idle:
            actions += _fill(view, pack, lines)
        elif pack.occupied < pack.num_slots:
            others.setdefault(_alike(pack), []).append(pack)
    if free or not _enough(others, lines):
        for packs in others.values():
            actions += _reserve(view, packs, lines)
    return actions + _start(view, lines, free)


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
    taken = _take(view, pack, pack.num_slots - pack.occupied, lines)
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


def _alike(pack: PackView) -> Alike:
    return pack.key, pack.arithmetic, pack.kind, pack.num_slots


def _enough(others: Mapping[Alike, Sequence[PackView]], lines: Lines) -> bool:
    """Whether there are trials for all slots that these will have free."""
    wanted: Counter[PackKey] = Counter()
    for (key, *_), packs in others.items():
        wanted[key] += _num_free(packs)
    return all(lines.count(key, arithmetic) >= wanted[key] for key, arithmetic, _, _ in others)


def _reserve(view: SweepView, packs: Sequence[PackView], lines: Lines) -> list[Action]:
    """The trials that packs, all alike, will take once they have loaded, or answer, are spoken
    for."""
    left = len(_take(view, packs[0], _num_free(packs), lines))
    actions: list[Action] = []
    for pack in packs:
        if not left and not pack.ready:
            actions.append(AbandonPack(pack.number, _why_none(pack, lines)))
        left -= min(left, pack.num_slots - pack.occupied)
    return actions


def _num_free(packs: Sequence[PackView]) -> int:
    return sum(pack.num_slots - pack.occupied for pack in packs)


def _why_assigned(view: SweepView, pack: PackView, trial: TrialSpec) -> str:
    reason = f"a slot of pack {pack.number} is free"
    had = view.had.get(trial.number)
    if had in (None, pack.arithmetic):
        return reason
    why = why_not_kept(trial.config, had, view.all_kinds, view.premises)
    return f"{reason}; planned anew, as it was trained with {had} so far and {why}"


def _free_workers(view: SweepView) -> list[WorkerKind]:
    """Of each kind; empty where none is free."""
    used: dict[str, int] = {}
    for pack in view.packs:
        used[pack.kind] = used.get(pack.kind, 0) + pack.arithmetic.world_size
    free = [replace(kind, count=kind.count - used.get(kind.name, 0)) for kind in view.all_kinds]
    return free if any(kind.count > 0 for kind in free) else []


def _start(view: SweepView, lines: Lines, free: Sequence[WorkerKind]) -> list[Action]:
    if not free or not lines.all_left:
        return []
    active = Counter(pack.key for pack in view.packs)
    return [
        StartPack(plan, plan.reason)
        for plan, _ in plan_packs(lines, active, free, view.premises, view.all_kinds)
    ]

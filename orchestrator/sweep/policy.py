"""What the controller should do next: a pure function from a snapshot of the sweep to actions.

In: SweepView. Out: actions, each with its reason. No clock, no Ray, no files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.planning.options import Premises
from orchestrator.planning.packs import (
    Kept,
    PackKey,
    PackPlan,
    by_key,
    can_train,
    plan_packs,
    what_is_kept,
    why_not_kept,
)
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


@dataclass(frozen=True)
class SweepView:
    waiting: tuple[TrialSpec, ...]
    """Trials that are neither over nor in a slot, in the order in which they should start."""
    packs: tuple[PackView, ...]
    num_workers: int
    premises: Premises
    interrupted: bool = False
    had: Kept = field(default_factory=dict)
    """What the waiting trials that have a checkpoint were trained with."""


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
    kept = what_is_kept(view.waiting, view.had, view.num_workers, view.premises)
    waiting = by_key(view.waiting, kept)
    actions: list[Action] = []
    for pack in view.packs:
        actions += _fill(view, pack, waiting, kept)
    return actions + _start(view, waiting, kept)


def _interrupt(view: SweepView) -> Sequence[Action]:
    reason = "the sweep was asked to stop"
    return [
        ReleasePack(pack.number, save=True, reason=reason)
        if pack.ready
        else AbandonPack(pack.number, reason=reason)
        for pack in view.packs
        if pack.idle or not pack.ready
    ]


def _fill(
    view: SweepView, pack: PackView, waiting: dict[PackKey, list[TrialSpec]], kept: Kept
) -> list[Action]:
    """Give a pack's free slots to waiting trials; takes them out of `waiting`."""
    queue = waiting.get(pack.key, [])
    free = pack.num_slots - pack.occupied
    taken = [trial for trial in queue if can_train(pack.arithmetic, trial, kept)][:free]
    waiting[pack.key] = [trial for trial in queue if trial not in taken]
    if not pack.ready and not taken:
        return [AbandonPack(pack.number, f"no trial waits for a {pack.key.title} base any more")]
    if not pack.idle:
        return []  # loading or training: the trials it will take are spoken for
    if not taken and not pack.occupied:
        reason = f"no trial waits for a {pack.key.title} base"
        return [ReleasePack(pack.number, save=False, reason=reason)]
    return [
        AssignTrial(pack.number, trial.number, _why_assigned(view, pack, trial)) for trial in taken
    ]


def _why_assigned(view: SweepView, pack: PackView, trial: TrialSpec) -> str:
    reason = f"a slot of pack {pack.number} is free"
    had = view.had.get(trial.number)
    if had in (None, pack.arithmetic):
        return reason
    why = why_not_kept(trial.config, had, view.num_workers, view.premises)
    return f"{reason}; planned anew, as it was trained with {had} so far and {why}"


def _start(view: SweepView, waiting: dict[PackKey, list[TrialSpec]], kept: Kept) -> list[Action]:
    active: dict[PackKey, int] = {}
    for pack in view.packs:
        active[pack.key] = active.get(pack.key, 0) + 1
    free_workers = view.num_workers - sum(pack.arithmetic.world_size for pack in view.packs)
    return [
        StartPack(plan, plan.reason)
        for plan, _ in plan_packs(waiting, active, free_workers, view.premises, kept)
    ]

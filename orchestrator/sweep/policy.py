"""What the controller should do next: a pure function from a snapshot of the sweep to actions.

In: SweepView. Out: actions, each with its reason. No clock, no Ray, no files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.planning.options import Premises
from orchestrator.planning.packs import PackKey, PackPlan, pack_key, plan_packs
from orchestrator.records import TrialSpec


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
    world_size: int = 1
    pass_blocks: int = 1
    """Blocks of a trial that its workers together take through one pass."""

    def can_train(self, trial: TrialSpec) -> bool:
        return trial.config.batch_size % self.pass_blocks == 0


@dataclass(frozen=True)
class SweepView:
    waiting: tuple[TrialSpec, ...]
    """Trials that are neither over nor in a slot, in the order in which they should start."""
    packs: tuple[PackView, ...]
    num_workers: int
    premises: Premises
    interrupted: bool = False


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
    waiting = _by_key(view.waiting)
    actions: list[Action] = []
    for pack in view.packs:
        actions += _fill(pack, waiting)
    return actions + _start(view, waiting)


def _interrupt(view: SweepView) -> Sequence[Action]:
    reason = "the sweep was asked to stop"
    return [
        ReleasePack(pack.number, save=True, reason=reason)
        if pack.ready
        else AbandonPack(pack.number, reason=reason)
        for pack in view.packs
        if pack.idle or not pack.ready
    ]


def _fill(pack: PackView, waiting: dict[PackKey, list[TrialSpec]]) -> list[Action]:
    """Give a pack's free slots to waiting trials; takes them out of `waiting`."""
    queue = waiting.get(pack.key, [])
    free = pack.num_slots - pack.occupied
    # Trials that set a micro-batch may differ in their batch, and workers share one evenly.
    taken = [trial for trial in queue if pack.can_train(trial)][:free]
    waiting[pack.key] = [trial for trial in queue if trial not in taken]
    if not pack.ready and not taken:
        return [AbandonPack(pack.number, f"no trial waits for a {pack.key.title} base any more")]
    if not pack.idle:
        return []  # loading or training: the trials it will take are spoken for
    if not taken and not pack.occupied:
        reason = f"no trial waits for a {pack.key.title} base"
        return [ReleasePack(pack.number, save=False, reason=reason)]
    return [
        AssignTrial(pack.number, trial.number, f"a slot of pack {pack.number} is free")
        for trial in taken
    ]


def _start(view: SweepView, waiting: dict[PackKey, list[TrialSpec]]) -> list[Action]:
    active: dict[PackKey, int] = {}
    for pack in view.packs:
        active[pack.key] = active.get(pack.key, 0) + 1
    free_workers = view.num_workers - sum(pack.world_size for pack in view.packs)
    return [
        StartPack(plan, plan.reason)
        for plan, _ in plan_packs(waiting, active, free_workers, view.premises)
    ]


def _by_key(trials: Sequence[TrialSpec]) -> dict[PackKey, list[TrialSpec]]:
    groups: dict[PackKey, list[TrialSpec]] = {}
    for trial in trials:
        groups.setdefault(pack_key(trial.config), []).append(trial)
    return groups

"""Which trials share a pack, which pack free workers should start next, and with how many of them.

In: trials and Premises. Out: PackPlan records with reasons. Pure: no torch, no Ray.

Trials are spread over the workers first; only where there are fewer trials than free GPUs does a
pack get several, each with a part of every step's blocks. A pack serves the trials whose batch its
workers can share evenly: see Arithmetic.pass_blocks. None is planned for trials that have problems.

Where workers are of several kinds, a pack has workers of one and is planned for it. Without a
pruner the longest trials wait in front; and the fastest workers are served first, so that what is
begun last is short.

A trial that goes on from a checkpoint keeps the Arithmetic that it had, as if it were set, and so
ends with the same bits. A fresh one may join a pack of any.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.config import TrialConfig
from orchestrator.planning.fit import BUDGET_FRACTION, Fit, after_out_of_memory, fit
from orchestrator.planning.holding import (
    AS_HAD,
    least_workers,
    pack_wish,
    premises_for,
    takers,
)
from orchestrator.planning.kinds import ALIKE, WorkerKind, longest_for
from orchestrator.planning.options import Premises
from orchestrator.planning.waiting import FRESH, Kept, Lines, PackKey, indexed, pack_key
from orchestrator.records import Arithmetic, TrialSpec
from orchestrator.wording import counted


@dataclass(frozen=True)
class PackPlan:
    key: PackKey
    world_size: int
    """Workers that train the pack together."""
    fit: Fit
    reason: str
    kind: WorkerKind = ALIKE
    """Of its workers."""

    @property
    def num_slots(self) -> int:
        return self.fit.num_slots

    @property
    def base(self) -> str:
        """As its workers hold it, in words."""
        return self.key.title + (", dequantised" if self.fit.dequantise_once else "")

    @property
    def arithmetic(self) -> Arithmetic:
        chosen = self.fit
        return Arithmetic(
            self.world_size,
            chosen.micro_batch_size,
            chosen.gradient_checkpointing,
            chosen.kept_layers,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.key.title,
            "world_size": self.world_size,
            "kind": self.kind.name,
            "reason": self.reason,
            **asdict(self.fit),
        }


def what_is_kept(
    half_trained: Sequence[TrialSpec], had: Kept, kinds: Sequence[WorkerKind], premises: Premises
) -> dict[int, Arithmetic]:
    """Of what half-trained trials had, that which the workers still allow."""
    return {
        trial.number: had[trial.number]
        for trial in half_trained
        if not why_not_kept(trial.config, had[trial.number], kinds, premises)
    }


def why_not_kept(
    trial: TrialConfig, had: Arithmetic, kinds: Sequence[WorkerKind], premises: Premises
) -> str:
    """Why a half-trained trial must go on with another arithmetic; empty if it need not."""
    wanted = premises.resources.workers_per_pack
    if wanted not in (None, had.world_size):
        return f"resources.workers_per_pack is {wanted} now"
    large = [kind for kind in kinds if kind.count >= had.world_size]
    if not large:
        return f"the sweep has {counted(sum(kind.count for kind in kinds), 'worker')} now"
    key = pack_key(trial)
    wish = pack_wish(key, 1, 1, had.world_size, premises, had)
    if not any(fit(premises_for(kind, premises, key), wish).fits for kind in large):
        return "it does not fit the memory now"
    return ""


def one_kind(num_workers: int, premises: Premises) -> tuple[WorkerKind, ...]:
    """Of workers that are all alike."""
    return (replace(ALIKE, count=num_workers),)


def plan_pack(
    lines: Lines,
    active: Mapping[PackKey, int],
    free: Sequence[WorkerKind],
    premises: Premises,
    kinds: Sequence[WorkerKind] = (),
) -> PackPlan | None:
    """The pack that the first of the free kinds should start next; None when nothing is to be
    started. `active` counts the packs of each key; `kinds` are all, the busy ones too.

    The key with the most waiting work per pack goes first, of those that this kind should train.
    Slots are chosen so that the trials spread over the free workers in even waves, unless the
    configuration sets them.
    """
    kind, kinds = free[0], kinds or free
    if kind.count <= 0:
        return None
    groups = {}
    for key in lines.keys:
        if group := _group(key, lines, kind, kinds, premises):
            groups[key] = group
    for key in sorted(
        groups, key=lambda key: lines.work_left(key) / (1 + active.get(key, 0)), reverse=True
    ):
        plan = _planned(key, groups[key], lines, free, premises, len(groups))
        if plan is not None and _begins_one(plan, lines, kinds, premises):
            return plan
    return None


def _begins_one(
    plan: PackPlan, lines: Lines, kinds: Sequence[WorkerKind], premises: Premises
) -> bool:
    """Whether any waiting trial is short enough for as many slots as were chosen."""
    longest = longest_here(plan.key, plan.kind, plan.num_slots, lines, kinds, premises)
    return longest == math.inf or lines.shortest(plan.key) <= longest


@dataclass(frozen=True)
class _Group:
    """Trials of one key that the next pack of a kind can train."""

    had: Arithmetic | None
    num_trials: int
    takers: Sequence[WorkerKind]


def _group(
    key: PackKey,
    lines: Lines,
    kind: WorkerKind,
    kinds: Sequence[WorkerKind],
    premises: Premises,
) -> _Group | None:
    """None where a pack of this kind should begin none of them."""
    had = lines.half_trained(key, kind.count)
    for kept in (had, None) if had else (None,):
        found = takers(key, kinds, premises, kept)
        if all(other.name != kind.name for other in found):
            continue
        longest = premises.reach * longest_for(kind, 1, found, lines.all_work_left)
        if longest < math.inf and lines.shortest(key) > longest:
            continue
        if number := lines.count(key, kept):
            return _Group(kept, number, found)
    return None


def _planned(
    key: PackKey,
    group: _Group,
    lines: Lines,
    free: Sequence[WorkerKind],
    premises: Premises,
    num_groups: int,
) -> PackPlan | None:
    """None where it needs more workers than are free."""
    kind, had, number = free[0], group.had, group.num_trials
    workers = sum(other.count for other in free)
    if had is None:
        world_size, why = _world_size(key, number, lines, kind.count, workers, premises)
        whole = next(other for other in group.takers if other.name == kind.name)
        if (least := least_workers(key, whole, premises, lines.parts(key))) > world_size:
            world_size, why = least, f"{counted(least, 'worker')}, as fewer do not hold it"
    else:
        world_size, why = had.world_size, f"{counted(had.world_size, 'worker')}, {AS_HAD}"
    if world_size > kind.count:
        return None
    share = math.ceil(
        number / max(1.0, _num_packs(key, lines, free, group.takers, world_size, num_groups))
    )
    given = premises_for(kind, premises, key)
    chosen = fit(given, pack_wish(key, number, share, world_size, given, had))
    on = f" on {kind.name}" if kind.name else ""
    most = key.max_slots
    limit = (
        [f"at most {counted(most, 'slot')}, as an earlier pack of theirs raised"] if most else []
    )
    reason = "; ".join((f"{key.title}{on}: {why}", *limit, *chosen.reasons))
    return PackPlan(key, world_size, chosen, reason, kind)


def _num_packs(
    key: PackKey,
    lines: Lines,
    free: Sequence[WorkerKind],
    found: Sequence[WorkerKind],
    world_size: int,
    num_groups: int,
) -> float:
    """Packs like the next one over which this key's trials will spread."""
    if len(found) < 2 and len(free) < 2:  # each other waiting key gets a pack too
        return sum(kind.count for kind in free) // world_size - (num_groups - 1)
    # Faster workers, the busy ones as well, take more trials in their turn.
    equal = sum(kind.usable * kind.speed for kind in found) / free[0].speed
    return equal / world_size * lines.work_left(key) / lines.all_work_left


def longest_here(
    key: PackKey,
    kind: WorkerKind,
    num_slots: int,
    lines: Lines,
    kinds: Sequence[WorkerKind],
    premises: Premises,
) -> float:
    """Blocks of the longest trial of this key that a pack of this kind should still begin."""
    found = takers(key, kinds, premises)
    return premises.reach * longest_for(kind, num_slots, found, lines.all_work_left)


def learn_from(
    lost: PackPlan, premises: Premises, kinds: Sequence[WorkerKind] = ()
) -> tuple[Premises, str] | None:
    """What the planner goes by once this pack ran out of memory, and why; None where it could give
    up nothing more, and no kind with more memory is left to try."""
    given = premises_for(lost.kind, premises, lost.key)
    if _is_outdated(lost, given):
        return premises, "it was planned before another such pack taught this"
    wish = pack_wish(lost.key, lost.num_slots, lost.num_slots, lost.world_size, given)
    learned = after_out_of_memory(given, wish, lost.fit)
    if learned is None or learned[0] == given:
        return _on_larger(lost, premises, kinds)
    known, reason = learned
    if lost.fit.memory is None:  # of a base without an estimate: slots are what can be given up
        return replace(premises, max_slots_unknown=known.max_slots_unknown), reason
    # Of other packs, and on other kinds of workers, nothing is known yet.
    part = known.worker_memory_bytes / premises_for(lost.kind, premises).worker_memory_bytes
    less = (lost.key.unlimited.digest, lost.kind.name, part)
    return replace(premises, less=premises.less | {less}), reason


def _is_outdated(lost: PackPlan, given: Premises) -> bool:
    """Whether such packs take less by now: equal ones run out at about the same time."""
    if lost.fit.memory is None:  # slots that are set are never given up
        unset = given.resources.slots_per_pack is None
        return unset and lost.num_slots > given.max_slots_unknown
    return lost.fit.budget_bytes > int(BUDGET_FRACTION * given.worker_memory_bytes)


def _on_larger(
    lost: PackPlan, premises: Premises, kinds: Sequence[WorkerKind]
) -> tuple[Premises, str] | None:
    memory_bytes = lost.kind.memory_bytes
    known = replace(
        premises, ran_out=premises.ran_out | {(lost.key.unlimited.digest, memory_bytes)}
    )
    found = takers(lost.key, kinds, known)
    larger = [kind.name for kind in found if kind.memory_bytes > memory_bytes]
    if not larger:
        return None
    names = " and ".join(larger)
    return known, f"{lost.key.title} runs out of the memory of {lost.kind.name}: only on {names}"


def preview_packs(
    trials: Sequence[TrialSpec],
    num_workers: int,
    premises: Premises,
    had: Kept = FRESH,
    kinds: Sequence[WorkerKind] = (),
) -> list[tuple[PackPlan, list[TrialSpec]]]:
    """The packs that start at once, and the trials in their slots."""
    kinds = kinds or one_kind(num_workers, premises)
    waiting = indexed(trials, premises)
    kept = what_is_kept(waiting.among(had), had, kinds, premises)
    return list(plan_packs(Lines(waiting, kept), {}, kinds, premises, kinds))


def plan_packs(
    lines: Lines,
    active: Mapping[PackKey, int],
    free: Sequence[WorkerKind],
    premises: Premises,
    kinds: Sequence[WorkerKind] = (),
) -> Iterator[tuple[PackPlan, list[TrialSpec]]]:
    """Packs for all free workers, and the trials in their slots."""
    active = dict(active)
    left = list(free)
    while left:
        plan = plan_pack(lines, active, left, premises, kinds)
        members: list[TrialSpec] = []
        if plan is not None:
            longest = longest_here(
                plan.key, plan.kind, plan.num_slots, lines, kinds or free, premises
            )
            members = lines.take(plan.key, plan.arithmetic, plan.num_slots, longest)
        if plan is None or not members:
            left.pop(0)
            continue
        yield plan, members
        active[plan.key] = active.get(plan.key, 0) + 1
        left[0] = replace(left[0], count=left[0].count - plan.world_size)


def _world_size(
    key: PackKey,
    number: int,
    lines: Lines,
    free_here: int,
    free_workers: int,
    premises: Premises,
) -> tuple[int, str]:
    """Workers for the next pack of this key, and why; `free_here` are of the kind in question."""
    wanted = premises.resources.workers_per_pack
    if wanted is not None:
        words = f"{counted(wanted, 'worker')}, as set"
        idle = free_here - wanted
        if 0 < idle < wanted:
            words += f", which leaves {idle} of {free_here} free ones idle"
        return wanted, words
    # Every waiting trial gets a pack of its own before any pack gets a second worker.
    num_waiting = lines.all_left
    spare = min(free_workers // num_waiting, free_here)
    if premises.device == "cpu" or spare < 2:
        return 1, f"1 worker, {number} waiting over {free_workers} free"
    parts = lines.parts(key)
    size = max(count for count in range(1, spare + 1) if parts % count == 0)
    few = f"{num_waiting} waiting over {free_workers} free"
    if size == spare:
        return size, f"{counted(size, 'worker')}, {few}"
    return size, f"{counted(size, 'worker')}, {few}: the batch divides no further"

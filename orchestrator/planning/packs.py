"""Which trials share a pack, which pack free workers should start next, and with how many of them.

In: trials and Premises. Out: PackPlan records with reasons. Pure: no torch, no Ray.

Trials are spread over the workers first; only where there are fewer trials than free GPUs does a
pack get several, each with a part of every step's blocks. A pack serves the trials whose batch its
workers can share evenly: see Arithmetic.pass_blocks. None is planned for trials that have problems.

A trial that goes on from a checkpoint keeps the Arithmetic that it had, as if it were set, and so
ends with the same bits. A fresh one may join a pack of any.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.config import QuantConfig, TrialConfig
from orchestrator.planning.compatibility import problems
from orchestrator.planning.fit import Fit, after_out_of_memory, fit
from orchestrator.planning.options import PackWish, Premises
from orchestrator.records import Arithmetic, TrialSpec

Kept = Mapping[int, Arithmetic]
"""Of half-trained trials, by number."""
FRESH: Kept = {}
AS_HAD = "as half-trained trials had"


@dataclass(frozen=True)
class PackKey:
    """Trials with an equal key can share a pack: one base, one program."""

    quant: QuantConfig
    strategy: tuple[tuple[str, Any], ...]
    micro_batch_size: int | None
    """As set; then batch sizes may differ, and a slot with more passes steps less often."""
    batch_size: int | None
    """Where no micro-batch is set: the planner then divides this one."""
    gradient_checkpointing: bool | None
    """As set."""
    alone: str
    """Not empty for a trial that cannot share: says why."""

    @property
    def title(self) -> str:
        return self.quant.title

    @property
    def zero(self) -> bool:
        return bool(dict(self.strategy)["kind"] == "zero")


@dataclass(frozen=True)
class PackPlan:
    key: PackKey
    world_size: int
    """Workers that train the pack together."""
    fit: Fit
    reason: str

    @property
    def num_slots(self) -> int:
        return self.fit.num_slots

    @property
    def arithmetic(self) -> Arithmetic:
        chosen = self.fit
        return Arithmetic(self.world_size, chosen.micro_batch_size, chosen.gradient_checkpointing)

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.key.title,
            "world_size": self.world_size,
            "reason": self.reason,
            **asdict(self.fit),
        }


def pack_key(trial: TrialConfig) -> PackKey:
    return PackKey(
        trial.quant,
        tuple(sorted(trial.strategy.model_dump().items())),
        trial.micro_batch_size,
        trial.batch_size if trial.micro_batch_size is None else None,
        trial.gradient_checkpointing,
        _why_alone(trial),
    )


def by_key(trials: Sequence[TrialSpec], kept: Kept) -> dict[PackKey, list[TrialSpec]]:
    """The half-trained first: a fresh trial can take any slot that they leave."""
    groups: dict[PackKey, list[TrialSpec]] = {}
    for trial in sorted(trials, key=lambda trial: trial.number not in kept):
        groups.setdefault(pack_key(trial.config), []).append(trial)
    return groups


def can_train(arithmetic: Arithmetic, trial: TrialSpec, kept: Kept) -> bool:
    """Whether a pack of the trial's key can. Trials that set a micro-batch may differ in their
    batch, and workers share one evenly."""
    if trial.number in kept:
        return kept[trial.number] == arithmetic
    return trial.config.batch_size % arithmetic.pass_blocks == 0


def what_is_kept(
    trials: Sequence[TrialSpec], had: Kept, num_workers: int, premises: Premises
) -> dict[int, Arithmetic]:
    """Of what half-trained trials had, that which the workers still allow."""
    return {
        trial.number: had[trial.number]
        for trial in trials
        if trial.number in had
        and not why_not_kept(trial.config, had[trial.number], num_workers, premises)
    }


def why_not_kept(trial: TrialConfig, had: Arithmetic, num_workers: int, premises: Premises) -> str:
    """Why a half-trained trial must go on with another arithmetic; empty if it need not."""
    wanted = premises.resources.workers_per_pack
    if wanted not in (None, had.world_size):
        return f"resources.workers_per_pack is {wanted} now"
    if num_workers < had.world_size:
        return f"the sweep has {_workers(num_workers)} now"
    if not fit(premises, _wish(pack_key(trial), 1, 1, had.world_size, premises, had)).fits:
        return "it does not fit the memory now"
    return ""


def plan_pack(
    waiting: Mapping[PackKey, Sequence[TrialSpec]],
    active: Mapping[PackKey, int],
    free_workers: int,
    premises: Premises,
    kept: Kept = FRESH,
) -> tuple[PackPlan, list[TrialSpec]] | None:
    """The pack that free workers should start next, and the trials that it can train; None when no
    trial waits, or too few workers are free.

    `waiting` holds the trials without a slot, `active` counts the running packs, by key. The key
    with the most waiting trials per pack goes first, ties in the order of `waiting`.
    """
    if free_workers < (premises.resources.workers_per_pack or 1):
        return None
    num_waiting = sum(len(trials) for trials in waiting.values())
    groups = {key: _next_group(trials, free_workers, kept) for key, trials in waiting.items()}
    keys = [key for key, (_, trials) in groups.items() if trials]
    if not keys:
        return None
    key = max(keys, key=lambda key: len(groups[key][1]) / (1 + active.get(key, 0)))
    had, trials = groups[key]
    if had is None:
        world_size, why = _world_size(key, trials, num_waiting, free_workers, premises)
    else:
        world_size, why = had.world_size, f"{_workers(had.world_size)}, {AS_HAD}"
    # Each other waiting key gets a pack too.
    num_packs = max(1, free_workers // world_size - (len(keys) - 1))
    share = math.ceil(len(trials) / num_packs)
    chosen = fit(premises, _wish(key, len(trials), share, world_size, premises, had))
    reason = "; ".join((f"{key.title}: {why}", *chosen.reasons))
    return PackPlan(key, world_size, chosen, reason), trials


def learn_from(lost: PackPlan, premises: Premises) -> tuple[Premises, str] | None:
    """What the planner goes by once this pack ran out of memory, and why; None where it could give
    up nothing more."""
    wish = _wish(lost.key, lost.num_slots, lost.num_slots, lost.world_size, premises)
    return after_out_of_memory(premises, wish, lost.fit)


def preview_packs(
    trials: Sequence[TrialSpec], num_workers: int, premises: Premises, had: Kept = FRESH
) -> list[tuple[PackPlan, list[TrialSpec]]]:
    """The packs that start at once, and the trials in their slots."""
    kept = what_is_kept(trials, had, num_workers, premises)
    return list(plan_packs(by_key(trials, kept), {}, num_workers, premises, kept))


def plan_packs(
    waiting: Mapping[PackKey, Sequence[TrialSpec]],
    active: Mapping[PackKey, int],
    free_workers: int,
    premises: Premises,
    kept: Kept = FRESH,
) -> Iterator[tuple[PackPlan, list[TrialSpec]]]:
    """Packs for all free workers, and the trials in their slots."""
    wanted = premises.resources.workers_per_pack
    # A pack that no trial can use would be started and released for ever.
    waiting = {
        key: [trial for trial in trials if not problems(trial.config, wanted)]
        for key, trials in waiting.items()
    }
    active = dict(active)
    while planned := plan_pack(waiting, active, free_workers, premises, kept):
        plan, trials = planned
        members = trials[: plan.num_slots]
        yield plan, members
        waiting[plan.key] = [trial for trial in waiting[plan.key] if trial not in members]
        active[plan.key] = active.get(plan.key, 0) + 1
        free_workers -= plan.world_size


def _next_group(
    trials: Sequence[TrialSpec], free_workers: int, kept: Kept
) -> tuple[Arithmetic | None, list[TrialSpec]]:
    """What the next pack of one key has to keep, and the trials that it can then train."""
    had = [kept[trial.number] for trial in trials if trial.number in kept]
    first = next((one for one in had if one.world_size <= free_workers), None)
    if first is None:
        return None, [trial for trial in trials if trial.number not in kept]
    return first, [trial for trial in trials if can_train(first, trial, kept)]


def _world_size(
    key: PackKey,
    trials: Sequence[TrialSpec],
    num_waiting: int,
    free_workers: int,
    premises: Premises,
) -> tuple[int, str]:
    """Workers for the next pack of this key, and why."""
    wanted = premises.resources.workers_per_pack
    if wanted is not None:
        words = f"{_workers(wanted)}, as set"
        idle = free_workers - wanted
        if 0 < idle < wanted:
            words += f", which leaves {idle} of {free_workers} free ones idle"
        return wanted, words
    # Every waiting trial gets a pack of its own before any pack gets a second worker.
    spare = free_workers // num_waiting
    if key.zero or premises.device == "cpu" or spare < 2:
        return 1, f"1 worker, {len(trials)} waiting over {free_workers} free"
    parts = math.gcd(*(_num_passes(trial.config) for trial in trials))
    size = max(count for count in range(1, spare + 1) if parts % count == 0)
    few = f"{num_waiting} waiting over {free_workers} free"
    if size == spare:
        return size, f"{_workers(size)}, {few}"
    return size, f"{_workers(size)}, {few}: the batch divides no further"


def _num_passes(trial: TrialConfig) -> int:
    """Most workers that can share a step."""
    return trial.batch_size // (trial.micro_batch_size or 1)


def _wish(
    key: PackKey,
    num_trials: int,
    share: int,
    world_size: int,
    premises: Premises,
    had: Arithmetic | None = None,
) -> PackWish:
    asked = premises.resources.slots_per_pack
    num_slots = 1 if key.alone else min(asked, num_trials) if asked is not None else None
    wish = PackWish(
        quant=key.quant,
        zero=key.zero,
        alone=key.alone,
        share=share,
        num_slots=num_slots,
        worker_blocks=key.micro_batch_size or (key.batch_size or 1) // world_size,
        micro_batch_size=key.micro_batch_size,
        gradient_checkpointing=key.gradient_checkpointing,
    )
    if had is None:
        return wish
    return replace(
        wish,
        micro_batch_size=had.micro_batch_size,
        gradient_checkpointing=had.gradient_checkpointing,
        as_set=AS_HAD,
    )


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _why_alone(trial: TrialConfig) -> str:
    if trial.strategy.kind == "zero":
        return "strategy.kind: zero gives each trial a DeepSpeed engine of its own"
    if trial.quant.llm_int8:
        # bitsandbytes 0.50 finds outlier columns over the whole batch, neighbours included.
        return "LLM.int8 treats a batch as one: neighbours would change each other's numbers"
    return ""

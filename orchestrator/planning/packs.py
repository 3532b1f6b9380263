"""Which trials share a pack, which pack free workers should start next, and with how many of them.

In: trials and Premises. Out: PackPlan records with reasons. Pure: no torch, no Ray.

Trials are spread over the workers first; only where there are fewer trials than free workers does a
pack get several, each with a part of every step's blocks. A pack serves the trials whose batch its
workers can share evenly: see PackPlan.pass_blocks.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.config import QuantConfig, TrialConfig
from orchestrator.planning.fit import Fit, fit
from orchestrator.planning.options import PackWish, Premises
from orchestrator.records import TrialSpec


@dataclass(frozen=True)
class PackKey:
    """Trials with an equal key can share a pack: one base, one program."""

    quant: tuple[tuple[str, Any], ...]
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
        quant = dict(self.quant)
        name = f"{quant['bit_width']}-bit"
        return f"{name} {quant['quant_type']}" if quant["bit_width"] == 4 else name

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
    def pass_blocks(self) -> int:
        """Blocks of a trial that all workers together take through one pass: divides the batch of
        every trial of the pack."""
        return self.world_size * self.fit.micro_batch_size

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.key.title,
            "world_size": self.world_size,
            "reason": self.reason,
            **asdict(self.fit),
        }


def pack_key(trial: TrialConfig) -> PackKey:
    return PackKey(
        tuple(sorted(trial.quant.model_dump().items())),
        tuple(sorted(trial.strategy.model_dump().items())),
        trial.micro_batch_size,
        trial.batch_size if trial.micro_batch_size is None else None,
        trial.gradient_checkpointing,
        _why_alone(trial),
    )


def plan_pack(
    waiting: Mapping[PackKey, Sequence[TrialSpec]],
    active: Mapping[PackKey, int],
    free_workers: int,
    premises: Premises,
) -> PackPlan | None:
    """The pack that free workers should start next; None when no trial waits, or too few are free.

    `waiting` holds the trials without a slot, `active` counts the running packs, by key. The key
    with the most waiting trials per pack goes first, ties in the order of `waiting`.
    """
    keys = [key for key, trials in waiting.items() if trials]
    if not keys or free_workers < (premises.resources.workers_per_pack or 1):
        return None
    key = max(keys, key=lambda key: len(waiting[key]) / (1 + active.get(key, 0)))
    trials = waiting[key]
    num_waiting = sum(len(waiting[key]) for key in keys)
    world_size, why = _world_size(key, trials, num_waiting, free_workers, premises)
    groups = free_workers // world_size
    groups = max(1, groups - (len(keys) - 1))  # each other waiting key gets one too
    chosen = fit(
        premises, _wish(key, trials, math.ceil(len(trials) / groups), world_size, premises)
    )
    reason = "; ".join((f"{key.title}: {why}", *chosen.reasons))
    return PackPlan(key, world_size, chosen, reason)


def preview_packs(
    trials: Sequence[TrialSpec], num_workers: int, premises: Premises
) -> list[tuple[PackPlan, list[TrialSpec]]]:
    """The packs that start at once, and the trials in their slots."""
    waiting: dict[PackKey, list[TrialSpec]] = {}
    for trial in trials:
        waiting.setdefault(pack_key(trial.config), []).append(trial)
    return list(plan_packs(waiting, {}, num_workers, premises))


def plan_packs(
    waiting: dict[PackKey, list[TrialSpec]],
    active: dict[PackKey, int],
    free_workers: int,
    premises: Premises,
) -> Iterator[tuple[PackPlan, list[TrialSpec]]]:
    """Packs for all free workers, and the trials in their slots, taken out of `waiting`."""
    while plan := plan_pack(waiting, active, free_workers, premises):
        queue = waiting[plan.key]
        yield plan, queue[: plan.num_slots]
        waiting[plan.key] = queue[plan.num_slots :]
        active[plan.key] = active.get(plan.key, 0) + 1
        free_workers -= plan.world_size


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
        return wanted, f"{_workers(wanted)}, as set"
    # Every waiting trial gets a pack of its own before any pack gets a second worker.
    spare = free_workers // num_waiting
    if key.zero or spare < 2:
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
    key: PackKey, trials: Sequence[TrialSpec], share: int, world_size: int, premises: Premises
) -> PackWish:
    asked = premises.resources.slots_per_pack
    num_slots = 1 if key.alone else min(asked, len(trials)) if asked is not None else None
    return PackWish(
        quant=QuantConfig.model_validate(dict(key.quant)),
        zero=key.zero,
        alone=key.alone,
        share=share,
        num_slots=num_slots,
        worker_blocks=key.micro_batch_size or (key.batch_size or 1) // world_size,
        micro_batch_size=key.micro_batch_size,
        gradient_checkpointing=key.gradient_checkpointing,
    )


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _why_alone(trial: TrialConfig) -> str:
    if trial.strategy.kind == "zero":
        return "strategy.kind: zero gives each trial a DeepSpeed engine of its own"
    if trial.quant.bit_width == 8:
        # bitsandbytes 0.50 finds outlier columns over the whole batch, neighbours included.
        return "LLM.int8 treats a batch as one: neighbours would change each other's numbers"
    return ""

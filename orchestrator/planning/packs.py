"""Which trials share a pack, and which pack a free worker should start next.

In: trials and resources. Out: PackPlan records with reasons. Pure: no torch, no Ray.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.config import TrialConfig
from orchestrator.records import TrialSpec

# On a CPU, K slots on one base gave 1.7 to 2.0 times the tokens per CPU-second at K = 4 to 8 and
# nothing more beyond; each costs memory for its activations.
MAX_AUTO_SLOTS = 4


@dataclass(frozen=True)
class PackKey:
    """Trials with an equal key can share a pack: one base, one program."""

    quant: tuple[tuple[str, Any], ...]
    strategy: tuple[tuple[str, Any], ...]
    micro_batch_size: int
    gradient_checkpointing: bool
    alone: str
    """Not empty for a trial that cannot share: says why."""

    @property
    def title(self) -> str:
        quant = dict(self.quant)
        name = f"{quant['bit_width']}-bit"
        return f"{name} {quant['quant_type']}" if quant["bit_width"] == 4 else name


@dataclass(frozen=True)
class PackPlan:
    key: PackKey
    num_slots: int
    reason: str


def pack_key(trial: TrialConfig) -> PackKey:
    return PackKey(
        tuple(sorted(trial.quant.model_dump().items())),
        tuple(sorted(trial.strategy.model_dump().items())),
        trial.micro_batch_size or trial.batch_size,
        trial.gradient_checkpointing,
        _why_alone(trial),
    )


def plan_pack(
    waiting: Mapping[PackKey, Sequence[TrialSpec]],
    active: Mapping[PackKey, int],
    free_workers: int,
    slots_per_pack: int | None,
) -> PackPlan | None:
    """The pack that a free worker should start next; None when no trial waits.

    `waiting` holds the trials without a slot, `active` counts the running packs, by key. The key
    with the most waiting trials per pack goes first, ties in the order of `waiting`.
    """
    keys = [key for key, trials in waiting.items() if trials]
    if not keys or free_workers < 1:
        return None
    key = max(keys, key=lambda key: len(waiting[key]) / (1 + active.get(key, 0)))
    count = len(waiting[key])
    if key.alone:
        return PackPlan(key, 1, f"{key.title}: alone, for {key.alone}")
    workers = max(1, free_workers - (len(keys) - 1))  # each other waiting key gets a worker too
    share = math.ceil(count / workers)
    if slots_per_pack is not None:
        num_slots, why = min(slots_per_pack, count), f"resources.slots_per_pack={slots_per_pack}"
    else:
        num_slots = min(share, MAX_AUTO_SLOTS)
        why = f"{count} waiting over {workers} free workers, at most {MAX_AUTO_SLOTS} a pack"
    slots = "1 slot" if num_slots == 1 else f"{num_slots} slots"
    return PackPlan(key, num_slots, f"{key.title}: {slots} ({why})")


def preview_packs(
    trials: Sequence[TrialSpec], num_workers: int, slots_per_pack: int | None
) -> list[tuple[PackPlan, list[TrialSpec]]]:
    """The packs that start at once, and the trials in their slots; for a dry run."""
    waiting: dict[PackKey, list[TrialSpec]] = {}
    for trial in trials:
        waiting.setdefault(pack_key(trial.config), []).append(trial)
    active: dict[PackKey, int] = {}
    packs = []
    for free in range(num_workers, 0, -1):
        plan = plan_pack(waiting, active, free, slots_per_pack)
        if plan is None:
            break
        queue = waiting[plan.key]
        packs.append((plan, queue[: plan.num_slots]))
        waiting[plan.key] = queue[plan.num_slots :]
        active[plan.key] = active.get(plan.key, 0) + 1
    return packs


def _why_alone(trial: TrialConfig) -> str:
    if trial.strategy.kind == "zero":
        return "strategy.kind: zero gives each trial a DeepSpeed engine of its own"
    if trial.quant.bit_width == 8:
        # bitsandbytes 0.50 finds outlier columns over the whole batch, neighbours included.
        return "LLM.int8 treats a batch as one: neighbours would change each other's numbers"
    return ""

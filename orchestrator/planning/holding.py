"""Which kinds of workers hold a pack, and why none would.

In: a pack's key, WorkerKinds and Premises. Out: the kinds that should train it, or words. Pure.

A kind that is not expected to hold a pack trains none where another kind is. Where none is, the one
with the most memory tries, as estimates err: only what exceeds its whole memory is refused.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from orchestrator.config import StrategyConfig, TrialConfig
from orchestrator.planning.fit import fit
from orchestrator.planning.gpus import find_gpu
from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.memory import GIB, PackMemory
from orchestrator.planning.options import PackWish, Premises
from orchestrator.planning.waiting import PackKey, pack_key
from orchestrator.records import Arithmetic

AS_HAD = "as half-trained trials had"
# Of what a pack takes: from here on a part is worth naming.
LARGE_PART = 0.1


def premises_for(kind: WorkerKind, premises: Premises, key: PackKey | None = None) -> Premises:
    """What the planner goes by for workers of this kind; with a key, for such packs on them."""
    if kind.name:
        usable = int(kind.memory_bytes * premises.memory_fraction)
        limit = premises.memory_limit_bytes
        memory_bytes = usable if limit is None else min(usable, limit)
        premises = replace(
            premises,
            worker_memory_bytes=memory_bytes,
            gpu=find_gpu(kind.name),
            host_memory_bytes=kind.host_memory_bytes,
        )
    if key is None or not premises.less:
        return premises
    digest = key.unlimited.digest
    parts = [part for *here, part in premises.less if here == [digest, kind.name]]
    if not parts:
        return premises
    return replace(premises, worker_memory_bytes=int(premises.worker_memory_bytes * min(parts)))


def takers(
    key: PackKey,
    kinds: Sequence[WorkerKind],
    premises: Premises,
    had: Arithmetic | None = None,
) -> Sequence[WorkerKind]:
    """The kinds that should train packs of this key; `had`: what the pack has to keep."""
    return _takers(key, tuple(kinds), premises, had) if len(kinds) > 1 else kinds


@lru_cache(maxsize=4096)
def _takers(
    key: PackKey, kinds: tuple[WorkerKind, ...], premises: Premises, had: Arithmetic | None
) -> Sequence[WorkerKind]:
    """A decision asks the same many times."""
    sizes = {
        kind.name: had.world_size if had else least_workers(key, kind, premises) for kind in kinds
    }
    there = [kind for kind in kinds if kind.count >= sizes[kind.name]]
    able = [kind for kind in there if not _ran_out(key, kind, premises)] or _largest(there)
    asked = premises.resources.slots_per_pack or 1

    def holds(kind: WorkerKind) -> bool:
        wish = pack_wish(key, asked, 1, sizes[kind.name], premises, had)
        return _holds(kind, key, wish, premises)

    return [kind for kind in able if holds(kind)] or _largest(able)


def least_workers(key: PackKey, kind: WorkerKind, premises: Premises, parts: int = 0) -> int:
    """The fewest of this kind that a pack of this key may have. Where the number is not set, those
    of a pack under ZeRO are as many as hold what they share, or come nearest to it. `parts`: what
    they must divide; 0: the key's batch."""
    wanted = premises.resources.workers_per_pack
    if wanted is not None or not key.zero or premises.device == "cpu":
        return wanted or 1
    return _least_workers(key, kind, premises, parts or key.batch_size or 0)


@lru_cache(maxsize=4096)
def _least_workers(key: PackKey, kind: WorkerKind, premises: Premises, parts: int) -> int:
    needs: dict[int, int] = {}
    for size in _sizes(kind.count, parts):
        wish = pack_wish(key, 1, 1, size, premises)
        if _holds(kind, key, wish, premises):
            return size
        memory = fit(premises_for(kind, premises, key), wish).memory
        needs[size] = memory.total_bytes if memory else 0
    # Estimates err: where none is expected to, those that need least may hold it all the same.
    return min(needs, key=lambda size: needs[size], default=1)


def why_too_large(trial: TrialConfig, kinds: Sequence[WorkerKind], premises: Premises) -> str:
    """Why no kind can train a trial, even alone and with all given up that can be; empty if one
    may, or if it is not known.

    On a CPU short memory makes it slow, and is not refused. A pack under ZeRO may have as many
    workers as are set, or else as many as it needs.
    """
    sizes = pack_sizes(trial, kinds, premises)
    there = [(kind, size) for kind in kinds for size in sizes if kind.count >= size]
    key = pack_key(trial)
    if premises.device == "cpu" or not there:
        return ""
    rooms: dict[str, int] = {}
    needs: list[tuple[PackMemory, int]] = []
    off_host = ""
    for kind, size in there:
        given = premises_for(kind, premises)
        memory = fit(given, pack_wish(key, 1, 1, size, premises)).memory
        if memory is None:
            return ""
        if memory.total_bytes <= given.worker_memory_bytes:
            if _on_host(memory, given):
                return ""
            off_host = (
                f"it does not fit its node: {key.title} takes at least "
                f"{memory.host_bytes / GIB:.1f} GiB of its memory, and a worker's part is "
                f"{given.host_memory_bytes / GIB:.1f} GiB: {_host_remedy(trial, kind.count)}"
            )
        needs.append((memory, size))
        rooms[kind.name or "GPU"] = given.worker_memory_bytes
    if off_host:
        return off_host
    least, size = min(needs, key=lambda need: need[0].total_bytes)
    words = ", ".join(f"{room / GIB:.1f} GiB of each {name}" for name, room in rooms.items())
    remedy = _remedy(trial, least, premises)
    several = premises.resources.workers_per_pack != 1 and any(kind.count > 1 for kind in kinds)
    if several and trial.strategy.stage != 3:
        remedy += ", share it among workers (strategy.kind: zero, stage: 3)"
    elif premises.resources.workers_per_pack and size < max(kind.count for kind in kinds):
        remedy += ", raise resources.workers_per_pack"
    each = f" of each of {size} workers" if size > 1 else ""
    return (
        f"it does not fit: {key.title} takes at least {least.total_bytes / GIB:.1f} GiB{each}, and "
        f"a pack may take {words}: {remedy}, or take larger GPUs"
    )


def pack_sizes(
    trial: TrialConfig, kinds: Sequence[WorkerKind], premises: Premises
) -> Sequence[int]:
    """Numbers of workers that a pack of this trial may have, as far as its memory depends on it."""
    wanted = premises.resources.workers_per_pack
    if wanted is not None or trial.strategy.kind != "zero":
        return [wanted or 1]
    most = max((kind.count for kind in kinds), default=1)
    return _sizes(most, trial.batch_size // (trial.micro_batch_size or 1))


def _sizes(most: int, parts: int) -> list[int]:
    """Numbers of workers that share so many parts of a step evenly."""
    return [size for size in range(1, most + 1) if parts % size == 0]


def pack_wish(
    key: PackKey,
    num_trials: int,
    share: int,
    world_size: int,
    premises: Premises,
    had: Arithmetic | None = None,
) -> PackWish:
    asked = premises.resources.slots_per_pack
    num_slots = 1 if key.alone else min(asked, num_trials) if asked is not None else None
    if key.max_slots is not None:
        share = min(share, key.max_slots)
        num_slots = min(num_slots, key.max_slots) if num_slots is not None else None
    alone = key.alone
    if alone and asked not in (None, 1):
        alone += f" (resources.slots_per_pack: {asked} is for trials that can share)"
    wish = PackWish(
        quant=key.quant,
        strategy=StrategyConfig.model_validate(dict(key.strategy)),
        alone=alone,
        share=share,
        num_slots=num_slots,
        worker_blocks=key.micro_batch_size or (key.batch_size or 1) // world_size,
        micro_batch_size=key.micro_batch_size,
        gradient_checkpointing=key.gradient_checkpointing,
        dora=key.dora,
        world_size=world_size,
    )
    if had is None:
        return wish
    return replace(
        wish,
        # As many as were asked for may not fit with what they had; then fewer train at once.
        share=min(share, num_slots or share),
        num_slots=1 if alone else None,
        micro_batch_size=had.micro_batch_size,
        gradient_checkpointing=had.gradient_checkpointing,
        kept_layers=had.kept_layers,
        as_set=AS_HAD,
    )


def _largest(kinds: Sequence[WorkerKind]) -> list[WorkerKind]:
    most = max((kind.memory_bytes for kind in kinds), default=0)
    return [kind for kind in kinds if kind.memory_bytes == most]


def _ran_out(key: PackKey, kind: WorkerKind, premises: Premises) -> bool:
    return any(
        name == key.unlimited.digest and kind.memory_bytes <= num_bytes
        for name, num_bytes in premises.ran_out
    )


def _holds(kind: WorkerKind, key: PackKey, wish: PackWish, premises: Premises) -> bool:
    given = premises_for(kind, premises, key)
    found = fit(given, wish)
    return found.fits and _on_host(found.memory, given)


def _on_host(memory: PackMemory | None, given: Premises) -> bool:
    """As far as is known. What is in it is what is offloaded, for the rest is small."""
    if memory is None or not given.host_memory_bytes:
        return True
    return memory.host_bytes <= given.host_memory_bytes


def _host_remedy(trial: TrialConfig, workers: int) -> str:
    words = ["lower resources.num_workers"] if workers > 1 else []
    words += [
        f"set strategy.{name}: {'nvme or none' if value == 'cpu' else 'none'}"
        for name in ("offload_optimizer", "offload_params")
        if (value := getattr(trial.strategy, name)) != "none"
    ]
    return ", ".join([*words, "or take nodes with more memory"])


def _remedy(trial: TrialConfig, memory: PackMemory, premises: Premises) -> str:
    """What to lower, what takes most first."""
    evaluates = memory.evaluation_bytes > memory.training_bytes
    fewer_bits = "quant.bit_width"
    if trial.quant.bit_width == "auto":
        fewer_bits = "quant.budget_gib" if trial.quant.budget_gib else "quant.average_bits"
    passes = "data.block_length"
    if evaluates and premises.evaluation_batch_size > 1:
        passes = "evaluation.batch_size or data.block_length"
    elif (trial.micro_batch_size or 1) > 1:
        passes = "micro_batch_size or data.block_length"
    adapters = memory.adapters_bytes + memory.optimizer_bytes + memory.lanes_bytes
    sizes = [
        (max(memory.training_bytes, memory.evaluation_bytes), passes),
        (adapters, "adapter.rank"),
    ]
    if trial.quant.mean_bits > 4:
        sizes.append((memory.base_bytes, fewer_bits))
    large = [part for part in sizes if part[0] >= LARGE_PART * memory.total_bytes]
    words = f"lower {' or '.join(name for _, name in sorted(large or sizes, reverse=True))}"
    if trial.gradient_checkpointing is False:
        words += ", set gradient_checkpointing: true"
    return words

"""What a trial is expected to need alone, and whether that breaks a constraint, or fits no worker,
before it trains.

In: a TrialSpec, the constraints, the planner's Premises and the kinds of workers. Out: a
TrialResult that refuses it, or None. Pure: no torch, no Ray.
"""

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.errors import ConfigError
from orchestrator.planning.holding import pack_sizes, why_too_large
from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.options import Premises
from orchestrator.planning.packs import preview_packs
from orchestrator.planning.ranks import largest_rank, saved_bytes
from orchestrator.planning.shape import UnknownShape
from orchestrator.planning.waiting import pack_key
from orchestrator.records import TrialResult, TrialSpec
from orchestrator.search.objectives import GIB, violations
from orchestrator.search_config import ConstraintsConfig
from orchestrator.wording import counted


def within(constraints: ConstraintsConfig, premises: Premises) -> Premises:
    """Premises whose packs keep to the constraint on memory."""
    if constraints.peak_memory_gib is None:
        return premises
    limit = int(constraints.peak_memory_gib * GIB)
    known = premises.worker_memory_bytes
    return replace(
        premises,
        worker_memory_bytes=min(known, limit) if known else limit,
        memory_limit_bytes=limit,
    )


def refusal(
    trial: TrialSpec,
    constraints: ConstraintsConfig,
    premises: Premises,
    now: float,
    kinds: Sequence[WorkerKind] = (),
) -> TrialResult | None:
    """The result of a trial that cannot keep to the constraints, or fits no kind of worker, as far
    as is known before."""
    expected = TrialResult(
        number=trial.number,
        state="failed",
        attempt=0,
        time=now,
        reason="constraint",
        peak_memory_bytes=_peak_memory_bytes(trial, constraints, premises, kinds),
        adapter_bytes=_adapter_bytes(trial, premises),
    )
    found = violations(constraints, expected)
    if found:
        return replace(expected, message="expected: " + "; ".join(found))
    if words := why_too_large(trial.config, kinds, premises):
        return replace(expected, reason="out_of_memory", message=words)
    return None


def check_none_waits(waiting: Sequence[TrialSpec], kinds: Sequence[WorkerKind]) -> None:
    """Raises ConfigError for trials that still wait when no pack is at work and none is begun."""
    if not waiting:
        return
    there = " and ".join(counted(kind.count, f"{kind.name} worker".strip()) for kind in kinds)
    numbers = ", ".join(str(number) for number in sorted(trial.number for trial in waiting))
    titles = " and ".join(sorted({pack_key(trial.config).title for trial in waiting}))
    raise ConfigError(
        f"trials {numbers} wait for packs ({titles}) that {there} cannot make up: lower "
        "resources.workers_per_pack, or give the sweep workers with more memory"
    )


def _adapter_bytes(trial: TrialSpec, premises: Premises) -> int:
    """0 where the base's shape is not known."""
    shape = premises.shape
    return 0 if isinstance(shape, UnknownShape) else saved_bytes(trial.config.adapter, shape)


def _peak_memory_bytes(
    trial: TrialSpec,
    constraints: ConstraintsConfig,
    premises: Premises,
    kinds: Sequence[WorkerKind],
) -> int:
    """Of the trial alone in a pack that gives up what it can, of the number of workers that takes
    least. 0 where it is not estimated."""
    if constraints.peak_memory_gib is None:
        return 0
    alone = replace(
        within(constraints, premises),
        max_rank=largest_rank(trial.config.adapter),
        target_modules=trial.config.adapter.target_modules,
        dropout=trial.config.adapter.dropout > 0,
    )
    peaks = []
    for size in pack_sizes(trial.config, kinds, premises):
        pack = {"slots_per_pack": 1, "workers_per_pack": size}
        resources = premises.resources.model_copy(update=pack)
        packs = preview_packs([trial], size, replace(alone, resources=resources))
        if packs and (memory := packs[0][0].fit.memory) is not None:
            peaks.append(memory.total_bytes)
    return min(peaks, default=0)

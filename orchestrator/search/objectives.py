"""What a sweep seeks and what it must keep to: objectives, constraints, the Pareto front.

In: TrialResults, and the search section. Out: numbers, words, and which trials no other beats.
Pure.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.records import TrialResult
from orchestrator.search_config import ConstraintsConfig, ObjectiveName, SearchConfig

GIB = 1 << 30
MB = 10**6


@dataclass(frozen=True)
class Objective:
    title: str
    value: Callable[[TrialResult], float]
    """Finite for a trial that can win."""
    direction: Literal["minimize", "maximize"] = "minimize"
    form: str = ",.0f"
    """Of its values in text."""

    def cost(self, result: TrialResult) -> float:
        """Less is better."""
        value = self.value(result)
        return -value if self.direction == "maximize" else value


def _eval_loss(result: TrialResult) -> float:
    return math.nan if result.eval_loss is None else result.eval_loss


def _task_score(result: TrialResult) -> float:
    return math.nan if result.task_score is None else result.task_score


OBJECTIVES: dict[ObjectiveName, Objective] = {
    "eval_loss": Objective("held-out loss", _eval_loss, form=".4f"),
    "task_score": Objective("right answers", _task_score, "maximize", ".1%"),
    "peak_memory_bytes": Objective("peak memory", lambda result: result.peak_memory_bytes),
    "model_memory_bytes": Objective(
        "memory of base, adapter and optimizer states", lambda result: result.model_memory_bytes
    ),
    "adapter_bytes": Objective("size of the adapter", lambda result: result.adapter_bytes),
    "tokens_per_s": Objective("tokens per second", lambda result: result.tokens_per_s, "maximize"),
}


def overshoots(constraints: ConstraintsConfig, result: TrialResult) -> dict[str, float]:
    """By constraint that is set: how far over its limit the trial is, as a part of the limit. At
    most 0 where it keeps to it."""
    measured: dict[str, tuple[float, float | None]] = {
        "peak_memory_gib": (result.peak_memory_bytes / GIB, constraints.peak_memory_gib),
        "adapter_mb": (result.adapter_bytes / MB, constraints.adapter_mb),
    }
    return {
        name: value / limit - 1 for name, (value, limit) in measured.items() if limit is not None
    }


def violations(constraints: ConstraintsConfig, result: TrialResult) -> list[str]:
    """In words, with value and limit."""
    values = {
        "peak_memory_gib": result.peak_memory_bytes / GIB,
        "adapter_mb": result.adapter_bytes / MB,
    }
    return [
        f"{name} is {values[name]:.3g}, and search.constraints.{name} allows "
        f"{getattr(constraints, name):g}"
        for name, over in overshoots(constraints, result).items()
        if over > 0
    ]


def candidates(search: SearchConfig, results: Sequence[TrialResult]) -> list[TrialResult]:
    """Trials that may win: finished, finite in every objective, within all constraints."""
    return [
        result
        for result in results
        if result.state == "finished"
        and math.isfinite(_eval_loss(result))
        and all(math.isfinite(OBJECTIVES[name].value(result)) for name in search.objectives)
        and not violations(search.constraints, result)
    ]


def pareto_front(search: SearchConfig, results: Sequence[TrialResult]) -> list[TrialResult]:
    """The candidates that no other equals in every objective and beats in one."""
    found = candidates(search, results)
    costs = {r.number: [OBJECTIVES[name].cost(r) for name in search.objectives] for r in found}

    def beats(one: TrialResult, other: TrialResult) -> bool:
        pairs = list(zip(costs[one.number], costs[other.number], strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return [one for one in found if not any(beats(other, one) for other in found)]

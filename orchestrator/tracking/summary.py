"""What a sweep has come to, trial by trial: the rows of every table and plot.

In: a RunStore. Out: SummaryRow records, the best first. Pure; imports neither mlflow nor plotly.
"""

import math
from collections.abc import Sequence
from typing import Any, TypedDict

from orchestrator.records import TrialResult, TrialSpec
from orchestrator.search_config import Choice
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.translation import (
    GIB,
    MIB,
    brief,
    eval_loss_gain,
    searched,
    trial_name,
    trial_state,
)

MISSING = "–"


class SummaryRow(TypedDict):
    """One trial. Losses are None where they are not known or not finite."""

    trial: int
    name: str
    state: str
    """waiting | running | finished | pruned | failed."""
    reason: str
    """Why it failed or was stopped."""
    winner: bool
    params: dict[str, Choice]
    """The searched fields, by their short names; a condition may leave some out of a trial."""
    rank: int
    bit_width: float
    steps: int
    eval_loss: float | None
    baseline_eval_loss: float | None
    eval_loss_gain: float | None
    task_score: float | None
    model_memory_gib: float
    peak_memory_gib: float
    adapter_mib: float
    train_s: float
    tokens_per_s: float


def summary_rows(store: RunStore) -> list[SummaryRow]:
    """All trials by held-out loss; those without one follow in the order of their numbers."""
    results = {result.number: result for result in store.results}
    winner = store.read("winner") or {}
    rows = [
        _row(trial, store.points(trial.number), results.get(trial.number), winner.get("trial"))
        for trial in store.trials
    ]
    return sorted(rows, key=_order)


def searched_fields(rows: Sequence[SummaryRow]) -> list[str]:
    """Those of any trial, in the order of the one that has most."""
    by_size = sorted(rows, key=lambda row: (-len(row["params"]), row["trial"]))
    return list(dict.fromkeys(name for row in by_size for name in row["params"]))


def param_text(row: SummaryRow, field: str) -> str:
    """A dash where a condition leaves the field as the trial is written."""
    return brief(row["params"][field]) if field in row["params"] else MISSING


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _row(
    trial: TrialSpec, points: list[dict[str, Any]], result: TrialResult | None, winner: int | None
) -> SummaryRow:
    known = result or _so_far(trial, points)
    return SummaryRow(
        trial=trial.number,
        name=trial_name(trial.number, trial.params),
        state=trial_state(points, result),
        reason=f"{known.reason}: {known.message}" if known.reason else "",
        winner=trial.number == winner,
        params=searched(trial.params),
        rank=trial.config.adapter.rank,
        bit_width=trial.config.quant.mean_bits,
        steps=known.steps,
        eval_loss=finite(known.eval_loss),
        baseline_eval_loss=finite(known.baseline_eval_loss),
        eval_loss_gain=finite(eval_loss_gain(known)),
        task_score=known.task_score,
        model_memory_gib=known.model_memory_bytes / GIB,
        peak_memory_gib=known.peak_memory_bytes / GIB,
        adapter_mib=known.adapter_bytes / MIB,
        train_s=known.train_s,
        tokens_per_s=known.tokens_per_s,
    )


def _so_far(trial: TrialSpec, points: list[dict[str, Any]]) -> TrialResult:
    """What a trial that is not over would have come to, had it ended now."""
    losses = [row["eval_loss"] for row in points if row["kind"] == "evaluated"]
    return TrialResult(
        trial.number,
        "finished",
        attempt=0,
        time=0.0,
        steps=points[-1]["step"] if points else 0,
        eval_loss=losses[-1] if losses else None,
    )


def _order(row: SummaryRow) -> tuple[bool, bool, float, int]:
    loss = row["eval_loss"]
    return (not row["winner"], loss is None, loss if loss is not None else 0.0, row["trial"])

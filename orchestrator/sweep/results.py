"""The result of a trial, by how it ended: finished, pruned or failed.

In: its last event, or the verdict that stopped it, and the run folder. Out: a TrialResult.
"""

import time
from pathlib import Path

from orchestrator.records import TrialDone, TrialResult
from orchestrator.search.pruning import Verdict
from orchestrator.sweep.run_store import RunStore


def finished_result(store: RunStore, event: TrialDone) -> TrialResult:
    values = {**event.__dict__}
    number = values.pop("trial")
    # The run folder may have been moved since the event, or be named by a link.
    folder = store.attempt_dir(number, event.attempt) / Path(values.pop("adapter_dir")).name
    return TrialResult(
        number=number, state="finished", adapter_dir=str(folder.relative_to(store.folder)), **values
    )


def pruned_result(store: RunStore, verdict: Verdict, now: float) -> TrialResult:
    """As far as its curve tells: its worker may be at work on it still."""
    points = store.points(verdict.trial)
    baseline = next((row["eval_loss"] for row in points if row["step"] == 0), None)
    losses = [row["train_loss"] for row in points if row["kind"] == "progress"]
    return TrialResult(
        number=verdict.trial,
        state="pruned",
        attempt=max(row["attempt"] for row in points),
        time=now,
        reason=store.sweep.config.search.pruner.kind,
        message=verdict.reason,
        eval_loss=verdict.eval_loss,
        baseline_eval_loss=baseline,
        train_loss=losses[-1] if losses else None,
        steps=verdict.rung,
        tokens=max(row["tokens"] for row in points),
    )


def failed_result(trial: int, attempt: int, reason: str, message: str) -> TrialResult:
    return TrialResult(
        number=trial,
        state="failed",
        attempt=attempt,
        time=time.time(),
        reason=reason,
        message=message,
    )

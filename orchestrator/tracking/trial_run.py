"""One trial's run in MLflow, and what of the trial it holds already.

In: the trial's records. Out: calls that bring its run up to date, each sent once. A run that an
earlier process began is asked what it holds, so no note of ours can disagree with MLflow.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.records import TrialResult, TrialSpec
from orchestrator.sweep.run_store import RunStore, SweepRecord
from orchestrator.tracking.runs import TRIAL_TAG, end, log, milliseconds, own_tags
from orchestrator.tracking.translation import (
    curve_rows,
    point_metrics,
    result_metrics,
    state_tags,
    trial_name,
    trial_params,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ROWS_PER_BATCH = 200  # of at most 5 metrics: log_batch takes 1000 (MLflow 3.17)
STATUS = {"waiting": "SCHEDULED", "running": "RUNNING", "finished": "FINISHED", "failed": "FAILED"}
METRIC_OF_KIND = {"progress": "train_loss", "evaluated": "eval_loss"}


class TrialRun:
    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self._client = client
        self.run_id = run_id
        self.over = False
        self._sent: set[tuple[str, int]] = set()
        """(kind, step) of the points that MLflow holds."""
        self._tags: dict[str, str] = {}
        self._read_bytes = -1
        """Size of progress.jsonl when it was last read."""

    @classmethod
    def create(
        cls,
        client: "MlflowClient",
        experiment_id: str,
        parent_id: str,
        sweep: SweepRecord,
        trial: TrialSpec,
        began: float | None,
    ) -> "TrialRun":
        run = client.create_run(
            experiment_id,
            start_time=milliseconds(began if began is not None else time.time()),
            run_name=trial_name(trial.number, trial.params),
            tags=own_tags(sweep.run_id)
            | {"mlflow.parentRunId": parent_id, TRIAL_TAG: str(trial.number)},
        )
        return cls(client, run.info.run_id)

    @classmethod
    def found(cls, client: "MlflowClient", run: "Run") -> "TrialRun":
        """A run that another process began."""
        self = cls(client, run.info.run_id)
        self.over = run.info.status in ("FINISHED", "FAILED")
        if not self.over:
            self._sent = {
                (kind, point.step)
                for kind, metric in METRIC_OF_KIND.items()
                for point in client.get_metric_history(self.run_id, metric)
            }
        return self

    def send(
        self, store: RunStore, sweep: SweepRecord, trial: TrialSpec, result: TrialResult | None
    ) -> None:
        """Bring the run up to date; its end is written last, when all else is there."""
        if self.over:
            return
        size = _file_bytes(store.trial_dir(trial.number) / "progress.jsonl")
        if result is None and size == self._read_bytes:
            return
        points = store.points(trial.number)
        self._send_state(trial, sweep, state_tags(trial, points, result))
        self._send_curve(curve_rows(points, result))
        if result is not None:
            self._end(result)
        self._read_bytes = size

    def kill(self) -> None:
        """Close a run that is not over; the next `send` opens it again."""
        if not self.over:
            end(self._client, self.run_id, "KILLED")
            self._tags = {}
            self._read_bytes = -1

    def _send_state(self, trial: TrialSpec, sweep: SweepRecord, tags: dict[str, str]) -> None:
        if tags == self._tags:
            return
        params = {} if self._tags else trial_params(trial.config, sweep.compute_dtype)
        log(self._client, self.run_id, params=params, tags=tags)
        state = tags["orchestrator.state"]
        if state != self._tags.get("orchestrator.state") and state in ("waiting", "running"):
            self._client.update_run(self.run_id, STATUS[state])
        self._tags = tags

    def _send_curve(self, rows: Sequence[Mapping[str, Any]]) -> None:
        unsent = [row for row in rows if (row["kind"], row["step"]) not in self._sent]
        for start in range(0, len(unsent), ROWS_PER_BATCH):
            batch = unsent[start : start + ROWS_PER_BATCH]
            points = [(row["time"], row["step"], point_metrics(row)) for row in batch]
            log(self._client, self.run_id, metrics=points)
            self._sent |= {(row["kind"], row["step"]) for row in batch}

    def _end(self, result: TrialResult) -> None:
        final = (result.time, result.steps, result_metrics(result))
        log(self._client, self.run_id, metrics=[final])
        end(self._client, self.run_id, STATUS[result.state], result.time)
        self.over = True


def _file_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

"""One trial's run in MLflow, and what of the trial it holds already.

In: the trial's records. Out: calls that bring its run up to date, each point sent once. A run that
an earlier process or call began is asked what it holds, so no note of ours can disagree with
MLflow. A call whose answer is lost may be repeated: a SQL store drops points that it has (same key,
time, step and value; MLflow 3.17, store/tracking/sqlalchemy_store.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.records import TrialResult, TrialSpec
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.runs import (
    TRIAL_TAG,
    end,
    log,
    milliseconds,
    own_tags,
)
from orchestrator.tracking.tail import JsonLinesTail, first_record
from orchestrator.tracking.translation import (
    final_evaluation,
    place_tags,
    point_metrics,
    result_metrics,
    state_tags,
    trial_name,
    trial_params,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

MAX_ENTITIES = 1000  # metrics, params and tags of one log_batch call together (MLflow 3.17)
STATUS = {"waiting": "SCHEDULED", "running": "RUNNING", "finished": "FINISHED", "failed": "FAILED"}
# MLflow has no word of its own for it: the run's tags and its name in the sweep's table say more.
# KILLED would be opened again by a resume.
STATUS |= {"pruned": "FINISHED"}
METRIC_OF_KIND = {"progress": "train_loss", "evaluated": "eval_loss"}

Row = Mapping[str, Any]
Key = tuple[str, int]
"""(kind, step) of a point."""


class TrialRun:
    def __init__(
        self, client: "MlflowClient", run_id: str, store: RunStore, trial: TrialSpec
    ) -> None:
        self.run_id = run_id
        self.over = False
        self._client = client
        self._store = store
        self._trial = trial
        self._tail = JsonLinesTail(store.trial_dir(trial.number) / "progress.jsonl")
        self._unsent: dict[Key, Row] = {}
        self._sent: set[Key] = set()
        """Points that MLflow holds."""
        self._attempt = 0
        self._tags: dict[str, str] = {}
        self._params: dict[str, str] = {}
        """Still to be sent."""
        self._status = "RUNNING"

    @classmethod
    def create(
        cls,
        client: "MlflowClient",
        experiment_id: str,
        parent_id: str,
        store: RunStore,
        trial: TrialSpec,
        tags: Mapping[str, str],
        compute_dtype: str,
    ) -> "TrialRun":
        first = first_record(store.trial_dir(trial.number) / "progress.jsonl")
        run = client.create_run(
            experiment_id,
            start_time=milliseconds(first["time"]) if first else None,
            run_name=trial_name(trial.number, trial.params),
            tags=own_tags(store.sweep.run_id)
            | {"mlflow.parentRunId": parent_id, TRIAL_TAG: str(trial.number)}
            | dict(tags),
        )
        self = cls(client, run.info.run_id, store, trial)
        self._params = trial_params(trial.config, compute_dtype)
        return self

    @classmethod
    def found(
        cls,
        client: "MlflowClient",
        run: "Run",
        store: RunStore,
        trial: TrialSpec,
        compute_dtype: str,
    ) -> "TrialRun":
        """A run that was begun before."""
        self = cls(client, run.info.run_id, store, trial)
        self.over = run.info.status in ("FINISHED", "FAILED")
        self._status = run.info.status
        if not self.over:
            params = trial_params(trial.config, compute_dtype)
            self._params = {} if run.data.params else params
            self._sent = {
                (kind, point.step)
                for kind, metric in METRIC_OF_KIND.items()
                for point in client.get_metric_history(self.run_id, metric)
            }
        return self

    def send(self, place: Row) -> None:
        """Bring the run up to date; its end is written last, when all else is there.

        `place`: where the trial was opened last: pack, slot, node. Empty where it never was.
        """
        if self.over:
            return
        result = self._store.result(self._trial.number)
        if result is None and self._tags and not (self._tail.has_news or self._unsent):
            return
        for row in self._tail.read():
            self._attempt = max(self._attempt, row["attempt"])
            self._add(row)
        if result is not None and (row := final_evaluation(result)) is not None:
            self._unsent.setdefault(("evaluated", row["step"]), row)
            self._add(self._unsent["evaluated", row["step"]])
        tags = state_tags(self._trial, self._attempt, result) | place_tags(place)
        self._send_curve(tags if tags != self._tags else {}, result)
        self._tags = tags
        self._set_status(result)

    def kill(self) -> None:
        """Close a run that is not over; the next `send` opens it again."""
        if not self.over:
            end(self._client, self.run_id, "KILLED")
            self._status = "KILLED"
            self._tags = {}

    def _add(self, row: Row) -> None:
        key = (row["kind"], row["step"])
        if key in self._sent:
            self._unsent.pop(key, None)
        else:
            self._unsent[key] = row

    def _send_curve(self, tags: Mapping[str, str], result: TrialResult | None) -> None:
        """In as few calls as MLflow's limit allows; the first carries params, tags and the final
        metrics too."""
        rows = sorted(self._unsent.values(), key=lambda row: (row["step"], row["kind"]))
        final = [(result.time, result.steps, result_metrics(result))] if result is not None else []
        room = MAX_ENTITIES - len(self._params) - len(tags) - sum(len(one[2]) for one in final)
        for batch in _batches(rows, room):
            points = [*final, *(point for row in batch for point in point_metrics(row))]
            if not (points or tags or self._params):
                return
            log(self._client, self.run_id, self._params, points, tags)
            self._params, tags, final = {}, {}, []
            for row in batch:
                del self._unsent[row["kind"], row["step"]]
                self._sent.add((row["kind"], row["step"]))

    def _set_status(self, result: TrialResult | None) -> None:
        status = STATUS[self._tags["orchestrator.state"]]
        if result is not None:
            end(self._client, self.run_id, status, result.time)
            self.over = True
        elif status != self._status:
            self._client.update_run(self.run_id, status)
        self._status = status


def _batches(rows: Sequence[Row], room: int) -> Iterator[list[Row]]:
    """Rows whose metrics fit one call; `room` for the first. At least one batch, maybe empty."""
    batch: list[Row] = []
    for row in rows:
        size = sum(len(values) for _, _, values in point_metrics(row))
        if size > room:
            yield batch
            batch, room = [], MAX_ENTITIES
        batch.append(row)
        room -= size
    yield batch

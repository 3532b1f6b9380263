"""Whether an MLflow server holds each metric point of a run folder exactly once.

In: a RunStore and a client. Out: what is missing, and what is there that should not be.
"""

from collections import Counter
from typing import TYPE_CHECKING

from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.runs import TRIAL_TAG, find_runs, milliseconds
from orchestrator.tracking.translation import final_evaluation, point_metrics, result_metrics

if TYPE_CHECKING:
    from mlflow import MlflowClient

Point = tuple[int, str, int, int, str]
"""Trial, metric, step, milliseconds, value."""


def lost_and_doubled(
    store: RunStore, client: "MlflowClient", experiment_id: str
) -> tuple[list[Point], list[Point]]:
    expected, found = expected_points(store), found_points(store, client, experiment_id)
    return sorted((expected - found).elements()), sorted((found - expected).elements())


def expected_points(store: RunStore) -> Counter[Point]:
    points: Counter[Point] = Counter()
    for trial in store.trial_numbers:
        rows = store.points(trial)
        result = store.result(trial)
        if result is not None:
            last = final_evaluation(result)
            evaluated = {row["step"] for row in rows if row["kind"] == "evaluated"}
            if last is not None and last["step"] not in evaluated:
                rows.append(last)
            final = (result.time, result.steps, result_metrics(result))
            points.update(_points(trial, *final))
        for row in rows:
            for at, step, values in point_metrics(row):
                points.update(_points(trial, at, step, values))
    return points


def found_points(store: RunStore, client: "MlflowClient", experiment_id: str) -> Counter[Point]:
    """A run that is there twice gives its points twice."""
    points: Counter[Point] = Counter()
    for run in find_runs(client, experiment_id, store.sweep.run_id):
        if TRIAL_TAG not in run.data.tags:
            continue
        for name in run.data.metrics:
            for point in client.get_metric_history(run.info.run_id, name):
                number = int(run.data.tags[TRIAL_TAG])
                points[number, name, point.step, point.timestamp, repr(point.value)] += 1
    return points


def _points(trial: int, at: float, step: int, values: dict[str, float]) -> list[Point]:
    return [(trial, name, step, milliseconds(at), repr(value)) for name, value in values.items()]

"""How fast a run folder reaches a server on SQLite, beside raw log_batch calls of the same values.

Raw: the runs are made before the clock starts; then one process sends each trial's values in calls
of 1,000, MLflow's limit. Ours: everything a sync does, from no run at all: parent, runs, params,
tags, datasets, points, ends. Each has a new server and database.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.children import free_port
from benchmarks.forwarding_check import found_points
from benchmarks.mlflow_server import MlflowServer, empty_store
from benchmarks.recording import Row
from orchestrator.files import write_text
from orchestrator.records import Progress, TrialResult, TrialSpec
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.mlflow_view import MlflowView
from orchestrator.tracking.runs import milliseconds
from orchestrator.tracking.stores import client
from orchestrator.tracking.translation import PROGRESS_METRICS, point_metrics
from orchestrator.tracking.trial_run import MAX_ENTITIES
from tests.runs import BEGAN, make_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

VALUES_PER_ROW = len(PROGRESS_METRICS) + 1  # train_loss a second time, by tokens


def measure_rate(folder: Path, num_trials: int, points: int) -> Row:
    """`points`: metric values of each trial, in rows of six."""
    store, template = _make_run(folder / "run", num_trials, points), folder / "template"
    with MlflowServer(empty_store(folder / "raw", template), free_port()) as server:
        server.start()
        server.wait()
        raw_s = _send_raw(store, client(server.address))
    with MlflowServer(empty_store(folder / "ours", template), free_port()) as server:
        server.start()
        server.wait()
        view = MlflowView(store, server.address)
        began = time.monotonic()
        view.sync()
        ours_s = time.monotonic() - began
        view.finish("KILLED")
        found = found_points(store, client(server.address), view.experiment_id)
    return {
        "what": "rate",
        "trials": num_trials,
        "points": points,
        "values": sum(found.values()),
        "raw_s": round(raw_s, 2),
        "ours_s": round(ours_s, 2),
    }


def _make_run(folder: Path, num_trials: int, points: int) -> RunStore:
    store = make_run(folder, params=())
    trial_config = store.sweep.config.trial
    for number in range(num_trials):
        store.add_trial(TrialSpec(number, {"adapter.rank": 16}, trial_config))
        rows = [
            Progress(number, 1, BEGAN + step, step, 4000 * step, 2 + 1 / step, 2e-4, 0.8, 1234.5)
            for step in range(1, points // VALUES_PER_ROW + 1)
        ]
        lines = [json.dumps({"kind": "progress", **asdict(row)}) + "\n" for row in rows]
        write_text(store.trial_dir(number) / "progress.jsonl", "".join(lines))
        # One that failed has no final metrics, which the raw calls would not send.
        end = TrialResult(number, "failed", 1, BEGAN + 1e6, "raised", "made up")
        store.finish_trial(end)
    return store


def _send_raw(store: RunStore, api: "MlflowClient") -> float:
    experiment_id = api.create_experiment("raw")
    calls: list[tuple[str, list[Metric]]] = []
    for number in store.trial_numbers:
        run_id = api.create_run(experiment_id).info.run_id
        metrics = _metrics(store, number)
        calls += [
            (run_id, metrics[start : start + MAX_ENTITIES])
            for start in range(0, len(metrics), MAX_ENTITIES)
        ]
    began = time.monotonic()
    for run_id, metrics in calls:
        api.log_batch(run_id, metrics)
    return time.monotonic() - began


def _metrics(store: RunStore, number: int) -> "list[Metric]":
    from mlflow.entities import Metric

    return [
        Metric(name, value, milliseconds(at), step)
        for row in store.points(number)
        for at, step, values in point_metrics(row)
        for name, value in values.items()
    ]

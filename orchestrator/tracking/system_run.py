"""Use of the machines while a sweep trained, as MLflow's system metrics of the sweep's run.

In: system/NODE.jsonl in the run folder. Out: metrics under MLflow's own names, system/NODE/NAME,
each sent once. Imports no mlflow.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.tracking.runs import log
from orchestrator.tracking.tail import JsonLinesTail
from orchestrator.tracking.translation import finite_or_nan

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_ENTITIES = 1000  # of one log_batch call (MLflow 3.17)
PROBE = "cpu_utilization_percentage"
"""In every sample: tells which ones MLflow has."""


class SystemMetrics:
    def __init__(self, client: "MlflowClient", run_id: str, folder: Path) -> None:
        self._client = client
        self._run_id = run_id
        self._folder = folder / "system"
        self._tails: dict[str, JsonLinesTail] = {}
        self._sent: dict[str, set[int]] = {}

    def send(self) -> None:
        for path in sorted(self._folder.glob("*.jsonl")):
            node = path.stem
            if node not in self._tails:
                history = self._client.get_metric_history(self._run_id, f"system/{node}/{PROBE}")
                self._sent[node] = {point.step for point in history}
                self._tails[node] = JsonLinesTail(path)
            rows = [row for row in self._tails[node].read() if row["step"] not in self._sent[node]]
            for batch in _batches(rows):
                metrics = [(row["time"], row["step"], _named(node, row["values"])) for row in batch]
                log(self._client, self._run_id, metrics=metrics)


def _named(node: str, values: dict[str, float]) -> dict[str, float]:
    return {f"system/{node}/{name}": value for name, value in finite_or_nan(values).items()}


def _batches(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    size = max((len(row["values"]) for row in rows), default=1)
    per_call = max(1, MAX_ENTITIES // size)
    for start in range(0, len(rows), per_call):
        yield rows[start : start + per_call]

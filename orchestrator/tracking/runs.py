"""The few MLflow calls that all of tracking is made of.

In: a client and plain values. Out: experiment ids, runs. Raises what MLflow raises; callers turn
that into our errors with `mlflow_calls`. Imports mlflow inside functions only.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from orchestrator.errors import TrackingError
from orchestrator.tracking.provenance import DatasetRecord
from orchestrator.tracking.stores import artifact_location, environment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_ID_TAG = "orchestrator.run_id"
TRIAL_TAG = "orchestrator.trial"
FOLDER_TAG = "orchestrator.run_folder"
RUNS_PER_PAGE = 1000
MAX_DIGEST_CHARS = 36  # of a dataset (MLflow 3.17, store/tracking/dbmodels/models.py)
# The UI opens an experiment without this tag in its pages for chats and traces.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}

Values = Mapping[str, float]


def ensure_experiment(client: "MlflowClient", uri: str, name: str) -> str:
    """The experiment's id; made when it is not there.

    Raises:
        TrackingError: it was deleted, and MLflow keeps its name taken.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name, artifact_location(uri, name), EXPERIMENT_TAGS))
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"the MLflow experiment {name!r} was deleted: bring it back with `mlflow experiments "
            f"restore --experiment-id {found.experiment_id}`, or set tracking.experiment to "
            "another name"
        )
    return str(found.experiment_id)


def find_runs(client: "MlflowClient", experiment_id: str, run_id: str) -> Iterator["Run"]:
    """All runs of a sweep, its own and its trials', the first made first."""
    yield from search_all(client, experiment_id, f"tags.`{RUN_ID_TAG}` = '{run_id}'")


def search_all(client: "MlflowClient", experiment_id: str, rule: str) -> Iterator["Run"]:
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment_id],
            rule,
            max_results=RUNS_PER_PAGE,
            order_by=["attributes.start_time"],
            page_token=token,
        )
        yield from page
        if not (token := page.token):
            return


def log(
    client: "MlflowClient",
    run_id: str,
    params: Mapping[str, str] | None = None,
    metrics: Iterable[tuple[float, int, Values]] = (),
    tags: Mapping[str, str] | None = None,
) -> None:
    """One call for all. `metrics`: (Unix seconds, step, values)."""
    from mlflow.entities import Metric, Param, RunTag

    client.log_batch(
        run_id,
        [
            Metric(name, value, milliseconds(at), step)
            for at, step, values in metrics
            for name, value in values.items()
        ],
        [Param(name, value) for name, value in (params or {}).items()],
        [RunTag(name, value) for name, value in (tags or {}).items()],
    )


def log_datasets(client: "MlflowClient", run_id: str, datasets: Sequence[DatasetRecord]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(
                data.name,
                data.digest[:MAX_DIGEST_CHARS],
                "local",
                json.dumps({"uri": data.source}),
                profile=json.dumps(data.profile),
            ),
            [InputTag("mlflow.data.context", data.context)],
        )
        for data in datasets
    ]
    if inputs:
        client.log_inputs(run_id, inputs)


def log_model_metrics(
    client: "MlflowClient",
    run_id: str,
    model_id: str,
    metrics: Iterable[tuple[float, int, Values]],
    data: DatasetRecord | None,
) -> None:
    """Of the run and of its logged model; what the run has already stays as it is."""
    from mlflow.entities import Metric

    name_of_data = data.name if data is not None else None
    digest = data.digest[:MAX_DIGEST_CHARS] if data is not None else None
    client.log_batch(
        run_id,
        [
            Metric(name, value, milliseconds(at), step, model_id, name_of_data, digest, run_id)
            for at, step, values in metrics
            for name, value in values.items()
        ],
    )


def end(client: "MlflowClient", run_id: str, status: str, at: float | None = None) -> None:
    """Terminate a run, without the links that MLflow would print."""
    end_time = milliseconds(at) if at is not None else None
    with environment({"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}):
        client.set_terminated(run_id, status, end_time)


def own_tags(run_id: str) -> dict[str, str]:
    return {RUN_ID_TAG: run_id, "mlflow.source.name": "orchestrator"}


def milliseconds(seconds: float) -> int:
    return int(seconds * 1000)

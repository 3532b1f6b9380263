"""MLflow as a view of the run folder: one parent run per sweep, one nested run per trial.

In: a RunStore. Out: runs in an MLflow tracking server, which can be rebuilt from the run folder at
any time: a crash at any point and a second `sync` add nothing twice. Uses MlflowClient only and
leaves MLflow's global state alone.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from orchestrator.records import TrialSpec
from orchestrator.sweep.run_store import DRIVER_LOG, RunStore
from orchestrator.tracking.description import describe_sweep
from orchestrator.tracking.figures import PLOTS
from orchestrator.tracking.orphans import close_orphans
from orchestrator.tracking.provenance import Provenance, read_provenance
from orchestrator.tracking.runs import (
    FOLDER_TAG,
    TRIAL_TAG,
    end,
    ensure_experiment,
    find_runs,
    log,
    log_datasets,
    log_model_metrics,
    milliseconds,
    own_tags,
)
from orchestrator.tracking.stores import client, mlflow_calls, without_password
from orchestrator.tracking.system_run import SystemMetrics
from orchestrator.tracking.tail import JsonLinesTail
from orchestrator.tracking.translation import (
    cut,
    final_evaluation,
    point_metrics,
    result_metrics,
    short_name,
    trial_name,
)
from orchestrator.tracking.trial_run import TrialRun
from orchestrator.yaml_core import dump_yaml

if TYPE_CHECKING:
    from mlflow.entities import Run

ARTIFACTS = (
    "plan.json",
    "bits.json",
    "decisions.jsonl",
    "packs.jsonl",
    "environment.json",
    "report.html",
)

logger = logging.getLogger(__name__)


class MlflowView:
    def __init__(self, store: RunStore, uri: str) -> None:
        self._store = store
        self.uri = uri
        self._sweep = store.sweep
        self._experiment_id = ""
        self._run_id = ""
        self._trial_runs: dict[int, TrialRun] = {}
        self._connected = False
        self._provenance: Provenance | None = None
        self._pack_events = JsonLinesTail(store.folder / "packs.jsonl")
        self._places: dict[int, dict[str, object]] = {}

    @property
    def experiment_id(self) -> str:
        return self._experiment_id

    @property
    def run_id(self) -> str:
        """The sweep's own run, parent of its trials' runs."""
        return self._run_id

    def trial_run_id(self, number: int) -> str:
        return self._trial_runs[number].run_id

    def connect(self) -> None:
        """Find this sweep's runs by their tag, or begin them; `finish` ends what this opens.

        Raises:
            TrackingError: the server cannot be used, or the experiment was deleted.
        """
        with mlflow_calls(self.uri):
            self._client = client(self.uri)
            name = self._sweep.config.experiment_name
            self._experiment_id = ensure_experiment(self._client, self.uri, name)
            runs = list(find_runs(self._client, self._experiment_id, self._sweep.run_id))
            parents = [run for run in runs if TRIAL_TAG not in run.data.tags]
            parent = parents[0] if parents else self._create_parent()
            self._run_id = str(parent.info.run_id)
            if not parent.data.params:  # new, or left so by a process that ended here
                log(self._client, self._run_id, params=self._parent_params())
            if parent.info.status != "RUNNING":
                self._client.update_run(self._run_id, "RUNNING")
            self._delete(parents[1:])
            self._provenance = None
            self._find_trials([run for run in runs if TRIAL_TAG in run.data.tags])
            self._system = SystemMetrics(self._client, self._run_id, self._store.folder)
        self._connected = True
        self._write_ids()

    def close_orphans(self) -> list[str]:
        """Ids of other sweeps in this experiment that died; see orphans.py."""
        return close_orphans(self.uri, self._experiment_id, self._sweep.run_id)

    def sync(self) -> None:
        """Send what MLflow does not have yet; connects first where that has not come about.

        After a call that failed, MLflow is asked anew what it has.

        Raises:
            TrackingError: MLflow refused a call. Nothing is lost: the next sync sends it.
        """
        if not self._connected:
            self.connect()
        self._connected = False
        num_known = len(self._trial_runs)
        with mlflow_calls(self.uri):
            self._read_places()
            for number in self._store.trial_numbers:
                if number not in self._trial_runs:
                    self._trial_runs[number] = self._create_trial(self._store.trial(number))
                self._trial_runs[number].send(self._places.get(number, {}))
            self._system.send()
        self._connected = True
        if len(self._trial_runs) > num_known:
            self._write_ids()

    def finish(self, status: str) -> None:
        """Sync a last time, describe the sweep on its run, and end all its runs.

        `status`: FINISHED, FAILED or KILLED. Trials that are not over become KILLED; when the sweep
        is resumed, `connect` and `sync` open them again.

        Raises:
            TrackingError: MLflow refused a call.
        """
        self.sync()
        with mlflow_calls(self.uri):
            self._delete_strangers()
            for trial_run in self._trial_runs.values():
                trial_run.kill()
            self._log_winner()
            self._link_model()
            note = describe_sweep(self._store, self._run_id)
            self._client.set_tag(self._run_id, "mlflow.note.content", note)
            self._upload_artifacts()
            # A view may be rebuilt long after the sweep.
            ended = max((decision["time"] for decision in self._store.decisions), default=None)
            end(self._client, self._run_id, status, ended)

    def _create_parent(self) -> "Run":
        sweep = self._sweep
        versions = {f"orchestrator.version.{k}": v for k, v in sweep.versions.items()}
        return self._client.create_run(
            self._experiment_id,
            start_time=milliseconds(sweep.created),
            run_name=sweep.run_id,
            tags=own_tags(sweep.run_id) | versions | {FOLDER_TAG: str(self._store.folder)},
        )

    def _parent_params(self) -> dict[str, str]:
        sweep = self._sweep
        params = {
            "base_model": sweep.config.base_model.source,
            "train_data": sweep.config.data.train_name,
            "sampler": sweep.config.search.sampler,
            "objectives": sweep.config.search.objectives,
            "pruner": sweep.config.search.pruner.kind,
            "device": sweep.device,
            "compute_dtype": sweep.compute_dtype,
        }
        return cut(params)

    def _find_trials(self, runs: Sequence["Run"]) -> None:
        self._trial_runs = {}
        for run in runs:
            number = int(run.data.tags[TRIAL_TAG])
            if number in self._trial_runs:
                self._delete([run])
                continue
            trial = self._store.trial(number)
            self._trial_runs[number] = TrialRun.found(
                self._client, run, self._store, trial, self._sweep.compute_dtype
            )
            # It has none where a process ended after it had made the run.
            if run.inputs is None or not run.inputs.dataset_inputs:
                datasets = self._known_provenance().datasets
                log_datasets(self._client, run.info.run_id, datasets)

    def _delete_strangers(self) -> None:
        """Runs that MLflow's own retries made, unnoticed."""
        known = {self._run_id} | {run.run_id for run in self._trial_runs.values()}
        runs = find_runs(self._client, self._experiment_id, self._sweep.run_id)
        self._delete([run for run in runs if run.info.run_id not in known])

    def _delete(self, doubles: Sequence["Run"]) -> None:
        """Of runs that were made twice, as the answer to the first call was lost, the later one."""
        for run in doubles:
            logger.warning("tracking: run %s was made twice: it is deleted", run.info.run_id)
            self._client.delete_run(run.info.run_id)

    def _create_trial(self, trial: TrialSpec) -> TrialRun:
        provenance = self._known_provenance()
        trial_run = TrialRun.create(
            self._client,
            self._experiment_id,
            self._run_id,
            self._store,
            trial,
            provenance.tags | {"orchestrator.trial_key": provenance.trial_key(trial)},
            self._sweep.compute_dtype,
        )
        log_datasets(self._client, trial_run.run_id, provenance.datasets)
        return trial_run

    def _known_provenance(self) -> Provenance:
        """Base and data are prepared before the first trial is there."""
        if self._provenance is None:
            self._provenance = read_provenance(self._store)
            log(self._client, self._run_id, tags=self._provenance.tags)
            log_datasets(self._client, self._run_id, self._provenance.datasets)
        return self._provenance

    def _read_places(self) -> None:
        for event in self._pack_events.read():
            if event["what"] == "opened":
                self._places[event["trial"]] = event

    def _log_winner(self) -> None:
        winner = self._store.read("winner")
        if winner is None:
            return
        trial = next(trial for trial in self._store.trials if trial.number == winner["trial"])
        result = next(one for one in self._store.results if one.number == trial.number)
        assert result.eval_loss is not None
        fields = trial.params | {
            "trial": trial.number,
            "rank": trial.config.adapter.rank,
            "bit_width": trial.config.quant.mean_bits,
        }
        log(
            self._client,
            self._run_id,
            params=self._winner_params(cut({short_name(name): v for name, v in fields.items()})),
            # One metric, for sorting sweeps: more would stand before the trials' own charts.
            metrics=[(result.time, 0, {"best_eval_loss": result.eval_loss})],
            tags={"orchestrator.winner": trial_name(trial.number, trial.params)},
        )

    def _winner_params(self, fields: Mapping[str, str]) -> dict[str, str]:
        """A param never changes: the next winner, of an extended sweep, stands under winner_2/."""
        known = self._client.get_run(self._run_id).data.params
        for number in itertools.count(1):
            group = "winner" if number == 1 else f"winner_{number}"
            params = {f"{group}/{name}": value for name, value in fields.items()}
            if all(known.get(name, value) == value for name, value in params.items()):
                return params
        raise AssertionError("numbers have no end")

    def _link_model(self) -> None:
        """The winner's metrics on its logged model too, with the data that they were taken on."""
        winner = self._store.read("winner")
        if winner is None:
            return
        trial, run_id = winner["trial"], self.trial_run_id(winner["trial"])
        models = self._client.search_logged_models(
            [self._experiment_id], f"source_run_id = '{run_id}'"
        )
        result = self._store.result(trial)
        assert result is not None
        points = [(result.time, result.steps, result_metrics(result))]
        reported = (row for row in self._store.points(trial) if row["step"] == result.steps)
        last = next((row for row in reported if row["kind"] == "evaluated"), None)
        if (row := last or final_evaluation(result)) is not None:
            points += point_metrics(row)
        datasets = self._known_provenance().datasets
        held_out = next((data for data in datasets if data.context == "evaluation"), None)
        for model in models:
            log_model_metrics(self._client, run_id, str(model.model_id), points, held_out)

    def _upload_artifacts(self) -> None:
        for name in (*ARTIFACTS, DRIVER_LOG):
            if (path := self._store.folder / name).exists():
                self._client.log_artifact(self._run_id, str(path))
        if (self._store.folder / PLOTS).is_dir():
            self._client.log_artifacts(self._run_id, str(self._store.folder / PLOTS), PLOTS)
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / "config.yaml"
            content = self._sweep.config.model_dump(mode="json")
            path.write_text(dump_yaml(content), encoding="utf-8")
            self._client.log_artifact(self._run_id, str(path))

    def _write_ids(self) -> None:
        """For people and other commands; `connect` itself goes by the tags."""
        self._store.write(
            "tracking",
            {
                "uri": without_password(self.uri),
                "experiment_id": self._experiment_id,
                "run_id": self._run_id,
                "trials": {str(n): run.run_id for n, run in sorted(self._trial_runs.items())},
            },
        )

"""MLflow as a view of the run folder: one parent run per sweep, one nested run per trial.

In: a RunStore. Out: runs in an MLflow tracking server, which can be rebuilt from the run folder at
any time: a crash at any point and a second `sync` add nothing twice. Uses MlflowClient only and
leaves MLflow's global state alone.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from orchestrator.sweep.run_store import DRIVER_LOG, RunStore
from orchestrator.tracking.description import describe_sweep
from orchestrator.tracking.runs import (
    TRIAL_TAG,
    end,
    ensure_experiment,
    find_runs,
    log,
    milliseconds,
    own_tags,
)
from orchestrator.tracking.stores import client, mlflow_calls, without_password
from orchestrator.tracking.translation import (
    cut,
    short_name,
    trial_name,
)
from orchestrator.tracking.trial_run import TrialRun

ARTIFACTS = ("plan.json", "decisions.jsonl", "report.html")


class MlflowView:
    def __init__(self, store: RunStore, uri: str) -> None:
        self._store = store
        self.uri = uri
        self._sweep = store.sweep
        self._experiment_id = ""
        self._run_id = ""
        self._trial_runs: dict[int, TrialRun] = {}

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
            parents = [run.info for run in runs if TRIAL_TAG not in run.data.tags]
            self._run_id = parents[0].run_id if parents else self._create_parent()
            if parents and parents[0].status != "RUNNING":
                self._client.update_run(self._run_id, "RUNNING")
            self._trial_runs = {
                int(run.data.tags[TRIAL_TAG]): TrialRun.found(self._client, run)
                for run in runs
                if TRIAL_TAG in run.data.tags
            }
        self._write_ids()

    def sync(self) -> None:
        """Send what MLflow does not have yet; connects first where that has not come about.

        Raises:
            TrackingError: MLflow refused a call. Nothing is lost: the next sync sends it.
        """
        if not self._run_id:
            self.connect()
        results = {result.number: result for result in self._store.results}
        num_known = len(self._trial_runs)
        with mlflow_calls(self.uri):
            for trial in self._store.trials:
                if trial.number not in self._trial_runs:
                    points = self._store.points(trial.number)
                    self._trial_runs[trial.number] = TrialRun.create(
                        self._client,
                        self._experiment_id,
                        self._run_id,
                        self._sweep,
                        trial,
                        points[0]["time"] if points else None,
                    )
                trial_run = self._trial_runs[trial.number]
                trial_run.send(self._store, self._sweep, trial, results.get(trial.number))
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
            for trial_run in self._trial_runs.values():
                trial_run.kill()
            self._log_winner()
            note = describe_sweep(self._store)
            self._client.set_tag(self._run_id, "mlflow.note.content", note)
            self._upload_artifacts()
            end(self._client, self._run_id, status)

    def _create_parent(self) -> str:
        sweep = self._sweep
        versions = {f"orchestrator.version.{k}": v for k, v in sweep.versions.items()}
        run = self._client.create_run(
            self._experiment_id,
            start_time=milliseconds(sweep.created),
            run_name=sweep.run_id,
            tags=own_tags(sweep.run_id) | versions,
        )
        params = {
            "base_model": sweep.config.base_model.source,
            "train_data": sweep.config.data.train,
            "sampler": sweep.config.search.sampler,
            "objective": sweep.config.search.objective,
            "device": sweep.device,
            "compute_dtype": sweep.compute_dtype,
        }
        log(self._client, run.info.run_id, params=cut(params))
        return str(run.info.run_id)

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
            "bit_width": trial.config.quant.bit_width,
        }
        log(
            self._client,
            self._run_id,
            params=cut({f"winner/{short_name(name)}": value for name, value in fields.items()}),
            # One metric, for sorting sweeps: more would stand before the trials' own charts.
            metrics=[(result.time, 0, {"best_eval_loss": result.eval_loss})],
            tags={"orchestrator.winner": trial_name(trial.number, trial.params)},
        )

    def _upload_artifacts(self) -> None:
        for name in (*ARTIFACTS, DRIVER_LOG):
            if (path := self._store.folder / name).exists():
                self._client.log_artifact(self._run_id, str(path))
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / "config.yaml"
            content = self._sweep.config.model_dump(mode="json")
            path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
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

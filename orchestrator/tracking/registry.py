"""The winner's adapter in MLflow's model registry: one version per sweep, `champion` by a gate.

In: a RunStore with a winner. Out: a Registration; or, the other way, a version's adapter folder.
Every step finds what an earlier try has done, so a crash anywhere and a second try leave one
version; registration.json is written last.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import RegistryError
from orchestrator.files import file_digest, read_json
from orchestrator.records import TrialResult, TrialSpec
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.mlflow_view import MlflowView
from orchestrator.tracking.model_files import ADAPTER_WEIGHTS, log_adapter_model
from orchestrator.tracking.promotion import Promotion, Standing, decide_promotion
from orchestrator.tracking.runs import RUN_ID_TAG
from orchestrator.tracking.stores import client, environment, mlflow_calls, without_password

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE, CHAMPION = "candidate", "champion"
PROMOTION_TAG = "promotion"


@dataclass(frozen=True)
class Registration:
    model_name: str
    version: int
    champion: bool
    reason: str
    """Why it became the champion, or did not."""
    adapter_digest: str


@dataclass(frozen=True)
class Entry:
    """What is to be registered."""

    sweep_id: str
    model_name: str
    trial: TrialSpec
    result: TrialResult
    folder: Path
    record: dict[str, Any]
    """The adapter's orchestrator.json."""

    @property
    def tags(self) -> dict[str, str]:
        base = self.record["base_model"]
        return {
            RUN_ID_TAG: self.sweep_id,
            "trial": str(self.trial.number),
            "rank": str(self.trial.config.adapter.rank),
            "bit_width": str(self.trial.config.quant.bit_width),
            "eval_loss": str(self.result.eval_loss),
            "baseline_eval_loss": str(self.result.baseline_eval_loss),
            "held_out_digest": self.record["held_out_manifest"],
            "base_model": base["source"],
            "base_digest": base["digest"],
            "adapter_digest": self.result.adapter_digest,
        }


class Registry:
    def __init__(self, uri: str) -> None:
        self.uri = uri

    def register_winner(self, store: RunStore, view: MlflowView) -> Registration:
        """Register once; a second call returns what the first did.

        Raises:
            RegistryError: there is no winner, its adapter is damaged, or MLflow refused a call.
            TrackingError: the winner's run cannot be reached.
        """
        if done := self._registered(store):
            return done
        entry = _entry(store)
        with mlflow_calls(self.uri, RegistryError):
            version = self.ensure_version(entry, view)
            promotion = self.promote(entry.model_name, version)
        registration = Registration(
            entry.model_name,
            int(version.version),
            promotion.promote,
            promotion.reason,
            entry.result.adapter_digest,
        )
        address = without_password(self.uri)
        store.write("registration", asdict(registration) | {"uri": address})
        return registration

    def ensure_version(self, entry: Entry, view: MlflowView) -> "ModelVersion":
        """This sweep's version of the model; made if an earlier try did not come so far."""
        from mlflow.exceptions import MlflowException

        api = client(self.uri)
        try:
            api.create_registered_model(entry.model_name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        rule = f"name = '{entry.model_name}' and tags.`{RUN_ID_TAG}` = '{entry.sweep_id}'"
        if found := api.search_model_versions(rule):
            return found[0]
        run_id = view.trial_run_id(entry.trial.number)
        model_id = log_adapter_model(api, view.experiment_id, run_id, entry.folder, entry.tags)
        with _default_uri(self.uri):
            version = api.create_model_version(
                entry.model_name,
                f"models:/{model_id}",
                run_id,
                tags=entry.tags,
                description=_describe(entry),
                model_id=model_id,
            )
        link = [{"name": entry.model_name, "version": version.version}]
        api.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps(link)})
        return version

    def promote(self, model_name: str, version: "ModelVersion") -> Promotion:
        """Point the aliases: candidate always, champion by the gate. Safe to repeat."""
        api = client(self.uri)
        api.set_registered_model_alias(model_name, CANDIDATE, str(version.version))
        aliases = api.get_registered_model(model_name).aliases
        holder = aliases.get(CHAMPION)
        if holder is not None and int(holder) == int(version.version):  # an earlier try came so far
            return Promotion(True, version.tags[PROMOTION_TAG])
        champion = api.get_model_version(model_name, str(holder)) if holder is not None else None
        promotion = decide_promotion(
            _standing(version), _standing(champion) if champion is not None else None
        )
        api.set_model_version_tag(model_name, str(version.version), PROMOTION_TAG, promotion.reason)
        if promotion.promote:
            api.set_registered_model_alias(model_name, CHAMPION, str(version.version))
        return promotion

    def _registered(self, store: RunStore) -> Registration | None:
        record = store.read("registration")
        if record is None or record["uri"] != without_password(self.uri):
            return None
        return Registration(**{name: value for name, value in record.items() if name != "uri"})


def _entry(store: RunStore) -> Entry:
    winner = store.read("winner")
    if winner is None:
        raise RegistryError(f"{store.folder} has no winner: no trial finished with a finite loss")
    trial = next(trial for trial in store.trials if trial.number == winner["trial"])
    result = next(result for result in store.results if result.number == trial.number)
    folder = store.folder / result.adapter_dir
    weights = folder / ADAPTER_WEIGHTS
    found = file_digest(weights) if weights.exists() else "nothing"
    if found != result.adapter_digest:
        raise RegistryError(
            f"{weights} is damaged (digest {found[:12]}, but trial {trial.number} wrote "
            f"{result.adapter_digest[:12]}): restore the file, or run the sweep again"
        )
    sweep = store.sweep
    return Entry(
        sweep.run_id,
        sweep.config.registered_model_name,
        trial,
        result,
        folder,
        read_json(folder / "orchestrator.json"),
    )


def _standing(version: "ModelVersion") -> Standing:
    """By its tags; a version that someone else registered may have none."""
    tags = version.tags
    return Standing(
        int(version.version),
        float(tags.get("eval_loss", "nan")),
        float(tags.get("baseline_eval_loss", "nan")),
        tags.get("held_out_digest", ""),
    )


def _describe(entry: Entry) -> str:
    tags = entry.tags
    return (
        f"QLoRA adapter of rank {tags['rank']} for {tags['base_model']} at {tags['bit_width']} "
        f"bits: trial {entry.trial.number} of sweep {entry.sweep_id}. Held-out loss "
        f"{entry.result.eval_loss:.4f}, untrained base {entry.result.baseline_eval_loss:.4f}."
    )


@contextmanager
def _default_uri(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's default for the block only.

    The SQL registry resolves `models:/m-...` by the process's default URI, not by the client's
    (MLflow 3.17, model_registry/sqlalchemy_store.py, create_model_version, with a TODO on it).
    """
    from mlflow.tracking._tracking_service.utils import _use_tracking_uri

    # It sets MLFLOW_TRACKING_URI too, and at its end removes what the user had set.
    with environment({"MLFLOW_TRACKING_URI": uri}), _use_tracking_uri(uri):
        yield

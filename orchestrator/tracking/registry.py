"""The winner's adapter in MLflow's model registry: one version per sweep, `champion` by the gate.

In: a RunStore with a winner. Out: a Registration. Every step finds what an earlier try has done,
so a crash anywhere and a second try leave one version; the alias moves last, and then
registration.json is written.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import RegistryError
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.entry import Entry, read_entry
from orchestrator.tracking.gate import Evaluate, Gate
from orchestrator.tracking.lease import Timing
from orchestrator.tracking.mlflow_view import MlflowView
from orchestrator.tracking.model_files import log_adapter_model
from orchestrator.tracking.promotion import Promotion
from orchestrator.tracking.runs import RUN_ID_TAG
from orchestrator.tracking.stores import client, environment, mlflow_calls, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

GATE_FILE = "gate.json"


@dataclass(frozen=True)
class Registration:
    model_name: str
    version: int
    champion: bool
    reason: str
    """Why it became the champion, or did not."""
    adapter_digest: str
    gate: dict[str, Any]
    """The Promotion with its numbers."""


class Registry:
    def __init__(
        self,
        uri: str,
        api: "MlflowClient | None" = None,
        evaluate: Evaluate | None = None,
        timing: Timing | None = None,
    ) -> None:
        """`evaluate`: how a champion is measured on other examples, see gate.py."""
        self.uri = uri
        self._api = api or client(uri)
        self.gate = Gate(self._api, uri, evaluate, timing)

    def register_winner(self, store: RunStore, view: MlflowView) -> Registration:
        """Register once; a second call returns what the first did.

        Raises:
            RegistryError: there is no winner, its adapter is damaged, or MLflow refused a call.
            TrackingError: the winner's run cannot be reached.
        """
        if done := self._registered(store):
            return done
        entry = read_entry(store)
        with mlflow_calls(self.uri, RegistryError):
            version = self.ensure_version(entry, view)
            promotion = self._decide(store, version)
            run_id = view.trial_run_id(entry.trial.number)
            self._api.log_dict(run_id, promotion.to_json(), GATE_FILE)
        registration = Registration(
            entry.model_name,
            int(version.version),
            promotion.promote,
            promotion.reason,
            entry.result.adapter_digest,
            promotion.to_json(),
        )
        address = without_password(self.uri)
        store.write("registration", asdict(registration) | {"uri": address})
        return registration

    def ensure_version(self, entry: Entry, view: MlflowView) -> "ModelVersion":
        """This sweep's version of the model; made if an earlier try did not come so far."""
        from mlflow.exceptions import MlflowException

        api = self._api
        try:
            api.create_registered_model(entry.model_name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        rule = f"name = '{entry.model_name}' and tags.`{RUN_ID_TAG}` = '{entry.sweep_id}'"
        # An extended sweep may have another winner, which is another version.
        trial = str(entry.trial.number)
        versions = api.search_model_versions(rule)
        if found := [one for one in versions if one.tags.get("trial") == trial]:
            version = found[0]
        else:
            version = self._create_version(entry, view)
        if version.model_id:
            link = [{"name": entry.model_name, "version": version.version}]
            api.set_logged_model_tags(version.model_id, {"mlflow.modelVersions": json.dumps(link)})
        return version

    def _create_version(self, entry: Entry, view: MlflowView) -> "ModelVersion":
        run_id = view.trial_run_id(entry.trial.number)
        model_id, digests = log_adapter_model(
            self._api, view.experiment_id, run_id, entry.folder, entry.evaluation, entry.tags
        )
        with _default_uri(self.uri):
            return self._api.create_model_version(
                entry.model_name,
                f"models:/{model_id}",
                run_id,
                tags=entry.tags | digests,
                description=entry.description,
                model_id=model_id,
            )

    def _decide(self, store: RunStore, version: "ModelVersion") -> Promotion:
        if done := self.gate.decided(version):
            return done
        data = store.read("data")
        return self.gate.promote(
            version.name,
            int(version.version),
            store.sweep.config.registry.gate,
            data["place"] if data else None,
        )

    def _registered(self, store: RunStore) -> Registration | None:
        record = store.read("registration")
        if record is None or record["uri"] != without_password(self.uri):
            return None
        return Registration(**{name: value for name, value in record.items() if name != "uri"})


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

"""What tests of runs and of the registry share."""

from collections.abc import Callable

from mlflow import MlflowClient

from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.mlflow_view import MlflowView

MakeRun = Callable[..., RunStore]


def aliases(client: MlflowClient, model: str) -> dict[str, int]:
    found = client.get_registered_model(model).aliases
    return {name: int(version) for name, version in found.items()}


def connected(store: RunStore, uri: str) -> MlflowView:
    view = MlflowView(store, uri)
    view.connect()
    return view

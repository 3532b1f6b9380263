"""An adapter folder as an MLflow model's files, and back.

In: a PEFT folder and its evaluation. Out: a logged model that holds them with adapter_model.py; or
the folder or evaluation again, their digests verified. Imports mlflow inside functions only.
"""

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

from orchestrator.errors import RegistryError
from orchestrator.files import file_digest, read_json, whole_folder, write_json
from orchestrator.tracking.runs import RUN_ID_TAG
from orchestrator.tracking.stores import client, environment, mlflow_calls

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_RECORD = "orchestrator.json"
EVALUATION, ANSWERS = "evaluation.json", "answers.json"
EVALUATION_TAG = "evaluation_digest"
MODEL_CODE = Path(__file__).with_name("adapter_model.py")
EXAMPLE = "What does str.split do?"
# Given, for MLflow would otherwise load the base model in a subprocess to find them out.
REQUIREMENTS = ("mlflow", "torch", "transformers", "peft", "accelerate", "bitsandbytes")
ENVIRONMENT = {
    # Else a uv.lock in the working folder, with the addresses in it, is stored with the model.
    "MLFLOW_UV_AUTO_DETECT": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def log_adapter_model(
    api: "MlflowClient",
    experiment_id: str,
    run_id: str,
    folder: Path,
    evaluation: Mapping[str, Any] | None,
    tags: Mapping[str, str],
) -> tuple[str, dict[str, str]]:
    """Id of the run's logged model with the adapter and its evaluation, and the latter's digest as
    a tag. A model that an earlier try made whole is used, one that it left unfinished removed."""
    from mlflow.entities import LoggedModelOutput

    with TemporaryDirectory() as scratch, environment(ENVIRONMENT):
        artifacts = {"adapter": str(folder)}
        digests = {}
        if evaluation is not None:
            path = Path(scratch) / EVALUATION
            write_json(path, evaluation)
            artifacts["evaluation"] = str(path)
            digests[EVALUATION_TAG] = file_digest(path)
        tags = {**tags, **digests}
        rule = f"tags.`{RUN_ID_TAG}` = '{tags[RUN_ID_TAG]}'"
        for found in api.search_logged_models([experiment_id], rule):
            if found.source_run_id != run_id:
                continue
            if found.status == "READY":
                return str(found.model_id), digests
            api.delete_logged_model(found.model_id)
        params = {name: value for name, value in tags.items() if name != RUN_ID_TAG}
        model = api.create_logged_model(experiment_id, "adapter", run_id, tags, params, "adapter")
        _save_model(Path(scratch) / "model", model.model_id, run_id, artifacts, tags)
        api.log_model_artifacts(model.model_id, str(Path(scratch) / "model"))
        api.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        api.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id), digests


def read_evaluation(uri: str, found: "ModelVersion") -> dict[str, Any]:
    """The version's evaluation.json, verified.

    Raises:
        RegistryError: it has none, or it is damaged.
    """
    import mlflow

    digest = found.tags.get(EVALUATION_TAG)
    model_uri = f"models:/{found.name}/{found.version}"
    if digest is None:
        raise RegistryError(f"{model_uri} was registered without losses by example")
    with TemporaryDirectory() as scratch, mlflow_calls(uri, RegistryError):
        with environment(ENVIRONMENT):
            location = client(uri).get_model_version_download_uri(found.name, str(found.version))
            path = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{location}/artifacts/{EVALUATION}",
                dst_path=scratch,
                tracking_uri=uri,
            )
        if file_digest(Path(path)) != digest:
            raise RegistryError(
                f"{EVALUATION} of {model_uri} is damaged: its digest is not {digest[:12]}, which "
                "was registered"
            )
        record: dict[str, Any] = read_json(Path(path))
        return record


def find_version(uri: str, model_uri: str) -> "ModelVersion":
    """Of `models:/NAME@ALIAS` or `models:/NAME/VERSION`; RegistryError names those that exist."""
    with mlflow_calls(uri, RegistryError):
        return _find_version(client(uri), model_uri)


def download_adapter(uri: str, model_uri: str, to: Path) -> Path:
    """The PEFT folder of `models:/NAME@ALIAS` or `models:/NAME/VERSION`, verified, as folder `to`.

    Raises:
        RegistryError: there is no such version, its files are damaged, or `to` holds another one.
    """
    import mlflow

    with mlflow_calls(uri, RegistryError), environment(ENVIRONMENT):
        found = _find_version(client(uri), model_uri)
        location = client(uri).get_model_version_download_uri(found.name, str(found.version))
        if to.exists() and any(to.iterdir()):
            _verify(to, found, model_uri)
            return to
        with TemporaryDirectory() as scratch:
            # A folder of its own: from a local store MLflow returns the store's own files else.
            files = mlflow.artifacts.download_artifacts(
                artifact_uri=location, dst_path=scratch, tracking_uri=uri
            )
            adapter = Path(files) / _adapter_path(Path(files), model_uri)
            _verify(adapter, found, model_uri)
            if to.exists():
                to.rmdir()
            with whole_folder(to) as temporary:
                shutil.copytree(adapter, temporary, dirs_exist_ok=True)
    return to


def _save_model(
    path: Path,
    model_id: str,
    run_id: str,
    artifacts: dict[str, str],
    tags: Mapping[str, str],
) -> None:
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [
                ParamSpec("max_new_tokens", DataType.long, 128),
                ParamSpec("temperature", DataType.double, 0.0),
                ParamSpec("top_p", DataType.double, 1.0),
            ]
        ),
    )
    save_model(
        path=str(path),
        mlflow_model=Model(model_uuid=model_id, model_id=model_id, run_id=run_id),
        python_model=str(MODEL_CODE),
        artifacts=artifacts,
        signature=signature,
        input_example=[EXAMPLE],
        pip_requirements=[f"{name}=={_public_version(name)}" for name in REQUIREMENTS],
        metadata=dict(tags),
    )


def _public_version(package: str) -> str:
    """Without a local part such as +cpu, which no package index serves."""
    return version(package).partition("+")[0]


def _find_version(api: "MlflowClient", model_uri: str) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    name, at, alias = model_uri.removeprefix("models:/").partition("@")
    number = ""
    if not at:
        name, _, number = name.rpartition("/")
    try:
        if not model_uri.startswith("models:/") or not name or not (alias or number.isdigit()):
            raise RegistryError(f"{model_uri} is malformed: {_known_models(api)}")
        if at:
            return api.get_model_version_by_alias(name, alias)
        return api.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise RegistryError(f"{model_uri} is not in the registry: {_known_models(api)}") from error


def _known_models(api: "MlflowClient") -> str:
    known = []
    for model in api.search_registered_models(max_results=100):
        known += [f"models:/{model.name}@{alias}" for alias in model.aliases]
    if not known:
        return "no model has an alias yet; register one with `orchestrator sweep`"
    return f"choose one of {', '.join(sorted(known))}, or models:/NAME/VERSION"


def _adapter_path(files: Path, model_uri: str) -> str:
    """Where the model's own MLmodel file says that the adapter is."""
    try:
        content = yaml.safe_load((files / "MLmodel").read_text())
        return str(content["flavors"]["python_function"]["artifacts"]["adapter"]["path"])
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise RegistryError(
            f"{model_uri} holds no adapter: choose a version that `orchestrator` registered"
        ) from error


def _verify(folder: Path, version: "ModelVersion", model_uri: str) -> None:
    """The weights, and orchestrator.json, which holds the digests of the other files."""
    registered = {
        ADAPTER_WEIGHTS: version.tags.get("adapter_digest", ""),
        ADAPTER_RECORD: version.tags.get("record_digest", ""),
    }
    for name, digest in registered.items():
        path = folder / name
        found = file_digest(path) if path.exists() else "nothing"
        if found != digest:
            raise RegistryError(
                f"{path} is not the adapter of {model_uri}: its digest is {found[:12]}, registered "
                f"is {digest[:12] or 'nothing'}: remove the folder and try again, or register the "
                "adapter anew"
            )

"""`orchestrator generate`: a prompt through a registered adapter on the base it was trained on."""

import os
import tempfile
from pathlib import Path

from orchestrator.errors import BaseModelError, ConfigError
from orchestrator.files import read_json
from orchestrator.tracking.model_files import ADAPTER_WEIGHTS, download_adapter
from orchestrator.tracking.stores import default_store
from orchestrator.training.quiet import quiet_libraries

ADAPTER_FILES = ("adapter_config.json", "orchestrator.json", ADAPTER_WEIGHTS)


def generate_text(
    prompt: str,
    model: str,
    max_new_tokens: int,
    temperature: float,
    tracking_uri: str | None,
    runs_dir: Path,
) -> int:
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_store(runs_dir)
    with tempfile.TemporaryDirectory() as temporary, quiet_libraries():
        folder = Path(model)
        if model.startswith("models:/"):
            folder = download_adapter(uri, model, Path(temporary))
        _check_adapter(folder)
        from orchestrator.tracking.adapter_model import generate, load

        try:
            loaded, tokenizer = load(folder)
        except (OSError, ValueError) as error:  # of the base model: the adapter was looked at
            raise BaseModelError(str(error)) from error
        generate(
            loaded,
            tokenizer,
            [prompt],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stream=True,
        )
    return 0


def _check_adapter(folder: Path) -> None:
    remedy = "choose models:/NAME@ALIAS, models:/NAME/VERSION, or a folder that holds an adapter"
    if not folder.is_dir():
        raise ConfigError(f"--model: there is no folder {folder}: {remedy}")
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"--model: {folder} has no {', '.join(missing)}: {remedy}")
    for name in ADAPTER_FILES[:2]:
        try:
            read_json(folder / name)
        except ValueError as error:
            raise ConfigError(f"--model: {folder / name} is damaged: {error}: {remedy}") from error

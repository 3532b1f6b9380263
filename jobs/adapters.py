"""The adapter that a user names: a registered version, or a folder; found, checked, verified.

In: what stands after --model. Out: a folder that may be loaded.
"""

from collections.abc import Sequence
from pathlib import Path

from orchestrator.data_config import DataConfig
from orchestrator.errors import ConfigError
from orchestrator.files import read_json
from orchestrator.loading import data_config
from orchestrator.tracking.model_files import ADAPTER_RECORD, ADAPTER_WEIGHTS, download_adapter

ADAPTER_FILES = ("adapter_config.json", ADAPTER_RECORD, ADAPTER_WEIGHTS)
REMEDY = "choose models:/NAME@ALIAS, models:/NAME/VERSION, or a folder that holds an adapter"


def open_adapter(model: str, uri: str, scratch: Path) -> Path:
    """Raises ConfigError or RegistryError if there is none, or it is not the one that was saved."""
    folder = Path(model)
    if model.startswith("models:/"):
        folder = download_adapter(uri, model, scratch / "adapter")
    if not folder.is_dir():
        raise ConfigError(f"--model: there is no folder {folder}: {REMEDY}")
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"--model: {folder} has no {', '.join(missing)}: {REMEDY}")
    for name in ADAPTER_FILES[:2]:
        try:
            read_json(folder / name)
        except ValueError as error:
            raise ConfigError(f"--model: {folder / name} is damaged: {error}: {REMEDY}") from error
    from orchestrator.tracking.adapter_model import DamagedFiles, verify_adapter

    try:
        verify_adapter(folder)
    except DamagedFiles as error:
        raise ConfigError(f"--model: {error}") from error
    return folder


def rows_to_measure(adapter: Path, data: str, overrides: Sequence[str]) -> DataConfig:
    """All rows of a file, read as the adapter's training read its own but for the overrides; older
    adapters tell of its template alone."""
    record = read_json(adapter / ADAPTER_RECORD)
    read = record.get("reading") or {"template": record["template"]}
    content = {"train": data, "held_out": data, "max_held_out_examples": None, **read}
    return data_config(content, overrides)

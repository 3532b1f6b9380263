"""A configuration with nothing left that depends on where a command was called.

In: a SweepConfig as it was written. Out: the one that is stored: a resume, a sync or another driver
may come from another folder.
"""

from glob import glob
from pathlib import Path
from typing import Any

from orchestrator.config import SweepConfig, has_password
from orchestrator.data.streams import is_remote
from orchestrator.tracking.stores import absolute_uri, resolve_tracking_uri


def settled(config: SweepConfig) -> SweepConfig:
    content = config.model_dump()
    content["runs_dir"] = str(Path(config.runs_dir).expanduser().absolute())
    content["base_model"]["source"] = _absolute(content["base_model"]["source"])
    for role in ("train", "held_out"):
        content["data"][role] = _absolute_source(content["data"][role])
    shards_dir = config.data.shards_dir
    if shards_dir and not is_remote(shards_dir):
        content["data"]["shards_dir"] = str(Path(shards_dir).expanduser().absolute())
    uri = resolve_tracking_uri(SweepConfig.model_validate(content))
    if not has_password(uri):  # a password stays in the environment
        content["tracking"]["uri"] = absolute_uri(uri)
    return SweepConfig.model_validate(content)


def _absolute(path: str) -> str:
    """Of what is there; a hub id stays as it is."""
    whole = Path(path).expanduser().absolute()
    return str(whole) if whole.exists() or glob(str(whole)) else path


def _absolute_source(written: Any) -> Any:
    """Of a source as the configuration writes it: a path, a mapping with one, a list of these."""
    if isinstance(written, str):
        return _absolute(written)
    if isinstance(written, dict):
        return written | {"path": _absolute(written["path"])}
    return tuple(map(_absolute_source, written)) if written else written

"""Checkpoints of one slot: what resumes an attempt, verified by digest before use.

A checkpoint is the adapter's values, its optimizer states and its counters. What lies as the slot's
row does is saved without the padding, and so can be restored in any pack. The data position is
the step itself (data/order.py), and dropout masks are functions of the step (dropout.py), so there
is no random state to keep. checkpoint.json is written last: without it the folder is no checkpoint.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from orchestrator.errors import RunFolderError
from orchestrator.files import file_digest, read_json, record_digest, write_file, write_json
from orchestrator.training.optimizers import States

KEEP = 2  # the newest, and the one before in case the newest is damaged


@dataclass(frozen=True)
class Checkpoint:
    step: int
    tokens: int
    train_s: float
    row: Tensor
    """Without what is not the adapter's own, where `Stepper.layout` is empty."""
    optimizer: States
    program: str
    """How its steps were computed. Another way gives the same up to rounding, not to the bit."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the libraries that computed them, with the same effect; older checkpoints have none."""


def save_checkpoint(
    attempt_dir: Path, checkpoint: Checkpoint, config_digest: str, layout: str
) -> Path:
    """Returns the checkpoint's folder; older ones of this attempt beyond KEEP are removed."""
    from safetensors.torch import save_file

    folder = attempt_dir / f"checkpoint-{checkpoint.step:08d}"
    tensors, numbers = checkpoint.optimizer
    states = {f"optimizer.{name}": _savable(tensor) for name, tensor in tensors.items()}
    content = {"row": _savable(checkpoint.row), **states}
    write_file(folder / "state.safetensors", lambda path: save_file(content, path))
    record = {
        "step": checkpoint.step,
        "tokens": checkpoint.tokens,
        "train_s": checkpoint.train_s,
        "optimizer": numbers,
        "program": checkpoint.program,
        "versions": dict(checkpoint.versions),
        "trial_config": config_digest,
        "layout": record_digest(layout),
        "state_digest": file_digest(folder / "state.safetensors"),
    }
    write_json(folder / "checkpoint.json", record | {"digest": record_digest(record)})
    for old in sorted(attempt_dir.glob("checkpoint-*"))[:-KEEP]:
        (old / "checkpoint.json").unlink(missing_ok=True)
        shutil.rmtree(old)
    return folder


def load_checkpoint(folder: Path, config_digest: str, layout: str) -> Checkpoint:
    """Raises RunFolderError if the checkpoint is damaged or of another trial or row layout."""
    try:
        return _load(folder, config_digest, layout)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunFolderError(f"{folder} is damaged: {type(error).__name__}: {error}") from error


def _load(folder: Path, config_digest: str, layout: str) -> Checkpoint:
    from safetensors.torch import load_file

    record: dict[str, Any] = read_json(folder / "checkpoint.json")
    if record.pop("digest") != record_digest(record):
        raise RunFolderError(f"{folder} is damaged: checkpoint.json does not have its digest")
    expected = {"trial_config": config_digest, "layout": record_digest(layout)}
    for name, value in expected.items():
        if record[name] != value:
            raise RunFolderError(f"{folder}: the checkpoint's {name} is another one")
    if file_digest(folder / "state.safetensors") != record["state_digest"]:
        raise RunFolderError(
            f"{folder} is damaged: state.safetensors does not have the digest it was saved with"
        )
    content = load_file(folder / "state.safetensors")
    row = content.pop("row")
    states = {name.removeprefix("optimizer."): tensor for name, tensor in content.items()}
    return Checkpoint(
        step=record["step"],
        tokens=record["tokens"],
        train_s=record["train_s"],
        row=row,
        optimizer=(states, record["optimizer"]),
        program=record["program"],
        versions=dict(record["versions"]),
    )


def latest_checkpoint(
    folders: Sequence[Path], config_digest: str, layout: str
) -> tuple[Checkpoint | None, list[str]]:
    """The first of `folders` that verifies, and why earlier ones were passed over."""
    refused: list[str] = []
    for folder in folders:
        try:
            return load_checkpoint(folder, config_digest, layout), refused
        except RunFolderError as error:
            refused.append(str(error))
    return None, refused


def _savable(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone().contiguous()

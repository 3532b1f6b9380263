"""A saved adapter's held-out losses, on prepared examples, by the very code that training uses.

In: an adapter's folder and a manifest; perhaps a task, whose questions it answers too. Out:
evaluation.json's content, for the adapter and for its base alone. So a champion can be measured on
a candidate's examples, and any adapter on any file.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from orchestrator.config import QuantConfig, StrategyConfig, TaskConfig
from orchestrator.data.manifest import Manifest
from orchestrator.data.reader import BlockReader
from orchestrator.data.tokenizing import tokenizer_digest
from orchestrator.errors import BaseModelError, DataError
from orchestrator.files import read_json
from orchestrator.planning.ranks import largest_rank
from orchestrator.records import BaseModel, Device
from orchestrator.training.adapter import WEIGHTS, saved_config
from orchestrator.training.base_model import LoadedBase, load_base_model
from orchestrator.training.engine import RowEngine
from orchestrator.training.evaluation import evaluate
from orchestrator.training.lanes import BASE_ALONE, Served
from orchestrator.training.program import EagerProgram
from orchestrator.training.replicas import Alone
from orchestrator.training.slots import Slots
from orchestrator.training.task import Answers, Task

BATCH_SIZE = 8


def evaluate_adapter(
    adapter_dir: Path,
    manifest: Manifest,
    batch_size: int = BATCH_SIZE,
    task: TaskConfig | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluations of the adapter and of its base alone; with a task, the adapter's has `answers`.

    Raises:
        BaseModelError: the base model, or the adapter, is missing, damaged, or does not fit.
        DataError: the examples were prepared for another tokenizer or template, or an answer has
            nothing that the task compares.
    """
    from orchestrator.tracking.adapter_model import base_source, verify_adapter

    try:
        verify_adapter(adapter_dir)
        record = read_json(adapter_dir / "orchestrator.json")
        folder = base_source(record["base_model"])
    except (OSError, ValueError) as error:
        raise BaseModelError(str(error)) from error
    _check_examples(manifest, record["template"], folder)
    reader = BlockReader(manifest)
    quant = QuantConfig.model_validate(record["quant"] | {"compute_dtype": record["compute_dtype"]})
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    model = BaseModel(**{**record["base_model"], "folder": folder})
    base = load_base_model(model, quant, device, StrategyConfig())
    rows, scaling = _load_rows(base, adapter_dir)
    rows.give_up_gradients()
    engine = RowEngine(rows, EagerProgram(base, rows), Alone())
    served = Served(0, scaling)
    adapter, alone = evaluate(base, engine, Alone(), [served, BASE_ALONE], reader, batch_size)
    found = adapter.to_json(reader)
    if task is not None:
        asked = Task(task, reader, folder, base, rows, Alone())
        answers = Answers(adapter, asked)
        while not answers.complete:
            asked.go_on(answers, served, engine.program)
        found["answers"] = answers.to_json() | {"task": task.model_dump()}
    return found, alone.to_json(reader)


def _load_rows(base: LoadedBase, adapter_dir: Path) -> tuple[Slots, float | tuple[float, ...]]:
    config = saved_config(adapter_dir)
    targets, rank = config.target_modules, largest_rank(config)
    rows = Slots(base.model, targets, 1, rank, base.device, base.wide_dtype, config.use_dora)
    try:
        rows.load(0, load_file(adapter_dir / WEIGHTS), config)
    except (KeyError, ValueError) as error:
        raise BaseModelError(f"{adapter_dir} does not fit its base model: {error}") from error
    return rows, rows.scalings(config)


def _check_examples(manifest: Manifest, template: str, folder: str) -> None:
    used = manifest.recipe.templates(manifest.role)
    if template not in used:
        raise DataError(
            f"the examples were prepared with template {' and '.join(sorted(used))}, the adapter "
            f"was trained with {template}: prepare them with the same"
        )
    if manifest.recipe.tokenizer != tokenizer_digest(Path(folder)):
        raise DataError(
            "the examples were prepared with another tokenizer than the adapter's base model has: "
            "losses per token are of different tokens"
        )

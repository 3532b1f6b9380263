"""One tiny base model and dataset for all training tests."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import EvaluationConfig, QuantConfig, TrialConfig
from orchestrator.data.prepare import prepare
from orchestrator.errors import StrategyError
from orchestrator.records import BaseModel, PackSpec
from orchestrator.tracking.adapter_model import base_digest
from tests.sweeps import sweep_config, with_changes
from tests.tiny import make_base_model, question_rows

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

MakeSpec = Callable[..., PackSpec]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def make_spec(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeSpec:
    """A PackSpec on the tiny base in float32, with changes."""
    folder = tmp_path_factory.mktemp("data")
    rows = folder / "train.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in question_rows(200)))
    config = sweep_config(data__train=str(rows), data__block_length=64).data
    data = prepare(config, base_folder, folder)

    def make(bit_width: int = 16, **changes: Any) -> PackSpec:
        quant = QuantConfig.model_validate({"bit_width": bit_width, "compute_dtype": "float32"})
        spec = PackSpec(
            pack=0,
            base_model=BaseModel("tiny", None, str(base_folder), base_digest(base_folder)),
            data_place=data.place,
            template="plain",
            quant=quant.model_dump(),
            target_modules="all-linear",
            num_slots=2,
            max_rank=8,
            micro_batch_size=2,
            gradient_checkpointing=False,
            strategy=TrialConfig().strategy.model_dump(),
            device="cpu",
            cpus=1,
            evaluation=EvaluationConfig(),
            checkpoint_every_steps=2,
        )
        return replace(spec, **changes)

    return make


@pytest.fixture
def async_io() -> None:
    """A test that swaps to a disk is skipped where DeepSpeed's op for it cannot be made."""
    from orchestrator.training.deepspeed_ops import load_op

    try:
        load_op("async_io")
    except StrategyError as error:
        pytest.skip(str(error))


def trial_config(**changes: Any) -> TrialConfig:
    content: dict[str, Any] = {
        "steps": 6,
        "batch_size": 2,
        "adapter": {"rank": 4, "alpha": 8},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"kind": "linear", "warmup_steps": 1},
    }
    return TrialConfig.model_validate(with_changes(content, changes))

"""DeepSpeed's configuration is the golden one for typical packs.

After a wanted change: `UPDATE_GOLDEN=1 pytest tests/unit/test_zero_config.py`, and read the diff.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import StrategyConfig
from orchestrator.planning.zero import MAX_BUCKET_ELEMENTS, zero_config

GOLDEN = Path(__file__).parents[1] / "golden"

# 2,442,240 parameters: rank 8 on SmolLM2-135M; 828 million: rank 64 on a 70B model.
CASES: dict[str, tuple[dict[str, Any], int, int, str]] = {
    "stage1_cpu": ({"stage": 1}, 2_442_240, 4, "cpu"),
    "stage2_optimizer_offload": (
        {"stage": 2, "offload_optimizer": "cpu"},
        828_375_040,
        1,
        "cuda",
    ),
    "stage3_full_offload": (
        {"stage": 3, "offload_optimizer": "cpu", "offload_params": "cpu"},
        41_943_040,
        2,
        "cuda",
    ),
    "stage3_nvme": (
        {
            "stage": 3,
            "offload_optimizer": "nvme",
            "offload_params": "nvme",
            "nvme_path": "/scratch/worker-1",
        },
        828_375_040,
        1,
        "cuda",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_deepspeed_config_is_the_golden_one(name: str) -> None:
    changes, num_params, micro_batch_size, device = CASES[name]
    strategy = StrategyConfig.model_validate({"kind": "zero", **changes})
    config = zero_config(strategy, num_params, micro_batch_size, device)
    path = GOLDEN / f"zero_{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(json.dumps(config, indent=2) + "\n")
    assert config == json.loads(path.read_text())


@pytest.mark.parametrize("num_params", [7, 1000, 10**9])
def test_buckets_are_even_and_no_larger_than_the_adapter_or_the_limit(num_params: int) -> None:
    strategy = StrategyConfig(kind="zero", stage=2)
    section = zero_config(strategy, num_params, 1, "cpu")["zero_optimization"]
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        assert section[name] % 2 == 0
        assert section[name] <= min(num_params + 1, MAX_BUCKET_ELEMENTS)

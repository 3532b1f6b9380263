"""Packs that were measured on a GPU, as parameters of the tests that hold the planner to them."""

import json
from typing import Any

import pytest

from benchmarks.recording import RESULTS

RECORDED = ("packs_gpu", "engine_single")
NAMES = ("shape", "bit_width", "adapters", "tokens_per_adapter", "program")


def recorded_packs() -> list[Any]:
    """Rows of this project's own packs, each once."""
    files = [json.loads((RESULTS / f"{name}.json").read_text()) for name in RECORDED]
    own = {
        " ".join(str(row[name]) for name in NAMES): row
        for content in files
        for row in content["rows"]
        if row["who"] == "pack"
    }
    return [pytest.param(row, id=name) for name, row in own.items()]

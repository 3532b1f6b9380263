"""One tiny tokenizer for the whole session: importing transformers takes seconds."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.data.formats import Tokenizer
from orchestrator.data.tokenizing import load_tokenizer
from tests.tiny import make_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

Row = dict[str, object]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return load_tokenizer(str(tokenizer_dir))


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Row], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write

"""What is begun while Ray starts: the tokenizer, and a task pool that is this process."""

import json
import shutil
from pathlib import Path

import pytest

from jobs.ahead import tokenizer_ahead
from orchestrator.config import SweepConfig
from orchestrator.data.prepare import prepare
from orchestrator.data.tokenizing import load_tokenizer
from orchestrator.errors import BaseModelError
from orchestrator.files import cache_dir
from tests.sweeps import sweep_config
from tests.tiny import make_tokenizer, question_rows


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepConfig:
    """On a folder that passes for a base model until its weights are looked at."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    base = make_tokenizer(tmp_path / "base")
    (base / "config.json").write_text("{}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in question_rows(40)))
    data = {"train": str(rows), "block_length": 64}
    return sweep_config(base_model={"source": str(base)}, data=data)


def prepare_here(config: SweepConfig) -> int:
    """The number of tokenizers that were loaded after the pool was open."""
    with tokenizer_ahead(config) as task_pool, task_pool() as run_tasks:
        loaded = load_tokenizer.cache_info().misses
        prepare(config.data, Path(config.base_model.source), cache_dir(), run_tasks)
        return load_tokenizer.cache_info().misses - loaded


def test_the_tokenizer_is_there_when_the_data_are_prepared(config: SweepConfig) -> None:
    assert prepare_here(config) == 0


def test_no_tokenizer_is_loaded_for_data_that_are_prepared_already(config: SweepConfig) -> None:
    prepare_here(config)
    loaded = load_tokenizer.cache_info().misses
    load_tokenizer.cache_clear()
    prepare_here(config)
    assert load_tokenizer.cache_info().misses == 0 < loaded


def test_a_damaged_tokenizer_is_named_by_who_needs_it(config: SweepConfig) -> None:
    base = Path(config.base_model.source)
    (base / "tokenizer.json").write_text("{")
    with pytest.raises(BaseModelError, match="the tokenizer cannot be loaded"):
        prepare_here(config)


def test_missing_data_are_left_to_who_needs_them(config: SweepConfig) -> None:
    """A sweep that has its shards is resumed where the source is gone."""
    prepare_here(config)
    Path(config.data.train_sources[0].path).unlink()
    shutil.rmtree(config.base_model.source)
    with tokenizer_ahead(config):
        pass

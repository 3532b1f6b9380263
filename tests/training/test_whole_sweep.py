"""A sweep from its configuration to its winner in one process, with every sampler."""

import json
from pathlib import Path

import pytest

from benchmarks.sweeps import run_or_resume
from orchestrator.search.samplers import STARTUP_TRIALS
from orchestrator.search.space import first_trials
from tests.sweeps import sweep_config
from tests.tiny import question_rows

RANGES = {
    "optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "adapter.rank": {"low": 2, "high": 8, "integer": True},
}
SAMPLERS = ["random", *STARTUP_TRIALS]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_searches_ranges_to_a_winner(
    base_folder: Path, tmp_path: Path, sampler: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in question_rows(40)))
    config = sweep_config(
        base_model={"source": str(base_folder)},
        data={"train": str(rows), "block_length": 32},
        trial={"steps": 2, "batch_size": 2},
        search={"space": RANGES, "sampler": sampler, "num_trials": 3},
        resources={"device": "cpu"},
    )
    store, outcome = run_or_resume(config, tmp_path / "run")
    assert [result.state for result in store.results] == ["finished"] * 3
    assert outcome.winner is not None
    # Fewer than it draws before it learns.
    asked = [trial.params for trial in first_trials(config)]
    assert [trial.params for trial in store.trials] == asked

"""A trial killed at any step ends with the same bytes as one left alone."""

import random
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import EvaluationConfig, TrialConfig
from orchestrator.records import Evaluated, Event, PackSpec, TrialDone, TrialOpened
from orchestrator.training.pack import PackWorker
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_pack import task

STEPS, CHECKPOINT_EVERY, KILLS = 9, 2, 5


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [
        ("adamw", {}),
        ("adamw_8bit", {}),
        ("paged_adamw_32bit", {"kind": "zero", "stage": 2}),
        # test_zero.py resumes one, too
        pytest.param("paged_adamw_8bit", {"kind": "zero", "stage": 3}, marks=pytest.mark.slow),
    ],
)
def test_trials_killed_at_random_steps_end_with_the_same_adapter_bytes(
    make_spec: MakeSpec, tmp_path: Path, optimizer: str, strategy: dict[str, Any]
) -> None:
    trial = trial_config(
        steps=STEPS, optimizer__name=optimizer, adapter__dropout=0.1, strategy=strategy
    )
    spec = make_spec(
        num_slots=1,
        bit_width=4,
        dropout=True,
        strategy=trial.strategy.model_dump(),
        checkpoint_every_steps=CHECKPOINT_EVERY,
        evaluation=EvaluationConfig(every_steps=1),  # ends each call of advance
    )
    undisturbed = end_of(spec, trial, tmp_path / "whole")
    draw = random.Random(optimizer)
    for kill in range(KILLS):
        folder, step = tmp_path / str(kill), draw.randrange(1, STEPS)
        trained_until(spec, trial, folder, step)
        resumed = end_of(spec, trial, folder, attempt=2, begins_at=step // 2 * 2)
        assert resumed == undisturbed, f"killed after step {step}"


def trained_until(spec: PackSpec, trial: TrialConfig, folder: Path, step: int) -> None:
    """What is on disk is all that is left."""
    worker = PackWorker(spec)
    worker.load()
    events: list[Event] = worker.advance([task(0, trial, folder)])
    while not any(isinstance(event, Evaluated) and event.step == step for event in events):
        events = worker.advance([])


def end_of(
    spec: PackSpec, trial: TrialConfig, folder: Path, attempt: int = 1, begins_at: int = 0
) -> str:
    """The adapter's digest."""
    worker = PackWorker(spec)
    worker.load()
    events: list[Event] = worker.advance([task(0, trial, folder, attempt)])
    (opened,) = [event for event in events if isinstance(event, TrialOpened)]
    assert opened.step == begins_at
    while not (done := [event for event in events if isinstance(event, TrialDone)]):
        events = worker.advance([])
    return done[0].adapter_digest

"""Answers beside compiled and recorded programs, on a base whose attention goes by documents."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.cli import run
from orchestrator.config import QuantConfig
from orchestrator.files import read_json
from orchestrator.records import PackSpec
from tests.training.conftest import trial_config
from tests.training.test_pack import train
from tests.training.test_task import (
    LEARNT,
    NEIGHBOURS,
    done_of,
    evaluate_arguments,
    questions,
    spec,
    without_task,
)

__all__ = ["questions", "spec"]

QUANT = QuantConfig(compute_dtype="bfloat16", bit_width=4).model_dump()
PROGRAMS = ["eager", "in_place", "compiled", "graph"]


def on_gpu(spec: PackSpec, program: Any) -> PackSpec:
    num_slots = 1 if program == "in_place" else 2
    return replace(spec, device="cuda", quant=QUANT, step_program=program, num_slots=num_slots)


@pytest.mark.parametrize("program", PROGRAMS)
def test_others_train_on_to_the_same_bits(spec: PackSpec, tmp_path: Path, program: str) -> None:
    trials = [*NEIGHBOURS, trial_config(steps=9, seed=3)]
    asked = on_gpu(spec, program)
    with_answers, events = train(asked, trials, tmp_path / "with")
    without, _ = train(without_task(asked), trials, tmp_path / "without")
    assert all(done.task_score is not None for done in done_of(events).values())
    for number, adapter in without.items():
        for name, tensor in adapter.items():
            assert torch.equal(tensor, with_answers[number][name]), (number, name)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_score_is_what_evaluate_says_of_the_saved_adapter_up_to_rounding(
    spec: PackSpec,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    done = done_of(train(on_gpu(spec, program), [LEARNT], tmp_path)[1])[0]
    assert done.task_score is not None
    assert done.task_score > 0
    out = tmp_path / "report.json"
    assert run(evaluate_arguments(done, questions, out)) == 0
    # Adapters of PEFT compute in another order: an answer may be another where two are as likely.
    assert read_json(out)["exact_match"] == pytest.approx(done.task_score, abs=0.2)

"""The sweep in simulated time, through the real policy."""

from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.memory_cases import base_shape
from benchmarks.models import SHAPES
from benchmarks.planner_simulation import simulated
from orchestrator.config import QuantConfig
from orchestrator.planning.gpus import GPUS
from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.load import PackLoad
from orchestrator.planning.memory import GIB
from orchestrator.planning.packs import PackPlan
from orchestrator.planning.speed import tokens_per_s
from orchestrator.records import TrialSpec
from orchestrator.sweep.forecast import Forecast, Loss, forecast
from tests.recorded import recorded_packs
from tests.sweeps import LLAMA_8B, premises, sweep_config

START_S = 10.0


def sweep(
    num_gpus: int, *steps: int, losses: Sequence[Loss] = (), every_s: float = 0.0
) -> Forecast:
    """Trials of one block a step on GPUs that take a second for it, however many share them."""
    config = sweep_config(trial__batch_size=1)
    trials = [
        TrialSpec(n, {}, sweep_config(trial__batch_size=1, trial__steps=count).trial)
        for n, count in enumerate(steps)
    ]
    kind = WorkerKind("H200", num_gpus, 140 * GIB)
    given = premises(config, "cuda", LLAMA_8B, kind.memory_bytes)

    def block_s(plan: PackPlan, occupied: int) -> float:
        return float(occupied)

    return forecast(trials, (kind,), given, block_s, lambda plan: START_S, losses, every_s)


def test_trials_that_share_a_gpu_take_the_time_of_all_of_them() -> None:
    found = sweep(1, 100, 100)
    (pack,) = found.packs
    assert pack.plan.num_slots == 2
    assert [span.end_s for span in found.spans] == [START_S + 200] * 2
    assert found.makespan_s == START_S + 200
    assert pack.occupied_s == 400
    assert found.worker_s == START_S + 200


def test_who_is_left_in_a_pack_goes_on_faster() -> None:
    found = sweep(1, 50, 100)
    assert {span.trial: span.end_s for span in found.spans} == {0: START_S + 100, 1: START_S + 150}


def test_a_lost_gpu_takes_what_was_trained_since_the_last_checkpoint() -> None:
    (undisturbed,) = sweep(1, 100).spans
    loss = Loss(at_s=START_S + 55, kind="H200", num_workers=1, back_s=200.0)
    found = sweep(1, 100, losses=[loss], every_s=20.0)
    assert [(span.finished, span.end_s) for span in found.spans] == [
        (False, START_S + 55),
        (True, 200 + START_S + 60),
    ]
    assert undisturbed.end_s == START_S + 100


def test_without_checkpoints_a_lost_trial_begins_anew() -> None:
    loss = Loss(at_s=START_S + 55, kind="H200", num_workers=1, back_s=200.0)
    assert sweep(1, 100, losses=[loss]).makespan_s == 200 + START_S + 100


def test_a_simulated_sweep_ends_with_every_trial_trained_near_its_lower_bound() -> None:
    few = simulated(num_trials=10, num_gpus=2, seed=0)
    assert few["attempts"] == 10
    row = simulated(num_trials=60, num_gpus=6, seed=1)
    assert row["over_bound"] >= 1.0
    assert row["over_bound"] < 2.0
    assert row["attempts"] >= 60
    assert 0.5 < row["slot_utilisation"] <= 1.0


def recorded_rates() -> list[Any]:
    # A compiled step waits for its CPU, which differs from machine to machine.
    return [param for param in recorded_packs() if param.values[0]["program"] == "graph"]


@pytest.mark.parametrize("row", recorded_rates())
def test_the_speed_model_gives_the_rates_of_an_h200(row: dict[str, Any]) -> None:
    load = PackLoad(
        quant=QuantConfig(),
        dtype_bytes=2,
        num_slots=row["adapters"],
        max_rank=16,
        target_modules="all-linear",
        optimizer_bytes=8,
        host_optimizer_bytes=8,
        micro_batch_size=1,
        evaluation_batch_size=1,
        block_length=row["tokens_per_adapter"],
        gradient_checkpointing=False,
        dequantise_once=True,
        dropout=False,
        step_program=row["program"],
        cuda=True,
    )
    rate = tokens_per_s(base_shape(SHAPES[row["shape"]]), load, GPUS["H200"])
    # Fitted to a run on another card than the recorded one.
    assert rate == pytest.approx(row["tokens_per_s"], rel=0.06)

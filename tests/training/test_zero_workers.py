"""A trial whose states two workers share under ZeRO is the replicated one; and trials of two
workers that are killed end as those of workers left alone."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import TrialConfig
from orchestrator.records import Checkpointed, GroupPlace, PackSpec, TrialDone, TrialOpened
from orchestrator.training.pack import PackWorker
from tests.tiny import make_base_model
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_data_parallel import outcomes, run_together, train_together
from tests.training.test_nvme import TOLERANCE, swapped, wide_spec, wide_trial
from tests.training.test_pack import assert_equal, task, train
from tests.training.test_zero import zero_strategy

TRIALS = [
    trial_config(batch_size=4, adapter__rank=3, optimizer__max_grad_norm=0.05),
    trial_config(batch_size=8, seed=2, adapter__dropout=0.1, steps=3),
]
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "bit_width"),
    [
        ("stage 3", 16),
        pytest.param("stage 2", 4, marks=slow),
        pytest.param("stage 1, optimizer on the CPU", 16, marks=slow),
        pytest.param("stage 2", 8, marks=slow),
        pytest.param("stage 3", 4, marks=slow),
        pytest.param("stage 3, all on the CPU", 4, marks=slow),
    ],
)
def test_two_workers_train_a_trial_under_zero_as_one_does_replicated(
    make_spec: MakeSpec, tmp_path: Path, name: str, bit_width: int
) -> None:
    spec = make_spec(num_slots=1, bit_width=bit_width, micro_batch_size=1)
    alone, alone_events = train(spec, TRIALS, tmp_path / "alone")
    strategy = zero_strategy(name)
    zero = make_spec(num_slots=1, bit_width=bit_width, micro_batch_size=1, strategy=strategy)
    (pair, events), (_, other_events) = train_together(zero, TRIALS, tmp_path / "pair")
    for number in range(len(TRIALS)):
        assert_equal(pair[number], alone[number], tolerance=1e-5)  # sums in another order
    assert outcomes(events) == pytest.approx(outcomes(alone_events), rel=1e-5)
    assert outcomes(other_events) == outcomes(events)


@slow
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("replicated", "adamw_8bit"),
        ("stage 1", "adamw"),
        ("stage 2", "adamw"),
        ("stage 2", "paged_adamw_8bit"),
        ("stage 2, optimizer on the CPU", "deepspeed_cpu_adam"),
        ("stage 3", "adamw"),
        ("stage 3", "paged_adamw_8bit"),
        ("stage 3, all on the CPU", "deepspeed_cpu_adam"),
    ],
)
def test_two_workers_killed_and_resumed_end_with_the_same_adapter_bytes(
    make_spec: MakeSpec, tmp_path: Path, name: str, optimizer: str
) -> None:
    trials = [trial_config(batch_size=2, optimizer__name=optimizer, adapter__dropout=0.1)]
    strategy = {} if name == "replicated" else {"strategy": zero_strategy(name)}
    spec = make_spec(num_slots=1, max_rank=4, dropout=True, micro_batch_size=1, **strategy)
    (_, events), _ = train_together(spec, trials, tmp_path / "whole")
    run_together(end_at_step_4, spec, trials, tmp_path / "cut")
    run_together(resume, spec, trials, tmp_path / "cut")
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    assert (tmp_path / "cut" / "digest").read_text() == done.adapter_digest


@slow
@pytest.mark.usefixtures("async_io")
def test_two_workers_train_a_trial_on_nvme_as_one_does_replicated(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    """On one machine, each in a folder of its own."""
    trials = [wide_trial(batch_size=2, steps=3)]
    base = make_base_model(tmp_path / "base", hidden_size=1024)
    spec = wide_spec(make_spec, base, bit_width=16, micro_batch_size=1)
    alone, _ = train(spec, trials, tmp_path / "alone")
    (pair, _), _ = train_together(
        swapped(spec, "all on NVMe", tmp_path / "nvme"), trials, tmp_path / "pair"
    )
    assert_equal(pair[0], alone[0], TOLERANCE)


@slow
@pytest.mark.usefixtures("async_io")
def test_two_workers_on_nvme_killed_and_resumed_end_with_the_same_adapter_bytes(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    trials = [wide_trial(batch_size=2, optimizer__name="deepspeed_cpu_adam")]
    base = make_base_model(tmp_path / "base", hidden_size=1024)
    spec = wide_spec(make_spec, base, bit_width=4, micro_batch_size=1)
    spec = swapped(spec, "all on NVMe", tmp_path / "nvme")
    (_, events), _ = train_together(spec, trials, tmp_path / "whole")
    run_together(end_at_step_4, spec, trials, tmp_path / "cut")
    run_together(resume, spec, trials, tmp_path / "cut")
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    assert (tmp_path / "cut" / "digest").read_text() == done.adapter_digest


def end_at_step_4(
    place: GroupPlace, spec: PackSpec, trials: Sequence[TrialConfig], folder: Path
) -> None:
    worker = PackWorker(spec, place)
    worker.load()
    events: list[Any] = worker.advance([task(0, trials[0], folder)])
    while not any(isinstance(event, Checkpointed) and event.step == 4 for event in events):
        events += worker.advance([])
    os._exit(0)


def resume(place: GroupPlace, spec: PackSpec, trials: Sequence[TrialConfig], folder: Path) -> None:
    worker = PackWorker(spec, place)
    worker.load()
    events: list[Any] = worker.advance([task(0, trials[0], folder, attempt=2)])
    assert [event.step for event in events if isinstance(event, TrialOpened)] == [4]
    while not (done := [event for event in events if isinstance(event, TrialDone)]):
        events += worker.advance([])
    if place.world_rank == 0:
        (folder / "digest").write_text(done[0].adapter_digest)

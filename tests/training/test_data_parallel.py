"""A pack that two workers train together is the pack that one trains."""

import multiprocessing
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.children import rank_environment
from orchestrator.config import TrialConfig
from orchestrator.records import Event, GroupPlace, PackSpec, TrialDone, TrialStopped
from orchestrator.training.engine import RowEngine
from orchestrator.training.pack import PackWorker
from orchestrator.training.replicas import Alone
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_pack import Adapter, assert_equal, train
from tests.training.test_replicas import free_address

Work = Callable[[GroupPlace, PackSpec, Sequence[TrialConfig], Path], None]

TIMEOUT_S = 400.0
TRIALS = [
    trial_config(batch_size=4, seed=1, adapter__rank=2, adapter__dropout=0.1),
    trial_config(batch_size=2, seed=2, optimizer__max_grad_norm=0.05, steps=8),
    trial_config(batch_size=8, seed=3, adapter__rank=8, steps=3),  # takes a slot that is left
]


def worker(place: GroupPlace, spec: PackSpec, trials: Sequence[TrialConfig], folder: Path) -> None:
    if spec.device == "cuda":
        os.environ |= rank_environment(place.world_rank, min(2, torch.cuda.device_count()))
    result = train(spec, trials, folder, place)
    (folder / f"result-{place.world_rank}").write_bytes(pickle.dumps(result))


def train_together(
    spec: PackSpec, trials: Sequence[TrialConfig], folder: Path
) -> list[tuple[dict[int, Adapter], list[Event]]]:
    """What each of two workers ends with."""
    run_together(worker, spec, trials, folder)
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(2)]


def run_together(work: Work, spec: PackSpec, trials: Sequence[TrialConfig], folder: Path) -> None:
    """The work of two workers of one pack, in processes of their own."""
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    address = free_address()
    workers = [
        context.Process(
            target=work,
            args=(GroupPlace(rank, 2, address), replace(spec, world_size=2), trials, folder),
            daemon=True,
        )
        for rank in range(2)
    ]
    for process in workers:
        process.start()
    for process in workers:
        process.join(TIMEOUT_S)
        assert process.exitcode == 0


def check_pair(alone_spec: PackSpec, pair_spec: PackSpec, folder: Path, tolerance: float) -> None:
    alone, alone_events = train(alone_spec, TRIALS, folder / "alone")
    (pair, events), (_, other_events) = train_together(pair_spec, TRIALS, folder / "pair")
    for number in range(len(TRIALS)):
        assert_equal(pair[number], alone[number], tolerance)
    assert outcomes(events) == pytest.approx(outcomes(alone_events), rel=1e-3)
    assert outcomes(other_events) == outcomes(events)


def outcomes(events: Sequence[Any]) -> dict[int, float]:
    return {event.trial: event.eval_loss for event in events if isinstance(event, TrialDone)}


def test_two_workers_train_a_pack_as_one_does(make_spec: MakeSpec, tmp_path: Path) -> None:
    """Each takes every second block; a third trial's steps take four passes of each."""
    spec = make_spec(micro_batch_size=1)
    check_pair(spec, spec, tmp_path, tolerance=2e-6)


@pytest.mark.slow
def test_a_trial_that_diverges_is_stopped_by_both_workers_alike(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    diverging = trial_config(steps=20, optimizer__learning_rate=1e38, optimizer__max_grad_norm=None)
    trials = [diverging, trial_config(seed=1)]
    spec = make_spec(micro_batch_size=1)
    both = train_together(spec, trials, tmp_path / "pair")
    alone, _ = train(spec, trials[1:], tmp_path / "alone")
    for _, events in both:
        assert [event.trial for event in events if isinstance(event, TrialStopped)] == [0]
    assert_equal(both[0][0][1], alone[0])


@pytest.mark.slow
def test_an_adapter_that_one_worker_cannot_save_holds_up_neither(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    as_it_began = trial_config(steps=2, optimizer__max_grad_norm=1e-46)
    trials = [as_it_began, trial_config(seed=1)]
    spec = make_spec(micro_batch_size=1)
    (adapters, events), _ = train_together(spec, trials, tmp_path / "pair")
    (stopped,) = [event for event in events if isinstance(event, TrialStopped)]
    assert (stopped.trial, stopped.reason) == (0, "not_trained")
    alone, _ = train(spec, trials[1:], tmp_path / "alone")
    assert_equal(adapters[1], alone[0])


class ByPlace(Alone):
    """As three workers or more add: in an order that goes by a value's place in what they sum."""

    def sum(self, tensor: Tensor) -> None:
        flat = tensor.view(-1)
        flat.mul_(torch.arange(1, len(flat) + 1))


def test_a_trials_sum_does_not_go_by_who_else_steps_with_it(make_spec: MakeSpec) -> None:
    loaded = PackWorker(make_spec(num_slots=2))
    loaded.load()
    engine = RowEngine(loaded.rows, loaded.engine.program, ByPlace())
    for slot in (0, 1):
        engine.stepper(slot, trial_config().optimizer)

    def norms(*slots: int) -> list[float]:
        loaded.rows.gradients.fill_(1.0)
        return engine.step(dict.fromkeys(slots, 0.0))

    assert norms(0, 1)[1] == norms(1)[0]

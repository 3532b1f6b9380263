"""What goes wrong with one member of a pack ends that one alone."""

import re
from pathlib import Path

import pytest

from orchestrator.data.manifest import load_manifest
from orchestrator.data.order import step_block_indices
from orchestrator.records import (
    GroupPlace,
    PackSpec,
    TrialStopped,
)
from orchestrator.sweep.executor import InProcessExecutor
from orchestrator.training.pack import PackWorker
from tests.sweeps import make_controller, make_store, sweep_config
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_pack import assert_equal, train


def test_a_member_that_diverges_harms_nobody(make_spec: MakeSpec, tmp_path: Path) -> None:
    good = trial_config(seed=1)
    bad = trial_config(
        seed=2, optimizer__learning_rate=1e38, optimizer__max_grad_norm=None, steps=20
    )
    together, events = train(make_spec(), [good, bad], tmp_path / "pack")
    stopped = [event for event in events if isinstance(event, TrialStopped)]
    assert [(event.trial, event.reason) for event in stopped] == [(1, "loss_not_finite")]
    assert "learning_rate" in stopped[0].message
    step, *blocks = numbers_before(": loss", stopped[0].message)
    num_blocks = load_manifest(make_spec().data_place, "train").totals.num_blocks
    assert blocks == step_block_indices(2, step - 1, bad.batch_size, num_blocks).tolist()
    alone, _ = train(make_spec(num_slots=1), [good], tmp_path / "alone")
    assert_equal(together[0], alone[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer__max_grad_norm": 1e-46},
        {"adapter__alpha": 1e-50},
        {"adapter__dropout": 0.9999999999},  # nothing of any input is kept
    ],
)
def test_a_member_whose_adapter_stays_as_it_began_fails_alone(
    make_spec: MakeSpec, tmp_path: Path, changes: dict[str, float]
) -> None:
    good = trial_config(seed=1, adapter__dropout=0.1)
    bad = trial_config(seed=2, **changes)
    together, events = train(make_spec(), [good, bad], tmp_path / "pack")
    (stopped,) = [event for event in events if isinstance(event, TrialStopped)]
    assert (stopped.trial, stopped.reason) == (1, "not_trained")
    assert "every lora_B is zero after 6 steps" in stopped.message
    assert "raise optimizer.learning_rate, optimizer.max_grad_norm or" in stopped.message
    assert not list((tmp_path / "pack" / "1").rglob("adapter*"))
    alone, _ = train(make_spec(num_slots=1), [good], tmp_path / "alone")
    assert_equal(together[0], alone[0])


def test_an_optimizer_that_cannot_be_built_fails_the_trial_that_wants_it_alone(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    good, bad = trial_config(seed=1), trial_config(optimizer__name="deepspeed_cpu_adam")
    together, events = train(make_spec(), [good, bad], tmp_path / "pack")
    (stopped,) = [event for event in events if isinstance(event, TrialStopped)]
    assert (stopped.trial, stopped.reason) == (1, "raised")
    assert stopped.message.startswith("StrategyError: DeepSpeed's cpu_adam must be compiled, but")
    alone, _ = train(make_spec(num_slots=1), [good], tmp_path / "alone")
    assert_equal(together[0], alone[0])


def test_an_error_in_one_members_step_fails_it_alone_in_a_sweep(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    """bitsandbytes takes its learning rate as fp32, and 1e308 is none."""
    space = {"optimizer.learning_rate": [1e-3, 1e308, 1e-2]}
    small = {"trial__batch_size": 2, "trial__optimizer__name": "paged_adamw_32bit"}
    config = sweep_config(search__space=space, trial__quant__bit_width=16, **small)
    store = make_store(tmp_path / "run", config)

    def worker(spec: PackSpec, place: GroupPlace) -> PackWorker:
        return PackWorker(make_spec(num_slots=spec.num_slots, max_rank=16), place)

    assert make_controller(store, InProcessExecutor(worker), num_workers=1).run()
    assert [result.reason for result in store.results] == ["", "raised", ""]
    assert "float without overflow" in store.results[1].message


def numbers_before(end: str, message: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", message.partition(end)[0])]


def test_an_evaluation_that_is_not_finite_stops_its_trial_alone(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    good = trial_config(seed=1)
    bad = trial_config(seed=2, optimizer__learning_rate=1e20)
    each_step = make_spec().evaluation.model_copy(update={"every_steps": 1})
    together, events = train(make_spec(evaluation=each_step), [good, bad], tmp_path / "pack")
    (stopped,) = [event for event in events if isinstance(event, TrialStopped)]
    assert (stopped.trial, stopped.reason) == (1, "loss_not_finite")
    assert "held-out loss" in stopped.message
    assert "learning_rate" in stopped.message
    assert not list((tmp_path / "pack" / "1").rglob("*.*"))
    alone, _ = train(make_spec(num_slots=1), [good], tmp_path / "alone")
    assert_equal(together[0], alone[0])

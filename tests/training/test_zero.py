"""A trial under DeepSpeed's ZeRO, on one CPU process, is the replicated one."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.config import EvaluationConfig
from orchestrator.records import (
    Checkpointed,
    Event,
    Leave,
    PackSpec,
    Progress,
    Prune,
    TrialDone,
    TrialStopped,
)
from orchestrator.training.pack import PackWorker
from orchestrator.training.zero import ZeroEngine
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_pack import Adapter, assert_equal, task, train

# DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.distributed")

STRATEGIES: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    "stage 1, optimizer on the CPU": {"stage": 1, "offload_optimizer": "cpu"},
    "stage 2, optimizer on the CPU": {"stage": 2, "offload_optimizer": "cpu"},
    "stage 3, optimizer on the CPU": {"stage": 3, "offload_optimizer": "cpu"},
    "stage 3, all on the CPU": {
        "stage": 3,
        "offload_optimizer": "cpu",
        "offload_params": "cpu",
    },
}
OFFLOADED = [name for name, fields in STRATEGIES.items() if "offload_optimizer" in fields]
OPTIMIZERS = ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]


def zero_strategy(name: str) -> dict[str, Any]:
    return {"kind": "zero", **STRATEGIES[name]}


@pytest.fixture
def zero_spec(make_spec: MakeSpec) -> MakeSpec:
    def make(name: str, **changes: Any) -> PackSpec:
        return make_spec(num_slots=1, strategy=zero_strategy(name), **changes)

    return make


def train_until(worker: PackWorker, kind: type[Event], first: list[Any]) -> list[Event]:
    events = worker.advance(first)
    while not any(isinstance(event, kind) for event in events):
        events += worker.advance([])
    return events


@pytest.mark.parametrize("name", ["stage 1", "stage 3"])
@pytest.mark.parametrize("max_norm", [None, 2.0])
def test_nobody_clips_a_gradient_but_its_trial(
    make_spec: MakeSpec, zero_spec: MakeSpec, tmp_path: Path, name: str, max_norm: float | None
) -> None:
    optimizer = {"max_grad_norm": max_norm, "learning_rate": 1e-5}
    trial = trial_config(adapter__alpha=800, optimizer=optimizer)
    every_step = EvaluationConfig(every_steps=1)  # is when norms are told
    _, events = train(make_spec(num_slots=1, evaluation=every_step), [trial], tmp_path / "one")
    _, zero = train(zero_spec(name, evaluation=every_step), [trial], tmp_path / "other")
    replicated = [event.grad_norm for event in events if isinstance(event, Progress)]
    assert max(replicated) > 2
    found = [event.grad_norm for event in zero if isinstance(event, Progress)]
    assert found == pytest.approx(replicated, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "bit_width"),
    [
        *((name, 4) for name in STRATEGIES),
        *((name, 16) for name in STRATEGIES if name not in OFFLOADED),
        *(pytest.param(name, 16, marks=pytest.mark.slow) for name in OFFLOADED),
    ],
)
def test_trials_one_after_another_under_zero_end_as_replicated_ones_do(
    make_spec: MakeSpec, zero_spec: MakeSpec, tmp_path: Path, name: str, bit_width: int
) -> None:
    trials = [
        trial_config(adapter__rank=3, optimizer__weight_decay=0.1, optimizer__max_grad_norm=0.05),
        trial_config(
            seed=2,
            batch_size=4,
            micro_batch_size=2,
            adapter__dropout=0.1,
            optimizer__max_grad_norm=None,
        ),
    ]
    replicated, events = train(
        make_spec(num_slots=1, bit_width=bit_width), trials, tmp_path / "one"
    )
    zero, zero_events = train(zero_spec(name, bit_width=bit_width), trials, tmp_path / "other")
    for number in range(len(trials)):
        assert_equal(zero[number], replicated[number])
    losses, zero_losses = (
        [
            (event.baseline_eval_loss, event.eval_loss)
            for event in some
            if isinstance(event, TrialDone)
        ]
        for some in (events, zero_events)
    )
    assert zero_losses == [pytest.approx(pair, rel=1e-5) for pair in losses]


@pytest.mark.slow
@pytest.mark.parametrize("bit_width", [4, 16])
@pytest.mark.parametrize("name", OFFLOADED)
def test_trials_that_deepspeed_steps_on_the_cpu_end_as_torch_steps_them(
    zero_spec: MakeSpec, tmp_path: Path, name: str, bit_width: int
) -> None:
    """Trials with other optimizers may come before and after."""
    fields = {"optimizer__weight_decay": 0.1, "optimizer__max_grad_norm": 0.05}
    names = ("deepspeed_cpu_adam", "adamw_8bit", "deepspeed_cpu_adam")
    trials = [
        trial_config(seed=seed, optimizer__name=optimizer, **fields)
        for seed, optimizer in enumerate(names)
    ]
    plain = [trial_config(seed=seed, optimizer__name="adamw", **fields) for seed in range(3)]
    spec = zero_spec(name, bit_width=bit_width)
    ours, _ = train(spec, trials, tmp_path / "one")
    torchs, _ = train(spec, plain, tmp_path / "other")
    for number in (0, 2):
        assert_equal(ours[number], torchs[number], tolerance=1e-5)


@pytest.mark.parametrize("name", ["stage 1", "stage 2", "stage 3"])
def test_an_8_bit_base_trains_under_zero_too(
    make_spec: MakeSpec, zero_spec: MakeSpec, tmp_path: Path, name: str
) -> None:
    replicated, _ = train(make_spec(num_slots=1, bit_width=8), [trial_config()], tmp_path / "one")
    zero, _ = train(zero_spec(name, bit_width=8), [trial_config()], tmp_path / "other")
    assert_equal(zero[0], replicated[0])


@pytest.mark.parametrize("name", ["stage 1", "stage 2, optimizer on the CPU", "stage 3"])
def test_micro_batches_under_zero_add_up_to_the_whole_batch(
    zero_spec: MakeSpec, tmp_path: Path, name: str
) -> None:
    whole, _ = train(zero_spec(name), [trial_config(batch_size=4)], tmp_path / "whole")
    config = trial_config(batch_size=4, micro_batch_size=1)
    parts, _ = train(zero_spec(name, micro_batch_size=1), [config], tmp_path / "parts")
    assert_equal(whole[0], parts[0])


@pytest.mark.parametrize("name", ["stage 1", "stage 2, optimizer on the CPU", "stage 3"])
def test_a_trial_that_is_pruned_within_a_step_leaves_no_gradient_to_the_next(
    zero_spec: MakeSpec, tmp_path: Path, name: str
) -> None:
    spec = zero_spec(name, micro_batch_size=1, checkpoint_every_steps=100)
    pruned, other = (trial_config(seed=seed, batch_size=4) for seed in (1, 2))
    alone, _ = train(spec, [other], tmp_path / "alone")
    worker = PackWorker(spec, report_every_s=0.0)
    worker.load()
    worker.advance([task(0, pruned, tmp_path / "after")])
    for _ in range(5):  # micro-batches: a step and a half
        worker.advance([])
    assert worker.slots[0].step == 1
    events = train_until(worker, TrialDone, [Prune(0), task(1, other, tmp_path / "after")])
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    assert_equal(load_file(Path(done.adapter_dir) / "adapter_model.safetensors"), alone[0])


@pytest.mark.parametrize("name", ["stage 2", "stage 3"])
def test_recomputation_under_zero_changes_nothing(
    zero_spec: MakeSpec, tmp_path: Path, name: str
) -> None:
    trials = [trial_config(adapter__dropout=0.2)]
    plain, _ = train(zero_spec(name), trials, tmp_path / "plain")
    spec = zero_spec(name, gradient_checkpointing=True)
    recomputed, _ = train(spec, trials, tmp_path / "recomputed")
    assert_equal(plain[0], recomputed[0])


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        *(("stage 2", optimizer) for optimizer in OPTIMIZERS),
        ("stage 1", "adamw"),
        ("stage 2, optimizer on the CPU", "adamw"),
        ("stage 3", "adamw"),
        ("stage 3", "paged_adamw_8bit"),
        ("stage 3, all on the CPU", "adamw"),
        *(pytest.param(name, "deepspeed_cpu_adam", marks=pytest.mark.slow) for name in OFFLOADED),
    ],
)
def test_a_trial_resumed_under_zero_ends_with_the_same_adapter_bytes(
    zero_spec: MakeSpec, tmp_path: Path, name: str, optimizer: str
) -> None:
    config = trial_config(optimizer__name=optimizer, adapter__dropout=0.1)
    spec = zero_spec(name, max_rank=4, bit_width=4, dropout=True)
    _, events = train(spec, [config], tmp_path / "whole")
    (undisturbed,) = [event for event in events if isinstance(event, TrialDone)]

    worker = PackWorker(spec)
    worker.load()
    events = train_until(worker, Checkpointed, [task(0, config, tmp_path / "cut")])
    del worker  # killed: what is on disk is all there is

    worker = PackWorker(spec)
    worker.load()
    events = train_until(worker, TrialDone, [task(0, config, tmp_path / "cut", attempt=2)])
    (resumed,) = [event for event in events if isinstance(event, TrialDone)]
    assert resumed.adapter_digest == undisturbed.adapter_digest
    assert resumed.tokens == undisturbed.tokens


@pytest.mark.parametrize("name", ["stage 2", "stage 3"])
def test_a_checkpoint_restored_under_zero_is_saved_again_unchanged(
    zero_spec: MakeSpec, tmp_path: Path, name: str
) -> None:
    config = trial_config(steps=100)
    saved = []
    for attempt in (1, 2):
        worker = PackWorker(zero_spec(name))
        worker.load()
        if attempt == 1:
            worker.advance([task(0, config, tmp_path)])
            events = worker.advance([Leave(save=True)])
        else:
            events = worker.advance([task(0, config, tmp_path, attempt), Leave(save=True)])
        (folder,) = [event.folder for event in events if isinstance(event, Checkpointed)]
        saved.append(load_file(Path(folder) / "state.safetensors"))
    assert saved[0].keys() == saved[1].keys() > {"row"}
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_a_trial_that_diverges_under_zero_leaves_the_next_one_unharmed(
    zero_spec: MakeSpec, tmp_path: Path
) -> None:
    good = trial_config(seed=1)
    bad = trial_config(
        seed=2, optimizer__learning_rate=1e38, optimizer__max_grad_norm=None, steps=20
    )
    for name in ("stage 2", "stage 3"):
        after, events = train(zero_spec(name), [bad, good], tmp_path / name / "after")
        (stopped,) = [event for event in events if isinstance(event, TrialStopped)]
        assert (stopped.trial, stopped.reason) == (0, "loss_not_finite")
        alone, _ = train(zero_spec(name), [good], tmp_path / name / "alone")
        assert_equal(after[1], alone[0])


def test_under_stage_3_parameters_are_empty_between_uses_and_saved_adapters_are_not(
    zero_spec: MakeSpec, tmp_path: Path
) -> None:
    worker = PackWorker(zero_spec("stage 3"))
    worker.load()
    assert isinstance(worker.engine, ZeroEngine)
    assert {parameter.numel() for parameter in worker.base.model.parameters()} == {0}
    events = train_until(worker, TrialDone, [task(0, trial_config(), tmp_path)])
    assert {parameter.numel() for parameter in worker.base.model.parameters()} == {0}
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    tensors = load_file(Path(done.adapter_dir) / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == done.num_adapter_params
    assert all(tensor.any() for tensor in tensors.values())


def test_an_adapter_trained_under_stage_3_loads_with_plain_peft(
    zero_spec: MakeSpec, tmp_path: Path, base_folder: Path
) -> None:
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    adapters, events = train(zero_spec("stage 3"), [trial_config()], tmp_path)
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    assert done.eval_loss < done.baseline_eval_loss
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    loaded: Adapter = get_peft_model_state_dict(PeftModel.from_pretrained(base, done.adapter_dir))
    assert_equal(loaded, adapters[0])


def test_a_pack_that_left_keeps_nothing_of_its_base_in_memory(
    zero_spec: MakeSpec, tmp_path: Path
) -> None:
    for name in ("stage 2", "stage 3, all on the CPU"):
        worker = PackWorker(zero_spec(name))
        worker.load()
        worker.advance([task(0, trial_config(steps=2), tmp_path / name)])
        kept = [
            weakref.ref(getattr(parameter, "ds_tensor", parameter))
            for parameter in worker.base.model.parameters()
            if not parameter.requires_grad
        ]
        worker.advance([Leave(save=False)])
        del worker
        gc.collect()
        assert [reference() for reference in kept if reference() is not None] == []

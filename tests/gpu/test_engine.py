"""The engine on a CUDA GPU: every bit-width, every optimizer, packs, resume."""

import os
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from orchestrator.config import EvaluationConfig, OptimizerConfig, QuantConfig, TaskConfig
from orchestrator.errors import TrialFailed
from orchestrator.records import BaseModel, TrialDone
from orchestrator.tracking.adapter_model import base_digest
from orchestrator.training.optimizers import OPTIMIZERS, RowOptimizers, restore_optimizer
from orchestrator.training.pack import PackWorker
from tests.tiny import make_base_model
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_pack import assert_equal, killed_and_resumed, train


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bit_width", [4, 8, 16])
def test_training_lowers_the_held_out_loss(
    make_spec: MakeSpec, tmp_path: Path, bit_width: int, dtype: str
) -> None:
    if bit_width == 8 and dtype == "float32":
        pytest.skip("LLM.int8 computes in 16 bits on GPUs")
    quant = QuantConfig.model_validate({"bit_width": bit_width, "compute_dtype": dtype})
    spec = make_spec(device="cuda", quant=quant.model_dump(), num_slots=1)
    _, events = train(spec, [trial_config(steps=20)], tmp_path)
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    assert done.eval_loss < done.baseline_eval_loss - 0.2
    assert done.peak_memory_bytes > 0


def test_trials_in_a_pack_train_as_alone(make_spec: MakeSpec, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    trials = [
        trial_config(adapter__rank=2, seed=1, adapter__dropout=0.2),
        trial_config(adapter__rank=8, seed=2, optimizer__learning_rate=3e-3, steps=4),
        trial_config(adapter__rank=4, seed=3),
    ]
    together, _ = train(make_spec(device="cuda"), trials, tmp_path / "pack")
    for number, trial in enumerate(trials):
        folder = tmp_path / f"alone{number}"
        alone, _ = train(make_spec(device="cuda", num_slots=1), [trial], folder)
        assert_equal(together[number], alone[0], tolerance=1e-4)


def test_refilled_slots_take_no_more_paged_memory(make_spec: MakeSpec, tmp_path: Path) -> None:
    from bitsandbytes.functional import GlobalPageManager

    paged = GlobalPageManager.get_instance().paged_tensors
    before = len(paged)
    optimizer = "paged_adamw_8bit"
    spec = make_spec(device="cuda", max_rank=64)
    trials = [trial_config(adapter__rank=64, optimizer__name=optimizer, seed=n) for n in range(6)]
    train(spec, trials, tmp_path)
    assert len(paged) - before == 2 * spec.num_slots  # two states each
    assert all(tensor.is_paged for tensor in paged[before:])


@pytest.mark.parametrize("saved", [False, True])
def test_paged_states_that_the_gpu_has_no_room_for_are_not_made(saved: bool) -> None:
    from bitsandbytes.functional import GlobalPageManager

    made = len(GlobalPageManager.get_instance().paged_tensors)
    config = OptimizerConfig(name="paged_adamw_32bit")
    row = torch.nn.Parameter(torch.ones(2**26, device="cuda"))
    row.grad = torch.ones_like(row)
    optimizer = RowOptimizers(row).begin(config)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(free - 2**28, dtype=torch.uint8, device="cuda")  # 512 MiB are wanted
    states = {"state1": row.detach(), "state2": row.detach()}
    make = partial(restore_optimizer, optimizer, (states, {})) if saved else optimizer.step
    with pytest.raises(TrialFailed, match="out_of_memory: paged optimizer states take 0.50 GiB"):
        make()
    assert len(GlobalPageManager.get_instance().paged_tensors) == made
    del held
    torch.cuda.empty_cache()


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS.keys() - {"deepspeed_cpu_adam"}))
def test_a_trial_killed_and_resumed_ends_with_the_same_adapter_bytes(
    make_spec: MakeSpec, tmp_path: Path, optimizer: str
) -> None:
    config = trial_config(optimizer__name=optimizer, adapter__rank=64)
    spec = make_spec(device="cuda", num_slots=1, max_rank=64, bit_width=4)
    _, events = train(spec, [config], tmp_path / "whole")
    (undisturbed,) = [event for event in events if isinstance(event, TrialDone)]
    resumed = killed_and_resumed(spec, config, tmp_path / "cut")
    assert resumed.adapter_digest == undisturbed.adapter_digest


def test_paged_states_that_leave_the_gpu_between_steps_change_no_bit(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    trials = [trial_config(optimizer__name="paged_adamw_8bit", adapter__rank=64, steps=6)]
    quant = QuantConfig(bit_width=4, compute_dtype="bfloat16").model_dump()
    spec = make_spec(device="cuda", num_slots=1, max_rank=64, quant=quant)
    eager, _ = train(spec, trials, tmp_path / "eager")
    in_place, _ = train(replace(spec, step_program="in_place"), trials, tmp_path / "in_place")
    assert_equal(in_place[0], eager[0])


def test_in_place_words_are_looked_up_on_the_host(make_spec: MakeSpec, tmp_path: Path) -> None:
    folder = make_base_model(tmp_path / "untied", tied=False)
    base = BaseModel("tiny", None, str(folder), base_digest(folder))
    spec = make_spec(device="cuda", num_slots=1, bit_width=4, base_model=base)
    trials = [trial_config(adapter__dropout=0.1)]
    eager, _ = train(spec, trials, tmp_path / "eager")
    spec = replace(spec, step_program="in_place")
    in_place, _ = train(spec, trials, tmp_path / "in_place")
    assert_equal(in_place[0], eager[0])
    task = TaskConfig(max_examples=2, max_new_tokens=2)
    _, events = train(replace(spec, evaluation=EvaluationConfig(task=task)), trials, tmp_path)
    assert any(isinstance(event, TrialDone) and event.task_score is not None for event in events)
    worker = PackWorker(spec)
    worker.load()
    embedding = worker.base.model.get_input_embeddings().weight  # type: ignore[operator]
    assert embedding.device.type == "cpu"


@pytest.mark.parametrize("recomputation", [False, True])
def test_llm_int8_keeps_no_input_of_frozen_weights(
    make_spec: MakeSpec, recomputation: bool
) -> None:
    quant = QuantConfig(bit_width=8, compute_dtype="bfloat16").model_dump()
    worker = PackWorker(make_spec(device="cuda", num_slots=1, quant=quant))
    worker.load()
    layer = worker.base.model.get_submodule("model.layers.0.mlp.up_proj.base")
    x = torch.randn(3, layer.in_features, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def output_of(x: torch.Tensor) -> tuple[torch.Tensor, "weakref.ref[torch.Tensor]"]:
        hidden = 20 * x  # with outliers
        return layer(hidden), weakref.ref(hidden)

    if recomputation:
        output, there = checkpoint(output_of, x, use_reentrant=False)
    else:
        output, there = output_of(x)
    assert there() is None
    output.sum().backward()
    assert x.grad is not None


def test_a_workers_memory_is_in_segments_that_grow() -> None:
    """In a process of its own: the allocator's settings are those of its first allocation."""
    code = """
import torch
from orchestrator.training.memory import cap_memory
cap_memory(0.5)
kept = torch.empty(1 << 25, device="cuda")
assert all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())
"""
    clean = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    ended = subprocess.run([sys.executable, "-c", code], env=clean, timeout=120, check=False)
    assert ended.returncode == 0

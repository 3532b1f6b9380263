"""ZeRO on CUDA GPUs: the same adapters as without it, and parameters that are really away."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.children import rank_environment
from orchestrator.config import QuantConfig, StrategyConfig, TrialConfig
from orchestrator.records import BaseModel, GroupPlace, PackSpec, TrialDone
from orchestrator.tracking.adapter_model import base_digest
from orchestrator.training.base_model import load_base_model
from orchestrator.training.optimizers import OPTIMIZERS
from orchestrator.training.pack import PackWorker
from orchestrator.training.replicas import join
from tests.tiny import make_base_model
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_data_parallel import outcomes, run_together, train_together
from tests.training.test_nvme import NVME_STRATEGIES, swapped, wide_spec, wide_trial
from tests.training.test_pack import assert_equal, killed_and_resumed, train
from tests.training.test_zero import STRATEGIES

IN_PARTS = ["stage 3", "stage 3, all on the CPU"]


@pytest.mark.parametrize("bit_width", [4, 16])
@pytest.mark.parametrize("name", STRATEGIES)
def test_trials_under_zero_end_as_replicated_ones_do(
    make_spec: MakeSpec, tmp_path: Path, name: str, bit_width: int
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    trials = [trial_config(), trial_config(seed=2, batch_size=4, micro_batch_size=2)]
    spec = make_spec(device="cuda", num_slots=1, bit_width=bit_width)
    replicated, _ = train(spec, trials, tmp_path / "one")
    strategy = {"kind": "zero", **STRATEGIES[name]}
    spec = make_spec(device="cuda", num_slots=1, bit_width=bit_width, strategy=strategy)
    zero, _ = train(spec, trials, tmp_path / "other")
    for number in range(len(trials)):
        assert_equal(zero[number], replicated[number], tolerance=1e-4)


@pytest.mark.parametrize("bit_width", [4, 8, 16])
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        *(("stage 2, optimizer on the CPU", optimizer) for optimizer in OPTIMIZERS),
        *(("stage 3", optimizer) for optimizer in OPTIMIZERS if optimizer != "deepspeed_cpu_adam"),
        ("stage 3, all on the CPU", "deepspeed_cpu_adam"),
    ],
)
def test_a_bfloat16_base_under_zero_learns_with_every_optimizer(
    make_spec: MakeSpec, tmp_path: Path, name: str, bit_width: int, optimizer: str
) -> None:
    quant = QuantConfig.model_validate({"bit_width": bit_width, "compute_dtype": "bfloat16"})
    spec = make_spec(
        device="cuda",
        num_slots=1,
        max_rank=64,
        quant=quant.model_dump(),
        strategy={"kind": "zero", **STRATEGIES[name]},
    )
    trial = trial_config(steps=20, adapter__rank=64, optimizer__name=optimizer)
    _, events = train(spec, [trial], tmp_path)
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    assert done.eval_loss < done.baseline_eval_loss - 0.2


@pytest.mark.parametrize("bit_width", [4, 16])
def test_offloaded_parameters_lie_on_the_host(make_spec: MakeSpec, bit_width: int) -> None:
    strategy = {"kind": "zero", **STRATEGIES["stage 3, all on the CPU"]}
    worker = PackWorker(
        make_spec(device="cuda", num_slots=1, bit_width=bit_width, strategy=strategy)
    )
    worker.load()
    for parameter in worker.base.model.parameters():
        assert parameter.numel() == 0
        assert parameter.ds_tensor.device.type == "cpu"  # type: ignore[attr-defined]


@pytest.mark.usefixtures("async_io")
@pytest.mark.parametrize("bit_width", [4, 16])
@pytest.mark.parametrize("name", NVME_STRATEGIES)
def test_trials_on_nvme_end_as_replicated_ones_do(
    make_spec: MakeSpec, tmp_path: Path, name: str, bit_width: int
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    base = make_base_model(tmp_path / "base", hidden_size=1024)
    trials = [wide_trial(), wide_trial(seed=2, batch_size=4, micro_batch_size=2)]
    spec = wide_spec(make_spec, base, device="cuda", bit_width=bit_width)
    replicated, _ = train(spec, trials, tmp_path / "one")
    zero, _ = train(swapped(spec, name, tmp_path / "nvme"), trials, tmp_path / "other")
    for number in range(len(trials)):
        assert_equal(zero[number], replicated[number], tolerance=1e-4)


@pytest.mark.usefixtures("async_io")
@pytest.mark.parametrize("bit_width", [4, 16])
def test_a_bfloat16_trial_on_nvme_killed_and_resumed_ends_with_the_same_adapter_bytes(
    make_spec: MakeSpec, tmp_path: Path, bit_width: int
) -> None:
    base = make_base_model(tmp_path / "base", hidden_size=1024)
    quant = QuantConfig.model_validate({"bit_width": bit_width, "compute_dtype": "bfloat16"})
    spec = wide_spec(make_spec, base, device="cuda", quant=quant.model_dump())
    spec = swapped(spec, "all on NVMe", tmp_path / "nvme")
    config = wide_trial(optimizer__name="deepspeed_cpu_adam")
    _, events = train(spec, [config], tmp_path / "whole")
    (undisturbed,) = [event for event in events if isinstance(event, TrialDone)]
    resumed = killed_and_resumed(spec, config, tmp_path / "cut")
    assert resumed.adapter_digest == undisturbed.adapter_digest


@pytest.mark.parametrize("bit_width", [4, 16])
def test_a_trial_that_deepspeed_steps_on_the_cpu_is_resumed_to_the_same_adapter_bytes(
    make_spec: MakeSpec, tmp_path: Path, bit_width: int
) -> None:
    strategy = {"kind": "zero", **STRATEGIES["stage 2, optimizer on the CPU"]}
    config = trial_config(optimizer__name="deepspeed_cpu_adam")
    spec = make_spec(device="cuda", num_slots=1, bit_width=bit_width, strategy=strategy)
    _, events = train(spec, [config], tmp_path / "whole")
    (undisturbed,) = [event for event in events if isinstance(event, TrialDone)]
    resumed = killed_and_resumed(spec, config, tmp_path / "cut")
    assert resumed.adapter_digest == undisturbed.adapter_digest


def test_a_base_that_does_not_stay_on_the_gpu_is_gathered_after_an_evaluation(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    """1.2e9 values are more than DeepSpeed keeps between uses, so it fetches ahead."""
    folder = tmp_path / "base"
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            make_base_model(folder, hidden_size=4096, num_layers=8)
        finally:
            torch.set_default_dtype(torch.float32)
    base = BaseModel("wide", None, str(folder), base_digest(folder))
    strategy = {"kind": "zero", **STRATEGIES["stage 3, all on the CPU"]}
    quant = QuantConfig(bit_width=16, compute_dtype="bfloat16").model_dump()
    spec = make_spec(device="cuda", num_slots=1, quant=quant, base_model=base, strategy=strategy)
    _, events = train(spec, [trial_config()], tmp_path / "trials")
    assert any(isinstance(event, TrialDone) for event in events)


@pytest.mark.parametrize("bit_width", [4, 16])
@pytest.mark.parametrize("name", IN_PARTS)
def test_two_ranks_train_a_trial_on_a_base_loaded_in_parts_as_one_does_on_a_whole_one(
    make_spec: MakeSpec, tmp_path: Path, name: str, bit_width: int
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    trials = [trial_config(batch_size=4, adapter__rank=3, optimizer__max_grad_norm=0.05)]
    spec = make_spec(device="cuda", num_slots=1, bit_width=bit_width, micro_batch_size=1)
    whole, whole_events = train(spec, trials, tmp_path / "alone")
    spec = replace(spec, strategy={"kind": "zero", **STRATEGIES[name]})
    (pair, events), (_, other_events) = train_together(spec, trials, tmp_path / "pair")
    assert_equal(pair[0], whole[0], tolerance=1e-4)
    assert outcomes(events) == pytest.approx(outcomes(whole_events), rel=1e-4)
    assert outcomes(other_events) == outcomes(events)


@pytest.mark.parametrize("bit_width", [4, 16])
@pytest.mark.parametrize("name", IN_PARTS)
def test_two_ranks_hold_a_part_of_a_base_each_while_they_load_it(
    make_spec: MakeSpec, tmp_path: Path, name: str, bit_width: int
) -> None:
    """The allocator's peak. Of 16 bits the base is 0.8 GB, its largest linear layer 34 MB, its
    embedding 131 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
    )
    with torch.device("cuda"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    torch.cuda.empty_cache()
    quant = QuantConfig.model_validate({"bit_width": bit_width, "compute_dtype": "bfloat16"})
    spec = make_spec(
        device="cuda",
        num_slots=1,
        base_model=BaseModel("wide", None, str(tmp_path / "base"), base_digest(tmp_path / "base")),
        quant=quant.model_dump(),
        strategy={"kind": "zero", **STRATEGIES[name]},
    )
    run_together(load_and_measure, spec, [], tmp_path / "pair")
    for rank in range(2):
        found = json.loads((tmp_path / "pair" / str(rank)).read_text())
        part = 0.0 if "CPU" in name else found["partitioned"] / 2
        largest = 2 * config.hidden_size * config.intermediate_size
        assert found["peak"] < part + found["constants"] + 2 * largest, found
        assert found["on_gpu"] == pytest.approx(part, rel=0.01)


def load_and_measure(
    place: GroupPlace, spec: PackSpec, trials: Sequence[TrialConfig], folder: Path
) -> None:
    os.environ |= rank_environment(place.world_rank, min(2, torch.cuda.device_count()))
    replicas = join(place, "cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    base = load_base_model(
        spec.base_model,
        QuantConfig.model_validate(spec.quant),
        "cuda",
        StrategyConfig.model_validate(spec.strategy),
    )
    peak = torch.cuda.max_memory_allocated() - before
    parameters: list[Any] = list(base.model.parameters())
    partitioned = sum(p.ds_numel * p.element_size() for p in parameters)
    parts = [p.ds_tensor for p in parameters]
    found = {
        "peak": peak,
        "partitioned": partitioned,
        "constants": base.num_bytes - partitioned,
        "on_gpu": sum(part.numel() * part.element_size() for part in parts if part.is_cuda),
    }
    (folder / str(place.world_rank)).write_text(json.dumps(found))
    replicas.loaded()
    replicas.close()

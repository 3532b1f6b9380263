"""Ranks and alphas of single layers, and first values from the quantisation's error."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.config import AdapterConfig, QuantConfig, StrategyConfig, TrialConfig
from orchestrator.planning.ranks import largest_rank, rank_of, scaling_of
from orchestrator.records import Evaluated, PackSpec, TrialDone, TrialStopped
from orchestrator.training.adapter import saved_config
from orchestrator.training.adapter_evaluation import evaluate_adapter
from orchestrator.training.base_model import load_base_model
from orchestrator.training.frozen import PackedLinear
from orchestrator.training.loftq import Corrections, correction
from orchestrator.training.merge import Updates
from orchestrator.training.slots import Slots
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_pack import assert_equal, reference_adapter, train

PATTERNS = {
    "adapter__rank": 4,
    "adapter__alpha": 8,
    "adapter__rank_pattern": {"q_proj": 8, r"layers\.0\.mlp\..*": 2},
    "adapter__alpha_pattern": {"down_proj": 32},
}


def test_the_longest_key_that_matches_a_layer_counts() -> None:
    adapter = AdapterConfig(rank=4, alpha=8, rank_pattern={"q_proj": 2, r"layers\.3\.q_proj": 6})
    assert [rank_of(adapter, f"layers.{n}.q_proj") for n in (2, 3)] == [2, 6]
    assert rank_of(adapter, "layers.3.k_proj") == 4
    assert scaling_of(adapter, "layers.3.q_proj") == 8 / 6
    assert largest_rank(adapter) == 6
    assert largest_rank(AdapterConfig(rank=4)) == 4


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_of_single_layers_train_as_plain_peft_does(
    make_spec: MakeSpec, tmp_path: Path, rslora: bool
) -> None:
    trial = trial_config(**PATTERNS, adapter__rslora=rslora)
    spec = make_spec(quant={**make_spec().quant, "compute_dtype": "float64"}, num_slots=1)
    adapters, events = train(spec, [trial], tmp_path)
    assert_equal(adapters[0], reference_adapter(spec, trial), tolerance=1e-9)
    q_proj = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert adapters[0][q_proj].shape[0] == 8
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    assert done.num_adapter_params == sum(tensor.numel() for tensor in adapters[0].values())


def test_neighbours_with_other_patterns_change_nothing(make_spec: MakeSpec, tmp_path: Path) -> None:
    trials = [trial_config(**PATTERNS, seed=1), trial_config(seed=2), trial_config(**PATTERNS)]
    together, _ = train(make_spec(), trials, tmp_path / "pack")
    for number, trial in enumerate(trials):
        alone, _ = train(make_spec(num_slots=1), [trial], tmp_path / f"alone{number}")
        assert_equal(together[number], alone[0])


def test_a_saved_pattern_is_merged_evaluated_and_loaded_by_peft_as_it_was_trained(
    make_spec: MakeSpec, tmp_path: Path, base_folder: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from orchestrator.data.manifest import load_manifest

    spec = make_spec(num_slots=1)
    trial = trial_config(**PATTERNS, quant={"bit_width": 16, "compute_dtype": "float32"})
    _, events = train(spec, [trial], tmp_path)
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    folder = Path(done.adapter_dir)
    found, _ = evaluate_adapter(folder, load_manifest(spec.data_place, "held_out"))
    assert found["eval_loss"] == pytest.approx(done.eval_loss, rel=1e-5)

    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    updates = Updates(folder)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        found = updates.merged(name, plain.get_submodule(name).weight.data)
        expected = merged.get_submodule(name).weight.data
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert saved_config(folder).rank == 4


def test_a_pattern_for_no_layer_stops_its_trial_alone(make_spec: MakeSpec, tmp_path: Path) -> None:
    misspelt = trial_config(adapter__rank_pattern={"w_proj": 8})
    not_targeted = trial_config(
        adapter__target_modules=("q_proj",), adapter__alpha_pattern={"up_proj": 8}
    )
    adapters, events = train(make_spec(), [misspelt, trial_config(), not_targeted], tmp_path)
    stopped = [event for event in events if isinstance(event, TrialStopped)]
    assert [(event.trial, event.reason) for event in stopped] == [
        (0, "not_valid"),
        (2, "not_valid"),
    ]
    assert "adapter.rank_pattern: 'w_proj' matches no layer" in stopped[0].message
    assert "adapter.alpha_pattern: 'up_proj' matches no layer" in stopped[1].message
    assert set(adapters) == {1}


@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
def test_a_correction_is_the_best_that_its_rank_can_hold(shape: tuple[int, int]) -> None:
    error = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = correction(error, max_rank=8)
    left, sizes, right = torch.linalg.svd(error)
    for rank in (1, 4, 8):
        A, B = found.parts(rank, scaling=2.0)
        best = (left[:, :rank] * sizes[:rank]) @ right[:rank]
        torch.testing.assert_close(2.0 * (B @ A).double(), best, rtol=1e-4, atol=1e-5)


def loftq(**changes: object) -> TrialConfig:
    return trial_config(adapter__init="loftq", **changes)


def test_loftq_begins_nearer_to_the_base_in_16_bits(make_spec: MakeSpec, tmp_path: Path) -> None:
    """And shares its pack with a trial that does not begin so."""
    spec = replace(make_spec(bit_width=4), loftq=True)
    each = spec.evaluation.model_copy(update={"every_steps": 100})
    trials = [loftq(adapter__rank=8, seed=1), trial_config(seed=2)]
    _, events = train(replace(spec, evaluation=each), trials, tmp_path / "four")
    first = {e.trial: e.eval_loss for e in events if isinstance(e, Evaluated) and e.step == 0}
    _, exact = train(make_spec(num_slots=1), [trial_config(steps=1)], tmp_path / "sixteen")
    (target,) = [e.eval_loss for e in exact if isinstance(e, Evaluated) and e.step == 0]
    assert abs(first[0] - target) < abs(first[1] - target)
    alone, _ = train(replace(spec, num_slots=1), trials[1:], tmp_path / "alone")
    together, _ = train(spec, trials, tmp_path / "again")
    assert_equal(together[1], alone[0])
    assert all(tensor.any() for tensor in together[0].values())


def test_loftq_leaves_the_base_as_it_is_and_its_first_values_fill_the_error(
    make_spec: MakeSpec, base_folder: Path
) -> None:
    weights = load_file(base_folder / "model.safetensors")
    adapter = AdapterConfig(rank=8, alpha=4, init="loftq")
    rows, base = opened(make_spec(), adapter)
    tensors = rows.adapter_tensors(0, adapter)
    for layer in rows.layers:
        packed = base.get_submodule(layer.name)
        assert isinstance(packed, PackedLinear)
        prefix = f"base_model.model.{layer.name}"
        A, B = (tensors[f"{prefix}.lora_{part}.weight"] for part in "AB")
        error = weights[f"{layer.name}.weight"] - packed.values()
        left = error - scaling_of(adapter, layer.name) * B @ A
        sizes = torch.linalg.svdvals(error)
        assert float(left.norm()) == pytest.approx(float(sizes[8:].norm()), rel=1e-4)


@pytest.mark.parametrize("pattern", [{}, {"v_proj": 40, "down_proj": 80, "up_proj": 4}])
def test_loftq_fills_the_error_wholly_where_a_layer_has_fewer_rows_than_the_rank(
    make_spec: MakeSpec, base_folder: Path, tmp_path: Path, pattern: dict[str, int]
) -> None:
    """k_proj and v_proj have 32 rows. Beyond them A is drawn as ever and B is zero, so that the
    rest can be trained."""
    adapter = AdapterConfig(rank=48, alpha=24, init="loftq", rank_pattern=pattern)
    rows, base = opened(make_spec(), adapter)
    plain = rows.adapter_tensors(0, adapter)
    rows.open(0, adapter.model_copy(update={"init": "default"}), seed=0)
    drawn = rows.adapter_tensors(0, adapter)
    weights = load_file(base_folder / "model.safetensors")
    for layer in rows.layers:
        rank = rank_of(adapter, layer.name)
        found = min(rank, layer.in_features, layer.out_features)
        prefix = f"base_model.model.{layer.name}"
        A, B = (plain[f"{prefix}.lora_{part}.weight"] for part in "AB")
        packed = base.get_submodule(layer.name)
        assert isinstance(packed, PackedLinear)
        error = weights[f"{layer.name}.weight"] - packed.values()
        left = error - scaling_of(adapter, layer.name) * B @ A
        sizes = torch.linalg.svdvals(error)
        assert float(left.norm()) == pytest.approx(float(sizes[found:].norm()), rel=1e-4, abs=1e-5)
        assert not B[:, found:].any()
        assert torch.equal(A[found:], drawn[f"{prefix}.lora_A.weight"][found:])
    trial = loftq(adapter__rank=48, adapter__rank_pattern=pattern, steps=2)
    spec = replace(make_spec(4, num_slots=1), loftq=True, max_rank=largest_rank(adapter))
    adapters, _ = train(spec, [trial], tmp_path)
    trained = adapters[0]["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"]
    assert trained[:, 32:].any()


def opened(spec: PackSpec, adapter: AdapterConfig) -> tuple[Slots, torch.nn.Module]:
    """Rows whose first slot has this adapter's first values, on the spec's base in 4 bits."""
    quant, corrections = QuantConfig(compute_dtype="float32"), Corrections(largest_rank(adapter))
    base = load_base_model(
        spec.base_model, quant, "cpu", StrategyConfig(), on_layer=corrections.add
    )
    rows = Slots(base.model, "all-linear", 1, largest_rank(adapter), "cpu")
    rows.corrections = corrections.by_layer
    rows.open(0, adapter, seed=0)
    return rows, base.model

"""DoRA in packs: PEFT's is the reference, for values, gradients, training and what is saved."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from orchestrator.config import AdapterConfig, QuantConfig, StrategyConfig, TrialConfig
from orchestrator.data.manifest import load_manifest
from orchestrator.data.reader import BlockReader
from orchestrator.planning.activations import pass_memory
from orchestrator.planning.load import PackLoad
from orchestrator.planning.options import DTYPE_BYTES
from orchestrator.planning.shape import BaseShape, read_shape
from orchestrator.records import BaseModel, Evaluated, TrialDone
from orchestrator.tracking.adapter_model import load
from orchestrator.training.adapter import saved_config
from orchestrator.training.adapter_evaluation import evaluate_adapter
from orchestrator.training.base_model import load_base_model
from orchestrator.training.dropout import Drops
from orchestrator.training.export import Bounds, export_adapter
from orchestrator.training.lanes import BASE_ALONE, DoraLinear, Lanes, Served
from orchestrator.training.merge import Updates
from orchestrator.training.parity import measure
from orchestrator.training.program import EagerProgram
from orchestrator.training.slots import Slots
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_equality import largest_difference
from tests.training.test_pack import assert_equal, killed_and_resumed, reference_adapter, train

PATTERNS = {"adapter__rank_pattern": {"q_proj": 8}, "adapter__alpha_pattern": {"down_proj": 32}}
QUANTS: dict[str, dict[str, Any]] = {
    "16 bits": {"bit_width": 16, "compute_dtype": "float64"},
    "NF4": {"bit_width": 4},
    "NF4, single": {"bit_width": 4, "double_quant": False},
    "FP4": {"bit_width": 4, "quant_type": "fp4"},
    "NF4, blocks of 128": {"bit_width": 4, "block_size": 128},
    "blockwise int8": {"bit_width": 8, "int8_type": "blockwise"},
    "2 bits": {"bit_width": 2},
    "3 bits": {"bit_width": 3},
    "a map": {"bit_width": 4, "bit_width_pattern": {"down_proj": 8, "q_proj": 16}},
}


def dora(**changes: object) -> TrialConfig:
    return trial_config(adapter__use_dora=True, **changes)


@pytest.mark.parametrize("quant", QUANTS)
def test_it_trains_as_plain_peft_does(make_spec: MakeSpec, tmp_path: Path, quant: str) -> None:
    """Weight decay pulls on magnitudes too, as it does there."""
    if quant in ("2 bits", "3 bits"):
        pytest.importorskip("hqq.core.quantize", reason="the extra hqq is not installed")
    # With a smaller one AdamW's first steps make a step's length of a gradient's rounding.
    large = {"optimizer__eps": 1e-3}
    trial = dora(optimizer__weight_decay=0.1, adapter__rslora=True, **PATTERNS, **large)
    spec = make_spec(quant={**make_spec().quant, **QUANTS[quant]}, num_slots=1)
    adapters, events = train(spec, [trial], tmp_path)
    tolerance = 1e-9 if quant == "16 bits" else 2e-6
    assert_equal(adapters[0], reference_adapter(spec, trial), tolerance)
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    assert done.num_adapter_params == sum(tensor.numel() for tensor in adapters[0].values())
    assert done.eval_loss < done.baseline_eval_loss


class Masked(nn.Module):
    """Drops in PEFT what our hash drops."""

    def __init__(self, lanes: Lanes, number: Tensor) -> None:
        super().__init__()
        self._lanes, self._number = lanes, number

    def forward(self, x: Tensor) -> Tensor:
        return self._lanes.dropout(x, self._number)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_layers_values_and_gradients_are_pefts(dropout: float) -> None:
    """Each row has changed its length and its direction by then."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    plain = nn.ModuleDict({"linear": nn.Linear(12, 7)}).double()
    adapter = AdapterConfig(rank=3, alpha=6, dropout=dropout, use_dora=True)
    config = LoraConfig(
        r=3, lora_alpha=6, lora_dropout=dropout, use_dora=True, target_modules=["linear"]
    )
    own = nn.ModuleDict({"linear": nn.Linear(12, 7)}).double()
    own.load_state_dict(plain.state_dict())
    slots = Slots(own, "all-linear", 1, 5, "cpu", torch.float64, dora=True)
    slots.open(0, adapter, seed=1)
    tensors = slots.adapter_tensors(0, adapter)
    tensors = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    slots.load(0, tensors, adapter)
    lanes = Lanes(slots, 1, torch.float64)
    lanes.attach(own)
    lanes.serve([Served(0, slots.scalings(adapter), Drops(dropout, (17, 18)))])

    theirs = inject_adapter_in_model(config, plain).linear
    prefix = "base_model.model.linear"
    A, B = theirs.lora_A["default"], theirs.lora_B["default"]
    magnitude = theirs.lora_magnitude_vector["default"]
    A.weight.data = tensors[f"{prefix}.lora_A.weight"].clone()
    B.weight.data = tensors[f"{prefix}.lora_B.weight"].clone()
    magnitude.weight.data = tensors[f"{prefix}.lora_magnitude_vector"].clone()
    ours = own["linear"]
    assert isinstance(ours, DoraLinear)
    if dropout:
        theirs.lora_dropout["default"] = Masked(lanes, ours.key)  # type: ignore[arg-type]

    x = torch.randn(2, 4, 12, dtype=torch.float64)
    into, into_theirs = (x.clone().requires_grad_() for _ in range(2))
    output, expected = ours(into), theirs(into_theirs)
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(output)
    by_x, by_A, by_B, by_magnitudes = torch.autograd.grad(
        (output * weights).sum(), [into, *lanes.parameters]
    )
    found = [by_x, by_A[0, :, :3].T, by_B[0, :3].T, by_magnitudes[0, 0]]
    wanted = [into_theirs, A.weight, B.weight, magnitude.weight]
    expected = torch.autograd.grad((expected * weights).sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not by_A[0, :, 3:].any()


def test_a_lane_without_an_adapter_is_the_base_alone() -> None:
    """Also where the trial has adapters, but not on this layer, and for a row of zeros."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(6, 5), "second": nn.Linear(6, 5)})
    model["first"].weight.data[2] = 0.0
    base = {name: layer for name, layer in model.items()}
    slots = Slots(model, "all-linear", 2, 4, "cpu", dora=True)
    adapter = AdapterConfig(rank=2, alpha=8, target_modules=("second",), use_dora=True)
    slots.open(1, adapter, seed=0)
    slots.rows[1, slots.layers[1].middle : slots.layers[1].magnitudes] = 0.3
    lanes = Lanes(slots, 3, torch.float32)
    lanes.attach(model)
    lanes.serve([BASE_ALONE, Served(1, slots.scalings(adapter))])
    x = torch.randn(3, 4, 6)
    for name, changed in (("first", [False] * 3), ("second", [False, True, False])):
        output, expected = model[name](x), base[name](x)
        equal = [torch.allclose(output[lane], expected[lane]) for lane in range(3)]
        assert equal == [not flag for flag in changed]
    gradients = torch.autograd.grad(model["first"](x).square().sum(), lanes.parameters[:3])
    assert all(bool(part.isfinite().all()) and not part[1].any() for part in gradients)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_it_begins_as_the_base_and_in_a_pack_it_is_the_trial_alone(
    make_spec: MakeSpec, tmp_path: Path, dtype: str
) -> None:
    """Members differ in everything that a row's layout and a lane's numbers could depend on."""
    trials = [
        dora(seed=1, adapter__dropout=0.2),
        dora(seed=2, adapter__rank=8, adapter__target_modules=("q_proj", "down_proj"), steps=4),
        dora(seed=3, **PATTERNS, optimizer__name="adamw_8bit"),
    ]
    quant = {**make_spec().quant, "compute_dtype": dtype}
    spec = make_spec(quant=quant, micro_batch_size=1)
    together, events = train(spec, trials, tmp_path / "pack")
    for event in events:
        if isinstance(event, Evaluated) and event.step == 0:
            (done,) = [e for e in events if isinstance(e, TrialDone) and e.trial == event.trial]
            assert event.eval_loss == done.baseline_eval_loss
    for number, trial in enumerate(trials):
        single = replace(spec, num_slots=1)
        alone, _ = train(single, [trial], tmp_path / f"alone{number}")
        if dtype == "float64" and trial.optimizer.name == "adamw":
            assert largest_difference(together[number], alone[0]) < 1e-9
        else:
            assert largest_difference(together[number], alone[0]) < 0.03


def test_a_killed_and_resumed_trial_ends_with_the_same_bytes(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    trial = dora(adapter__dropout=0.1, optimizer__name="adamw_8bit")
    spec = make_spec(bit_width=4)
    _, events = train(spec, [trial], tmp_path / "whole")
    (undisturbed,) = [event for event in events if isinstance(event, TrialDone)]
    resumed = killed_and_resumed(spec, trial, tmp_path / "cut")
    assert resumed.adapter_digest == undisturbed.adapter_digest


def test_recomputation_changes_no_bit(make_spec: MakeSpec, tmp_path: Path) -> None:
    trial = dora(adapter__dropout=0.1)
    kept, _ = train(make_spec(num_slots=1), [trial], tmp_path / "kept")
    again, _ = train(
        make_spec(num_slots=1, gradient_checkpointing=True), [trial], tmp_path / "again"
    )
    assert largest_difference(kept[0], again[0]) == 0


@pytest.mark.parametrize("bit_width", [4, 16])
def test_what_is_saved_is_evaluated_merged_and_loaded_by_peft_as_it_was_trained(
    make_spec: MakeSpec, tmp_path: Path, bit_width: int
) -> None:
    quant = {"bit_width": bit_width, "compute_dtype": "float32"}
    trial = dora(**PATTERNS, quant=quant)
    spec = make_spec(bit_width, num_slots=1)
    _, events = train(spec, [trial], tmp_path)
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    folder = Path(done.adapter_dir)
    held_out = load_manifest(spec.data_place, "held_out")
    found, alone = evaluate_adapter(folder, held_out)
    assert found["eval_loss"] == pytest.approx(done.eval_loss, rel=1e-5)
    assert alone["eval_loss"] == pytest.approx(done.baseline_eval_loss, rel=1e-5)

    model, _ = load(folder)
    words = torch.arange(24).view(2, 12)
    with torch.no_grad():
        logits = model(words).logits
    from peft.utils.integrations import dequantize_module_weight

    layer = "model.layers.0.self_attn.q_proj"
    theirs = model.base_model.model.get_submodule(layer)
    weight = dequantize_module_weight(theirs.base_layer).float()
    merged = Updates(folder).merged(layer, weight)
    x = torch.randn(5, weight.shape[1])
    torch.testing.assert_close(x @ merged.T, theirs(x).float(), rtol=1e-4, atol=1e-5)

    base = load_base_model(
        spec.base_model, QuantConfig.model_validate(quant), "cpu", StrategyConfig()
    )
    config = saved_config(folder)
    rows = Slots(base.model, config.target_modules, 1, 8, "cpu", dora=config.use_dora)
    rows.load(0, load_file(folder / "adapter_model.safetensors"), config)
    EagerProgram(base, rows).serve([Served(0, rows.scalings(config))])
    with torch.no_grad():
        positions = torch.arange(12).repeat(2, 1)
        own = base.head(base.hidden(words, positions).flatten(0, 1)).view_as(logits)
    torch.testing.assert_close(own, logits, rtol=1e-4, atol=1e-5)

    reader, base_folder = BlockReader(held_out), spec.base_model.folder
    exported = export_adapter(
        folder, base_folder, tmp_path / "out", "merged", lambda model: measure(model, reader),
        Bounds(max_loss_increase=0.01),
    )  # fmt: skip
    assert abs(exported.parity.loss_increase) < 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_a_pass_keeps_for_it_is_what_the_planner_counts(
    base_folder: Path, dtype: str, dropout: float
) -> None:
    shape = read_shape(base_folder)
    assert isinstance(shape, BaseShape)
    load = PackLoad(
        quant=QuantConfig(bit_width=16),
        dtype_bytes=DTYPE_BYTES[dtype],
        num_slots=3,
        max_rank=8,
        target_modules="all-linear",
        optimizer_bytes=8,
        host_optimizer_bytes=8,
        micro_batch_size=2,
        evaluation_batch_size=1,
        block_length=64,
        gradient_checkpointing=False,
        dequantise_once=False,
        dropout=dropout > 0,
        step_program="eager",
        cuda=False,
    )
    without, counted = (
        pass_memory(shape, replace(load, dora=dora)).kept_bytes for dora in (False, True)
    )
    kept, kept_with = (kept_bytes(base_folder, dtype, dropout, dora) for dora in (False, True))
    assert counted - without == pytest.approx(kept_with - kept, rel=0.03)


def kept_bytes(folder: Path, dtype: str, dropout: float, dora: bool) -> int:
    """Of the tensors that autograd keeps from 3 lanes with 2 blocks of 64 tokens each."""
    quant = QuantConfig.model_validate({"bit_width": 16, "compute_dtype": dtype})
    base = load_base_model(BaseModel("", None, str(folder), ""), quant, "cpu", StrategyConfig())
    slots = Slots(base.model, "all-linear", 3, 8, "cpu", dora=dora)
    adapter = AdapterConfig(rank=8, use_dora=dora)
    for slot in range(3):
        slots.open(slot, adapter, seed=slot)
    lanes = Lanes(slots, 3, base.dtype)
    lanes.attach(base.model)
    drops = Drops(dropout, (1, 2))
    lanes.serve([Served(slot, slots.scalings(adapter), drops) for slot in range(3)])
    held = [*base.model.parameters(), *base.model.buffers(), lanes.weights]
    before = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in before:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        base.hidden(torch.ones(6, 64, dtype=torch.long), torch.arange(64).repeat(6, 1))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_loftq_sets_directions_and_magnitudes_together(make_spec: MakeSpec, tmp_path: Path) -> None:
    """The first loss is that of LoftQ without DoRA: factors begin at 1."""
    spec = replace(make_spec(4, num_slots=1), loftq=True)
    first = {}
    for name, trial in {
        "dora": dora(adapter__init="loftq", steps=2),
        "plain": trial_config(adapter__init="loftq", steps=2),
    }.items():
        adapters, events = train(spec, [trial], tmp_path / name)
        first[name] = next(e.eval_loss for e in events if isinstance(e, Evaluated) and e.step == 0)
        (done,) = [event for event in events if isinstance(event, TrialDone)]
        assert first[name] != done.baseline_eval_loss
    assert first["dora"] == pytest.approx(first["plain"], rel=1e-6)

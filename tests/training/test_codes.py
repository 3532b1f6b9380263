"""Weights in codes: the values that bitsandbytes makes, and what they lose."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.bits import average_bits, linear_bytes, stored_bits
from orchestrator.planning.shape import BaseShape, read_shape
from orchestrator.records import BaseModel
from orchestrator.tracking.adapter_model import load_base
from orchestrator.training.base_model import LoadedBase, load_base_model
from orchestrator.training.codes import pack, quantise, unpack
from orchestrator.training.frozen import PackedLinear, keep_values

NF4 = QuantConfig()
FP4 = QuantConfig(quant_type="fp4")
PLAIN_NF4 = QuantConfig(double_quant=False)
MIXED = {"layers.0.*": 8, r"layers\.1\.self_attn\.[qk]_proj": 16}


def load(folder: Path, quant: QuantConfig, **options: object) -> LoadedBase:
    base = BaseModel("tiny", None, str(folder), "d")
    return load_base_model(base, quant, "cpu", StrategyConfig(), **options)  # type: ignore[arg-type]


def weights(num: int = 1 << 16, seed: int = 0) -> Tensor:
    """Normal ones, as trained weights nearly are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num // 256, 256, generator=generator) * 0.02


def relative_error(values: Tensor, weight: Tensor) -> float:
    return float((values.double() - weight.double()).norm() / weight.double().norm())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_base_has_bit_for_bit_the_values_that_transformers_and_bitsandbytes_give_it(
    base_folder: Path, quant_type: str, double_quant: bool, dtype: str
) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quant = QuantConfig.model_validate(
        {"quant_type": quant_type, "double_quant": double_quant, "compute_dtype": dtype}
    )
    base = load(base_folder, quant)
    kind = getattr(torch, dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=kind,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=kind, quantization_config=config, device_map={"": "cpu"}
    )
    packed = [name for name, part in base.model.named_modules() if isinstance(part, PackedLinear)]
    assert len(packed) == 14
    for name in packed:
        weight = theirs.get_submodule(name).weight
        expected = dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(base.model.get_submodule(name).values(), expected), name
    own = dict(base.model.named_parameters())
    for name, _ in theirs.named_parameters():
        assert name in own or name.removesuffix(".weight") in packed


def test_nf4_loses_less_of_normal_weights_than_fp4_and_int4() -> None:
    """QLoRA, arXiv:2305.14314, section 3 and table 2."""
    weight = weights()
    blocks = weight.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True) / 7
    int4 = ((blocks / scale).round().clamp(-8, 7) * scale).view_as(weight)
    errors = {
        "nf4": relative_error(quantise(weight, 4, PLAIN_NF4).values(), weight),
        "fp4": relative_error(
            quantise(weight, 4, QuantConfig(quant_type="fp4", double_quant=False)).values(), weight
        ),
        "int4": relative_error(int4, weight),
    }
    assert errors["nf4"] < 0.95 * min(errors["fp4"], errors["int4"]), errors
    twice = relative_error(quantise(weight, 4, NF4).values(), weight)
    assert twice < 1.02 * errors["nf4"], "double quantisation costs next to nothing"


@pytest.mark.parametrize("bits", [4, 8])
def test_double_quantisation_saves_037_bits_per_weight(bits: int) -> None:
    weight = weights(1 << 20)

    def stored(double_quant: bool) -> float:
        codes = quantise(weight, bits, QuantConfig(double_quant=double_quant))
        tensors = [codes.codes, *codes.constants]
        own = [tensor for tensor in tensors if tensor.numel() != 256]  # maps are shared
        return 8 * sum(tensor.numel() * tensor.element_size() for tensor in own) / weight.numel()

    assert stored(False) == bits + 0.5
    assert stored(False) - stored(True) == pytest.approx(0.373, abs=0.001)


def test_eight_bits_lose_a_tenth_of_what_four_do() -> None:
    weight = weights()
    four, eight = (relative_error(quantise(weight, bits, NF4).values(), weight) for bits in (4, 8))
    assert eight < four / 10
    smaller = relative_error(quantise(weight, 4, QuantConfig(block_size=32)).values(), weight)
    larger = relative_error(quantise(weight, 4, QuantConfig(block_size=512)).values(), weight)
    assert smaller < four < larger


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "quant"), [(4, NF4), (4, FP4), (8, NF4), (8, PLAIN_NF4)])
def test_a_packed_layer_computes_what_its_values_compute(
    bits: int, quant: QuantConfig, dtype: torch.dtype
) -> None:
    weight = weights(96 * 256).to(dtype)
    bias = nn.Parameter(torch.randn(96, dtype=dtype), requires_grad=False)
    model = nn.ModuleDict({"layer": PackedLinear(quantise(weight, bits, quant), bias)})
    x = torch.randn(3, 5, 256, dtype=dtype, requires_grad=True)
    results = []
    for _ in range(2):
        y = model["layer"](x)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
        results.append((y, gradient))
        keep_values(model)
    assert isinstance(model["layer"], nn.Linear)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("bits", [2, 3])
def test_codes_of_2_and_3_bits_come_back_from_their_bytes(bits: int) -> None:
    codes = torch.randint(2**bits, (8 * 64,), generator=torch.Generator().manual_seed(0))
    packed = pack(codes.to(torch.uint8), bits)
    assert packed.numel() == bits * 64
    assert torch.equal(unpack(packed, bits), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hqq_layers_have_the_values_of_its_own_dequantiser(bits: int, dtype: torch.dtype) -> None:
    quantize = pytest.importorskip("hqq.core.quantize", reason="the extra hqq is not installed")
    weight = weights().to(dtype)
    found = quantise(weight, bits, NF4)
    codes, meta = quantize.Quantizer.quantize(
        weight, nbits=bits, group_size=64, axis=1, device="cpu"
    )
    # Its scales and zero points are kept in 16 bits here, as it does on a GPU.
    meta |= {name: meta[name].half().float() for name in ("scale", "zero")}
    expected = quantize.Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
    assert torch.equal(found.values(), expected.to(dtype))
    stored = found.codes.numel() + sum(2 * tensor.numel() for tensor in found.constants)
    assert 8 * stored / weight.numel() == stored_bits(NF4, bits) == bits + 0.5


def test_fewer_bits_lose_more(base_folder: Path) -> None:
    pytest.importorskip("hqq.core.quantize", reason="the extra hqq is not installed")
    weight = weights()
    errors = [relative_error(quantise(weight, n, NF4).values(), weight) for n in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    base = load(base_folder, QuantConfig(bit_width=3, compute_dtype="float32"))
    layer = base.model.get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(2, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, layer.values().sum(0).expand(2, -1))


def test_each_layer_of_a_map_has_its_own_bits_and_the_base_the_bytes_that_were_planned(
    base_folder: Path,
) -> None:
    quant = QuantConfig(bit_width_pattern=MIXED, compute_dtype="float32")
    seen = {}
    base = load(base_folder, quant, on_layer=lambda name, weight, layer: seen.setdefault(name, 0))
    shape = read_shape(base_folder)
    assert isinstance(shape, BaseShape)
    kinds = {
        linear.name: getattr(base.model.get_submodule(linear.name), "_kind", "plain")
        for linear in shape.linears
    }
    assert {kinds[name] for name in kinds if ".0." in name} == {"int8"}
    assert {kinds[name] for name in kinds if ".1.mlp" in name} == {"nf4"}
    assert kinds["model.layers.1.self_attn.q_proj"] == "plain"
    assert seen.keys() == {name for name, kind in kinds.items() if kind != "plain"}
    planned = linear_bytes(quant, shape.linears, 4) + 4 * shape.num_plain_params
    maps = 2 * 256 * 4
    assert base.num_bytes - maps == pytest.approx(planned, rel=1e-3)
    assert base.num_params == shape.num_params
    assert 4 < average_bits(quant, shape.linears) < 16


@pytest.mark.parametrize(
    "fields",
    [
        {"bit_width_pattern": MIXED},
        {"bit_width": 8, "int8_type": "blockwise"},
        {"block_size": 128, "double_quant": False},
    ],
)
def test_whoever_loads_an_adapter_has_the_values_that_it_was_trained_on(
    base_folder: Path, fields: dict[str, object]
) -> None:
    assert_loaded_as_trained(
        base_folder, QuantConfig.model_validate({"compute_dtype": "float32", **fields})
    )


def assert_loaded_as_trained(folder: Path, quant: QuantConfig) -> None:
    """`load_base` runs where this package is not installed."""
    base = load(folder, quant, dequantise_once=True)
    record = {
        "quant": quant.model_dump(mode="json"),
        "compute_dtype": "float32",
        "base_model": {"trust_remote_code": False},
    }
    plain = dict(load_base(record, str(folder)).named_parameters())
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, plain[name]), name


def test_a_pattern_for_no_layer_is_refused_with_those_that_there_are(base_folder: Path) -> None:
    quant = QuantConfig(bit_width_pattern={"w_proj": 8}, compute_dtype="float32")
    with pytest.raises(ConfigError, match="'w_proj' matches no linear layer.*down_proj, gate_proj"):
        load(base_folder, quant)

"""A weight as codes of few bits and constants, and the values that these stand for.

In: a weight and a QuantConfig. Out: Codes, made by bitsandbytes' blockwise quantisers, and values
made by its dequantisers, bit for bit; for 2 and 3 bits HQQ's solver's, and values by its formula.
Shapes: weight [out, in].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from orchestrator.config import QuantConfig
from orchestrator.errors import BaseModelError
from orchestrator.planning.bits import HQQ_BITS, NESTED_BLOCK

INT8 = "int8"
HQQ = "hqq"
CODES_AT_ONCE = 8
"""Of 2 and 3 bits, packed into as many bytes as a code has bits: one code's bits lie together."""


@dataclass(frozen=True)
class Codes:
    codes: Tensor
    constants: list[Tensor]
    """Each block's largest value, or where that is quantised again: its codes, their scales, their
    map, their mean. Then, for int8, the map from codes to values. For HQQ each block's scale and
    zero point."""
    blocksizes: list[int]
    """Of the codes; and of the constants' own, where they have some."""
    kind: str
    """nf4 | fp4 | int8 | hqq2 | hqq3."""
    dtype: torch.dtype
    """Of the values."""
    shape: list[int]

    def values(self) -> Tensor:
        return values(
            self.codes, self.constants, self.blocksizes, self.kind, self.dtype, self.shape
        )


def quantise(weight: Tensor, bits: int, quant: QuantConfig) -> Codes:
    """Where the weight is: on a GPU or the host.

    Raises:
        BaseModelError: 2 or 3 bits, and HQQ is not installed.
    """
    from bitsandbytes import functional as bnb

    if bits in HQQ_BITS:
        return quantise_hqq(weight, bits, quant.block_size)
    shape = list(weight.shape)
    kind: str = quant.quant_type if bits == 4 else INT8
    if bits == 4:
        codes, state = bnb.quantize_4bit(
            weight.contiguous(), blocksize=quant.block_size, quant_type=quant.quant_type
        )
        absmax, maps = state.absmax, []
    else:
        linear = _linear_map(weight.device)
        codes, state = bnb.quantize_blockwise(
            weight.contiguous(), code=linear, blocksize=quant.block_size
        )
        absmax, maps = state.absmax, [linear]
    constants = [absmax]
    blocksizes: list[int] = [quant.block_size]
    if quant.double_quant:
        mean = absmax.mean()
        nested, inner = bnb.quantize_blockwise(absmax - mean, blocksize=NESTED_BLOCK)
        constants = [nested, inner.absmax, _dynamic_map(weight.device), mean]
        blocksizes.append(NESTED_BLOCK)
    return Codes(codes, [*constants, *maps], blocksizes, kind, weight.dtype, shape)


def values(
    codes: Tensor,
    constants: Sequence[Tensor],
    blocksizes: Sequence[int],
    kind: str,
    dtype: torch.dtype,
    shape: Sequence[int],
) -> Tensor:
    """What the codes stand for, [out, in]. Takes what Codes hold one by one, as operators do."""
    import bitsandbytes  # noqa: F401  (registers its operators)

    if kind.startswith(HQQ):
        return hqq_values(codes, constants, int(kind.removeprefix(HQQ)), dtype).view(*shape)
    ops = torch.ops.bitsandbytes
    absmax = constants[0]
    if len(blocksizes) > 1:
        scale, code, mean = constants[1:4]
        absmax = ops.dequantize_blockwise(absmax, scale, code, blocksizes[1], torch.float32) + mean
    if kind == INT8:
        found: Tensor = ops.dequantize_blockwise(codes, absmax, constants[-1], blocksizes[0], dtype)
        return found.view(*shape)
    whole: Tensor = ops.dequantize_4bit(codes, absmax, blocksizes[0], kind, shape, dtype)
    return whole


def shared_constants(kind: str, nested: bool, device: torch.device) -> dict[int, Tensor]:
    """Maps among the constants, by their place: the same tensors for all layers of a kind."""
    found = {2: _dynamic_map(device)} if nested else {}
    if kind == INT8:
        found[4 if nested else 1] = _linear_map(device)
    return found


def quantise_hqq(weight: Tensor, bits: int, block_size: int) -> Codes:
    """By HQQ's half-quadratic solver; its compiled kernels are not used, nor its way of packing."""
    try:
        from hqq.core.quantize import Quantizer
    except ImportError as error:
        raise BaseModelError(
            f"quant.bit_width: {bits} needs HQQ, which is not installed: "
            "DISABLE_CUDA=1 pip install -e '.[hqq]' in the project's folder, or set 4 bits or more"
        ) from error
    if weight.numel() % block_size:
        raise BaseModelError(
            f"quant.block_size: {block_size} does not divide the {weight.numel()} values of a "
            f"layer of {list(weight.shape)}, which {bits} bits need: set a smaller one, or keep "
            "the layer at 4 bits or more with quant.bit_width_pattern"
        )
    whole, meta = Quantizer.quantize(
        weight,
        nbits=bits,
        group_size=block_size,
        axis=1,
        bitpack=False,
        device=str(weight.device),
    )
    codes = pack(whole.to(torch.uint8).flatten(), bits)
    constants = [meta[name].to(torch.float16).flatten() for name in ("scale", "zero")]
    kind = f"{HQQ}{bits}"
    return Codes(codes, constants, [block_size], kind, weight.dtype, list(weight.shape))


def hqq_values(codes: Tensor, constants: Sequence[Tensor], bits: int, dtype: torch.dtype) -> Tensor:
    """(code - zero) * scale in each block, in fp32 (mobiusml.github.io/hqq_blog)."""
    scale, zero = (tensor.float()[:, None] for tensor in constants)
    blocks = unpack(codes, bits).view(len(scale), -1)
    return ((blocks.float() - zero) * scale).to(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [n] of so many bits each, n divisible by 8, as bytes [n * bits / 8]."""
    groups = codes.view(-1, CODES_AT_ONCE).int()
    shifts = torch.arange(CODES_AT_ONCE, device=codes.device, dtype=torch.int32) * bits
    words = (groups << shifts).sum(1, dtype=torch.int32)
    places = torch.arange(bits, device=codes.device, dtype=torch.int32) * 8
    return ((words[:, None] >> places) & 0xFF).to(torch.uint8).flatten()


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The way back."""
    places = torch.arange(bits, device=packed.device, dtype=torch.int32) * 8
    words = (packed.view(-1, bits).int() << places).sum(1, dtype=torch.int32)
    shifts = torch.arange(CODES_AT_ONCE, device=packed.device, dtype=torch.int32) * bits
    return ((words[:, None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten()


# Evenly spaced: in blocks of 64 it loses 0.0059 of normal weights, bitsandbytes' dynamic map, whose
# finest steps lie around zero, 0.0095.
@lru_cache
def _linear_map(device: torch.device) -> Tensor:
    from bitsandbytes.functional import create_linear_map

    found: Tensor = create_linear_map().to(device)
    return found


@lru_cache
def _dynamic_map(device: torch.device) -> Tensor:
    """Of bitsandbytes' nested constants. One for all layers."""
    from bitsandbytes.functional import create_dynamic_map

    found: Tensor = create_dynamic_map().to(device)
    return found

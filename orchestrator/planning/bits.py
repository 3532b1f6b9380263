"""Which layer has how many bits, and how many bytes these take.

In: layer names and shapes, and a QuantConfig. Out: bits and bytes. Pure, no torch: the planner, the
rules, the loader and whoever loads an adapter's base again ask here, so that all mean the same map.
"""

from collections.abc import Sequence

from orchestrator.config import QuantConfig
from orchestrator.planning.patterns import matched
from orchestrator.planning.shape import BaseShape, Linear

GIB = 2**30
# Constants of blockwise codes: fp32 for each block; with double quantisation 8 bits, and fp32 for
# each 256 of these (QLoRA, arXiv:2305.14314, section 3).
CONSTANT_BITS = 32
NESTED_CONSTANT_BITS = 8
NESTED_BLOCK = 256
HQQ_BITS = (2, 3)  # a scale and a zero point in fp16 for each block: as many bits as one in fp32
LLM_INT8_SCALE_BYTES = 4  # one fp32 scale for each output row


def bits_of(quant: QuantConfig, name: str) -> int | None:
    """A layer's bits; None where bit_width auto has not chosen them yet."""
    key = matched(quant.bit_width_pattern, name)
    if key is not None:
        return quant.bit_width_pattern[key]
    return None if quant.bit_width == "auto" else quant.bit_width


def stored_bits(quant: QuantConfig, bits: int, dtype_bytes: int = 2) -> float:
    """Bits that one weight takes, its share of the constants included. Not for LLM.int8."""
    if bits == 16:
        return 8 * dtype_bytes
    if quant.double_quant and bits not in HQQ_BITS:
        return bits + (NESTED_CONSTANT_BITS + CONSTANT_BITS / NESTED_BLOCK) / quant.block_size
    return bits + CONSTANT_BITS / quant.block_size


def linear_bytes(quant: QuantConfig, linears: Sequence[Linear], dtype_bytes: int = 2) -> int:
    """Of the linear layers at their bits, constants included; `dtype_bytes` are those of the
    arithmetic's type. Layers that auto has not chosen bits for are taken at the average asked for,
    or at 4 bits where a budget was given: base_linear_bytes counts the budget."""
    if quant.llm_int8:
        scales = sum(linear.out_features for linear in linears)
        return sum(linear.num_params for linear in linears) + scales * LLM_INT8_SCALE_BYTES
    total = 0.0
    for linear in linears:
        bits = bits_of(quant, linear.name)
        if bits is None:
            weight_bits = quant.average_bits or stored_bits(quant, 4, dtype_bytes)
        else:
            weight_bits = stored_bits(quant, bits, dtype_bytes)
        total += linear.num_params * weight_bits
    return round(total / 8)


def base_linear_bytes(quant: QuantConfig, shape: BaseShape, dtype_bytes: int) -> int:
    """Of all linear layers of a base; those that auto has not chosen bits for may take together
    what the budget leaves, up to 16 bits each."""
    known = linear_bytes(quant, shape.linears, dtype_bytes)
    budget = quant.budget_gib
    if budget is None or all(bits_of(quant, linear.name) for linear in shape.linears):
        return known
    allowed = round(budget * GIB) - shape.num_plain_params * dtype_bytes
    open_params = sum(
        linear.num_params for linear in shape.linears if bits_of(quant, linear.name) is None
    )
    sixteen = stored_bits(quant, 16, dtype_bytes) - stored_bits(quant, 4, dtype_bytes)
    return max(known, min(allowed, known + round(open_params * sixteen / 8)))


def average_bits(quant: QuantConfig, linears: Sequence[Linear]) -> float:
    """Bits that a weight of a linear layer takes on average, values of 16 bits counted as 16."""
    num_params = sum(linear.num_params for linear in linears)
    return 8 * linear_bytes(quant, linears) / num_params

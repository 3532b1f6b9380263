"""Frozen 4-bit linear layers: codes that are made into values at every use, or once for all.

bitsandbytes quantises and dequantises. Its own layer is not used for training here: it keeps its
constants in Python objects, on each of which torch.compile would compile every layer anew, and on a
CPU an eval-mode forward of it rewrites the weights. The values are the same: a layer whose values
are kept computes what one that makes them again computes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class PackedLinear(nn.Module):
    """x [..., in] -> [..., out] by weights in 4-bit codes."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        state = linear.weight.quant_state
        self.in_features: int = linear.in_features
        self.out_features: int = linear.out_features
        self.bias = linear.bias
        self._quant_type: str = state.quant_type
        self._dtype: torch.dtype = state.dtype
        self.register_buffer("codes", linear.weight.data)
        inner = state.state2  # of double quantisation: the constants' own constants
        constants = [inner.absmax, inner.code, state.offset] if inner else []
        for number, tensor in enumerate([state.absmax, *constants]):
            self.register_buffer(f"constants_{number}", tensor)
        self._num_constants = 1 + len(constants)
        self._blocksizes = [state.blocksize, *([inner.blocksize] if inner else [])]

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        output: Tensor = torch.ops.orchestrator.packed_linear(x, bias, False, *self._weight())
        return output

    def values(self) -> Tensor:
        """The weights, [out, in], in the arithmetic's type."""
        return _values(*self._weight())

    def _weight(self) -> tuple[Any, ...]:
        return (
            self.codes,
            [getattr(self, f"constants_{number}") for number in range(self._num_constants)],
            self._blocksizes,
            self._quant_type,
            self._dtype,
            [self.out_features, self.in_features],
        )


def freeze_packed(model: nn.Module, dequantise_once: bool) -> None:
    """Put our layers in the place of bitsandbytes' 4-bit ones, one at a time: the peak is one
    layer's values more than what stays."""
    from bitsandbytes.nn import Linear4bit

    # Names, not modules: a list of those would keep all codes until the last values are made.
    names = [name for name, part in model.named_modules() if isinstance(part, Linear4bit)]
    for name in names:
        packed = PackedLinear(model.get_submodule(name))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _whole(packed) if dequantise_once else packed)


def _whole(packed: PackedLinear) -> nn.Linear:
    linear = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(packed.values(), requires_grad=False)
    if packed.bias is not None:
        bias = packed.bias.data.to(linear.weight.dtype)
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _values(
    codes: Tensor,
    constants: Sequence[Tensor],
    blocksizes: Sequence[int],
    quant_type: str,
    dtype: torch.dtype,
    shape: Sequence[int],
) -> Tensor:
    import bitsandbytes  # noqa: F401  (registers its operators)

    absmax, *nested = constants
    blocksize, *inner_blocksize = blocksizes
    if nested:
        scale, code, offset = nested
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(
            absmax, scale, code, *inner_blocksize, torch.float32
        )
        absmax = absmax + offset
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes, absmax, blocksize, quant_type, shape, dtype
    )
    return values


# One operator from codes to product, in both directions: a compiler cannot keep the values from the
# forward to the backward pass, which would hold the whole base in 16 bits.
@torch.library.custom_op("orchestrator::packed_linear", mutates_args=())
def _packed_linear(
    x: Tensor,
    bias: Tensor | None,
    transposed: bool,
    codes: Tensor,
    constants: Sequence[Tensor],
    blocksizes: Sequence[int],
    quant_type: str,
    dtype: torch.dtype,
    shape: Sequence[int],
) -> Tensor:
    values = _values(codes, constants, blocksizes, quant_type, dtype, shape).to(x.dtype)
    return x @ values if transposed else functional.linear(x, values, bias)


@_packed_linear.register_fake
def _(x: Tensor, bias: Tensor | None, transposed: bool, *weight: Any) -> Tensor:
    out_features, in_features = weight[-1]
    return x.new_empty(*x.shape[:-1], in_features if transposed else out_features)


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, codes, constants, *ctx.settings = inputs
    ctx.save_for_backward(codes, *constants)


def _input_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    codes, *constants = ctx.saved_tensors
    result = torch.ops.orchestrator.packed_linear(
        gradient, None, True, codes, constants, *ctx.settings
    )
    return (result, None, None, None, [None] * len(constants), None, None, None, None)


_packed_linear.register_autograd(_input_gradient, setup_context=_keep_weight)

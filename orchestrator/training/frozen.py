"""Frozen linear layers in codes that are made into values at every use, or once for all.

bitsandbytes quantises and dequantises. Its own layer is not used for training here: it keeps its
constants in Python objects, on each of which torch.compile would compile every layer anew, and on a
CPU an eval-mode forward of it rewrites the weights. The values are the same: a layer whose values
are kept computes what one that makes them again computes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.training.codes import Codes, values


def decoder_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """By name in the whole model. What text does not pass through, such as a vision tower, is left
    alone: neither in codes nor with adapters."""
    decoder = getattr(model, "get_decoder", lambda: None)()
    inside = set(map(id, (decoder if decoder is not None else model).modules()))
    return ((name, part) for name, part in model.named_modules() if id(part) in inside)


def names_elsewhere(model: nn.Module) -> frozenset[str]:
    """Last names of modules that are no part of the decoder."""
    inside = {name for name, _ in decoder_modules(model)}
    names = (name for name, _ in model.named_modules() if name not in inside)
    return frozenset(name.rpartition(".")[2] for name in names)


class PackedLinear(nn.Module):
    """x [..., in] -> [..., out] by weights in codes."""

    def __init__(self, codes: Codes, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.bias = bias
        self._kind = codes.kind
        self.dtype = codes.dtype
        self._blocksizes = codes.blocksizes
        self._num_constants = len(codes.constants)
        self.register_buffer("codes", codes.codes)
        for number, tensor in enumerate(codes.constants):
            self.register_buffer(f"constants_{number}", tensor)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        output: Tensor = torch.ops.orchestrator.packed_linear(x, bias, False, *self._weight())
        return output

    def product(self, x: Tensor) -> Tensor:
        """Without the bias."""
        output: Tensor = torch.ops.orchestrator.packed_linear(x, None, False, *self._weight())
        return output

    def values(self) -> Tensor:
        """The weights, [out, in], in the arithmetic's type."""
        return values(*self._weight())

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features

    def _weight(self) -> tuple[Any, ...]:
        return (
            self.codes,
            [getattr(self, f"constants_{number}") for number in range(self._num_constants)],
            self._blocksizes,
            self._kind,
            self.dtype,
            [self.out_features, self.in_features],
        )


def keep_values(model: nn.Module) -> None:
    """Put the values of packed layers in their place, one at a time: the peak is one layer's codes
    more than what stays."""
    # Names, not modules: a list of those would keep all codes until the last values are made.
    names = [name for name, part in model.named_modules() if isinstance(part, PackedLinear)]
    for name in names:
        packed = model.get_submodule(name)
        assert isinstance(packed, PackedLinear)
        model.set_submodule(name, _whole(packed))


def _whole(packed: PackedLinear) -> nn.Linear:
    linear = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(packed.values(), requires_grad=False)
    if packed.bias is not None:
        bias = packed.bias.data.to(linear.weight.dtype)
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


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
    kind: str,
    dtype: torch.dtype,
    shape: Sequence[int],
) -> Tensor:
    weight = values(codes, constants, blocksizes, kind, dtype, shape).to(x.dtype)
    return x @ weight if transposed else functional.linear(x, weight, bias)


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

"""A gated MLP, down(silu(gate(x)) * up(x)), whose three adapters are one operator with what is
between them.

The values between are the widest of a block, and low-rank updates take almost no arithmetic, so
what counts is how often those are read and written. By the layers' own code: 22 times in a step's
two passes, frozen products apart; here 11 times, and the product is not kept for the backward pass.

Shapes: n lanes, T tokens per lane, R largest rank, F width.
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.planning.activations import JOINED_LAYERS, JOINED_MOST_RANK
from orchestrator.training.base_model import LoadedBase
from orchestrator.training.frozen import PackedLinear
from orchestrator.training.lanes import AdaptedLinear

PROBE_TOKENS = 8
LARGE = 1e3  # some families clamp what is between the layers, at 7 or 10


class GatedMlp(nn.Module):
    """In place of a model's own, with the same layers under the same names."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        for name, part in own.named_children():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:  # [n*b, S, in] -> [n*b, S, in]
        gate, up, down = (getattr(self, name) for name in JOINED_LAYERS)
        if not _joinable(x, gate, up, down):
            output: Tensor = down(functional.silu(gate(x)) * up(x))
            return output
        lanes = len(gate.A)
        product, inner = torch.ops.orchestrator.gated_product(
            gate.base(x).view(lanes, -1, gate.B.shape[2]),
            up.base(x).view(lanes, -1, up.B.shape[2]),
            gate.scaled(gate.inner(x)),
            up.scaled(up.inner(x)),
            gate.B,
            up.B,
            down.A,
        )
        frozen = down.base(product.view(*x.shape[:-1], -1))
        return down.updated(frozen, inner)  # type: ignore[no-any-return]


def join_gated_mlps(base: LoadedBase) -> int:
    """Put a GatedMlp in the place of each decoder block's MLP that computes what one does, as long
    as the layers have no adapters; returns their number. The kernels are for bfloat16 alone."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if base.dtype != torch.bfloat16:
        return 0
    like = torch.empty(0, dtype=base.dtype, device=base.device)
    found = [
        (block, name, part)
        for block in base.model.modules()
        if isinstance(block, GradientCheckpointingLayer)
        for name, part in block.named_children()
        if _is_gated(part, like)
    ]
    for block, name, part in found:
        setattr(block, name, GatedMlp(part))
    return len(found)


@torch.no_grad()
def _is_gated(own: nn.Module, like: Tensor) -> bool:
    layers = [getattr(own, name, None) for name in JOINED_LAYERS]
    if not all(isinstance(layer, nn.Linear | PackedLinear) for layer in layers):
        return False
    if isinstance(own, GatedMlp) or len(signature(own.forward).parameters) != 1:
        return False
    width: Any = layers[0].in_features  # type: ignore[union-attr]
    x = torch.randn(1, PROBE_TOKENS, width, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, LARGE * x]).to(like)
    return torch.equal(GatedMlp(own)(x), own(x))


def _joinable(x: Tensor, *layers: nn.Module) -> bool:
    """Whether the kernels do all that these layers do. Eager blocks are left as they are: they are
    what compiled ones are compared with."""
    return (
        torch.compiler.is_compiling()
        and x.is_cuda
        and all(
            type(layer) is AdaptedLinear
            and not layer.lanes.dropout.active
            and x.dtype == layer.A.dtype == torch.bfloat16
            and layer.A.shape[2] <= JOINED_MOST_RANK
            for layer in layers
        )
    )


def updated_product(
    gate: Tensor, up: Tensor, gate_inner: Tensor, up_inner: Tensor, gate_B: Tensor, up_B: Tensor
) -> Tensor:
    """The kernels' reference: gate and up [n, T, F], inner [n, T, R], B [n, R, F] -> [n, T, F]."""
    return functional.silu(gate + gate_inner @ gate_B) * (up + up_inner @ up_B)


@torch.library.custom_op("orchestrator::gated_product", mutates_args=())
def _gated_product(
    gate: Tensor,
    up: Tensor,
    gate_inner: Tensor,
    up_inner: Tensor,
    gate_B: Tensor,
    up_B: Tensor,
    down_A: Tensor,
) -> tuple[Tensor, Tensor]:
    """The product [n, T, F], and what A of down [n, F, R] makes of it [n, T, R]."""
    from orchestrator.training import gated_mlp_kernels

    product = gated_mlp_kernels.forward(gate, up, gate_inner, up_inner, gate_B, up_B)
    return product, product @ down_A


@_gated_product.register_fake
def _(gate: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), gate.new_empty(*gate.shape[:2], others[-1].shape[2])


@torch.library.custom_op("orchestrator::gated_product_backward", mutates_args=())
def _gated_product_backward(
    by_product: Tensor,
    by_inner: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_inner: Tensor,
    up_inner: Tensor,
    gate_B: Tensor,
    up_B: Tensor,
    down_A: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by gate and up, and by the weights: see gated_mlp_kernels.backward."""
    from orchestrator.training import gated_mlp_kernels

    return gated_mlp_kernels.backward(
        by_product, by_inner, gate, up, gate_inner, up_inner, gate_B, up_B, down_A
    )


@_gated_product_backward.register_fake
def _(
    by_product: Tensor, by_inner: Tensor, gate: Tensor, up: Tensor, *others: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    lanes, *size = others[-1].shape
    by_weights = gate.new_empty(3, lanes, size[0] * size[1])
    return torch.empty_like(gate), torch.empty_like(up), by_weights


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _input_gradients(ctx: Any, by_product: Tensor, by_inner: Tensor) -> tuple[Tensor, ...]:
    *_, gate_B, up_B, down_A = ctx.saved_tensors
    by_gate, by_up, by_weights = torch.ops.orchestrator.gated_product_backward(
        by_product.contiguous(), by_inner.contiguous(), *ctx.saved_tensors
    )
    by_inners = by_gate @ gate_B.mT, by_up @ up_B.mT
    weights = zip(by_weights.unbind(), (gate_B, up_B, down_A), strict=True)
    return by_gate, by_up, *by_inners, *(part.view(like.shape) for part, like in weights)


_gated_product.register_autograd(_input_gradients, setup_context=_keep_inputs)

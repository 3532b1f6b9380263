"""DoRA: each row of W + s BA is scaled to a trained length, its magnitude (arXiv:2402.09353).

The rows' lengths follow without W + s BA, which would be a whole weight for each lane: with
G = A W^T, the frozen layer's product with the R rows of A,
    ||w_i + s (BA)_i||^2 = ||w_i||^2 + 2 s sum_r B[r, i] G[r, i] + s^2 sum_r B[r, i] (A A^T B)[r, i]
and ||w_i||^2 is of the base alone. Gradients take the lengths as constants, as in PEFT (0.21,
tuners/lora/dora.py).

Shapes: n lanes, R largest rank, weight [out, in], A [n, in, R], B [n, R, out].
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.training.frozen import PackedLinear

# A row of zeros has no direction; its factor is then 0 / this, not 0 / 0.
LEAST_SQUARE = 1e-30


def product(base: nn.Module, x: Tensor) -> Tensor:
    """x W^T without the layer's bias: [..., in] -> [..., out]."""
    if isinstance(base, PackedLinear):
        return base.product(x)
    assert isinstance(base.weight, Tensor)
    return functional.linear(x, base.weight)


def squared_lengths(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """||w_i||^2, [out], of the values that codes stand for."""
    weight = base.values() if isinstance(base, PackedLinear) else base.weight
    assert isinstance(weight, Tensor)
    found: Tensor = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=dtype).square()
    return found


def lengths(base: nn.Module, squares: Tensor, A: Tensor, B: Tensor, scaling: Tensor) -> Tensor:
    """||w_i + s (BA)_i||, [n, 1, out], in A's type; `squares` are ||w_i||^2, `scaling` [n, 1, 1].
    The product with the base is made in the base's type."""
    with torch.no_grad():
        rows = A.transpose(1, 2)
        by_base = product(base, rows.to(_dtype(base))).to(A.dtype)
        by_itself = torch.bmm(torch.bmm(rows, A), B)
        crossed = (B * by_base).sum(1, keepdim=True)
        squared = (B * by_itself).sum(1, keepdim=True)
        found = squares + 2 * scaling * crossed + scaling.square() * squared
        return found.clamp_min(LEAST_SQUARE).sqrt()


def _dtype(base: nn.Module) -> torch.dtype:
    if isinstance(base, PackedLinear):
        return base.dtype
    assert isinstance(base.weight, Tensor)
    return base.weight.dtype

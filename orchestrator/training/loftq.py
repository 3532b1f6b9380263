"""What quantisation took from a layer, as far as a low rank holds it: an adapter's first values.

LoftQ (arXiv:2310.08659) with one iteration: the base is quantised as it is, and the best
approximation of the error by a product of low rank is added by the adapter. So trials of any rank,
with and without it, share one base. In: weights and packed layers, as they are loaded. Out:
Corrections.

Shapes: weight [out, in]; R vectors: the largest rank, or the layer's smaller side if that is less.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.training.frozen import PackedLinear


@dataclass(frozen=True)
class Correction:
    """The error's leading singular vectors, each scaled by the root of its value; on the host."""

    left: Tensor
    """[out, R]."""
    right: Tensor
    """[R, in]."""

    def parts(self, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r], whose product times `scaling` is the approximation. r is the
        rank, or R if that is less: then nothing is left of the error."""
        root = scaling**0.5
        return self.right[:rank] / root, self.left[:, :rank] / root


class Corrections:
    """Collects them while a base is loaded; `add` is a loader's `on_layer`."""

    def __init__(self, max_rank: int) -> None:
        self._max_rank = max_rank
        self.by_layer: dict[str, Correction] = {}

    @torch.no_grad()
    def add(self, name: str, weight: Tensor, layer: PackedLinear) -> None:
        self.by_layer[name] = correction(weight.double() - layer.values().double(), self._max_rank)


def correction(error: Tensor, max_rank: int) -> Correction:
    """By the eigenvectors of the smaller of error @ error.T and error.T @ error: for layers of an
    LLM's size far sooner than a whole singular value decomposition."""
    wide = error.shape[0] <= error.shape[1]
    tall = error.T if wide else error  # [longer, shorter]
    _, vectors = torch.linalg.eigh(tall.T @ tall)
    short = vectors[:, -max_rank:].flip(1)  # the largest first
    # Either sign would do; one of them is the same on every machine.
    largest = short.gather(0, short.abs().argmax(0, keepdim=True))
    short = short * largest.sign()
    long = tall @ short  # each of the length of its singular value
    sizes = long.norm(dim=0).clamp_min(1e-30)
    long, short = long / sizes.sqrt(), short * sizes.sqrt()
    left, right = (short, long.T) if wide else (long, short.T)
    return Correction(left.float().cpu(), right.float().cpu())

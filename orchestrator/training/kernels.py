"""Triton kernels for what would otherwise read or write its data several times over.

Each has a plain reference beside its caller, which a CPU uses. Measured on an H200: the cross
entropy of 2,048 x 151,936 logits takes 1.1 ms as torch.compile makes it; read once and written once
they would take 0.3 ms.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

VOCABULARY_BLOCK = 8192
GRADIENT_BLOCK = 1024


def weighted_losses(logits: Tensor, labels: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """loss.weighted_losses in one launch: a row's second reading comes from the L2 cache."""
    losses = torch.empty_like(factors)
    gradient = torch.empty_like(logits)
    _cross_entropy[(len(logits),)](
        logits,
        gradient,
        labels,
        factors,
        losses,
        logits.shape[1],
        BLOCK=VOCABULARY_BLOCK,
        num_warps=16,
    )
    return losses, gradient


class GradientGatherer:
    """Adds lanes' gradients, [n, length] for each segment of a row, to their slots' fp32 rows.

    One launch for all segments, lanes and slots: hundreds of small strided additions otherwise.
    """

    def __init__(self, segments: Sequence[tuple[int, int]], device: torch.device) -> None:
        blocks = [
            (number, offset)
            for number, (start, end) in enumerate(segments)
            for offset in range(0, end - start, GRADIENT_BLOCK)
        ]
        self._blocks = torch.tensor(blocks, dtype=torch.int32, device=device)
        table = [(start, end - start) for start, end in segments]
        self._segments = torch.tensor(table, dtype=torch.int64, device=device)

    def add(
        self, parts: Sequence[Tensor], rows: Tensor, slots: Sequence[int], fresh: Sequence[bool]
    ) -> None:
        """`parts` are contiguous, of one type, one for each segment; a fresh lane's replace what
        its slot's row holds."""
        numbers = [part.data_ptr() for part in parts] + [*slots] + [int(flag) for flag in fresh]
        table = (
            torch.tensor(numbers, dtype=torch.int64).pin_memory().to(rows.device, non_blocking=True)
        )
        _gather_gradients[(len(self._blocks), len(slots))](
            table,
            table[len(parts) :],
            rows,
            rows.stride(0),
            len(slots),
            self._blocks,
            self._segments,
            TYPE=_TRITON_TYPES[parts[0].dtype],
            BLOCK=GRADIENT_BLOCK,
        )


_TRITON_TYPES: dict[torch.dtype, Any] = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy(logits, gradient, labels, factors, losses, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    gradient += row * width
    label = tl.load(labels + row)
    factor = tl.load(factors + row)
    highest = -float("inf")
    total = 0.0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(logits + at, mask=at < width, other=-float("inf")).to(tl.float32)
        new = tl.maximum(highest, tl.max(values, 0))
        base = tl.where(new == -float("inf"), 0.0, new)  # nothing but -inf so far
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(values - base), 0)
        highest = new
    normaliser = highest + tl.log(total)
    tl.store(losses + row, (normaliser - tl.load(logits + label).to(tl.float32)) * factor)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(logits + at, mask=at < width, other=-float("inf")).to(tl.float32)
        by_logit = (tl.exp(values - normaliser) - tl.where(at == label, 1.0, 0.0)) * factor
        tl.store(gradient + at, by_logit.to(gradient.dtype.element_ty), mask=at < width)


@triton.jit  # type: ignore[untyped-decorator]
def _gather_gradients(  # type: ignore[no-untyped-def]
    parts,
    lanes,
    rows,
    row_length,
    num_lanes,
    blocks,
    segments,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(1)
    segment = tl.load(blocks + 2 * tl.program_id(0))
    offset = tl.load(blocks + 2 * tl.program_id(0) + 1)
    start = tl.load(segments + 2 * segment)
    length = tl.load(segments + 2 * segment + 1)
    slot = tl.load(lanes + lane)
    fresh = tl.load(lanes + num_lanes + lane)
    part = tl.load(parts + segment).to(tl.pointer_type(TYPE))
    at = offset + tl.arange(0, BLOCK)
    inside = at < length
    values = tl.load(part + lane * length + at, mask=inside, other=0.0).to(tl.float32)
    to = rows + slot * row_length + start + at
    if fresh == 0:
        values += tl.load(to, mask=inside, other=0.0)
    tl.store(to, values, mask=inside)

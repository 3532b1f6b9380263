"""A gated MLP's elementwise part in Triton, with the low-rank updates of its three layers in it.

Every value that is as wide as the MLP is read and written once: updates are made in registers, and
the gradients by B of gate and up and by A of down are added up while the gradients by their values
are there. Each sum has one order, so the same inputs give the same bits.

Shapes: n lanes, T tokens per lane, R largest rank, F width. gate and up [n, T, F]; their inner
values [n, T, R] and B [n, R, F]; A of down [n, F, R]. Lanes of weights may be any distance apart.
The reference is gated_mlp.py's.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from orchestrator.training.attention_kernels import padded
from orchestrator.training.attention_launch import card, has_large_shared_memory


class Tiles(NamedTuple):
    tokens: int
    columns: int
    warps: int = 4
    stages: int = 3
    """Tiles on their way and in work; one on cards with less shared memory."""


# By padded rank. A program goes through its tokens with the next tiles on their way: at rank 16
# values move at 3.8 TB/s forward and 3.4 backward, of the 4.0 of a copy on an H200; with one tile a
# program at 2.6 and 1.4.
FORWARD = {16: Tiles(16, 128), 32: Tiles(16, 128), 64: Tiles(32, 64)}
BACKWARD = {16: Tiles(64, 64), 32: Tiles(64, 32), 64: Tiles(32, 64)}
# Fewer leave a card's multiprocessors idle: the tokens of a lane are then shared out among several
# programs, whose sums are added up afterwards.
PROGRAMS_PER_PROCESSOR = 4


def forward(
    gate: Tensor, up: Tensor, gate_inner: Tensor, up_inner: Tensor, gate_B: Tensor, up_B: Tensor
) -> Tensor:
    """silu of the updated gate times the updated up, [n, T, F]."""
    lanes, tokens, width = gate.shape
    rank = gate_inner.shape[2]
    product = torch.empty_like(gate)
    tiles = FORWARD[padded(rank)]
    parts, tokens_each = _parts(gate, tiles)
    _forward[(triton.cdiv(width, tiles.columns), parts, lanes)](
        gate,
        up,
        gate_inner,
        up_inner,
        gate_B,
        up_B,
        product,
        gate_B.stride(0),
        up_B.stride(0),
        tokens,
        width,
        rank,
        tokens_each,
        **_settings(rank, tiles, gate.device),
    )
    return product


def backward(
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
    """Gradients by gate and up [n, T, F]; and [3, n, R * F]: by B of gate and of up and A of down,
    each as it lies in a lane."""
    lanes, tokens, width = gate.shape
    rank = gate_inner.shape[2]
    by_gate, by_up = torch.empty_like(gate), torch.empty_like(up)
    tiles = BACKWARD[padded(rank)]
    parts, tokens_each = _parts(gate, tiles)
    dtype = gate.dtype if parts == 1 else torch.float32
    sums = gate.new_empty(3, parts, lanes, rank * width, dtype=dtype)
    _backward[(triton.cdiv(width, tiles.columns), parts, lanes)](
        by_product,
        by_inner,
        gate,
        up,
        gate_inner,
        up_inner,
        gate_B,
        up_B,
        down_A,
        by_gate,
        by_up,
        *sums.unbind(),
        gate_B.stride(0),
        up_B.stride(0),
        down_A.stride(0),
        tokens,
        width,
        rank,
        tokens_each,
        **_settings(rank, tiles, gate.device),
    )
    by_weights = sums.squeeze(1) if parts == 1 else sums.sum(1).to(gate.dtype)
    return by_gate, by_up, by_weights


def _parts(gate: Tensor, tiles: Tiles) -> tuple[int, int]:
    """Programs that share a lane's tokens, and how many of them each takes."""
    lanes, tokens, width = gate.shape
    programs = triton.cdiv(width, tiles.columns) * lanes
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * card(gate.device).multi_processor_count, programs)
    num_tiles = triton.cdiv(tokens, tiles.tokens)
    each = triton.cdiv(num_tiles, min(wanted, num_tiles))
    return triton.cdiv(num_tiles, each), each * tiles.tokens


def _settings(rank: int, tiles: Tiles, device: torch.device) -> dict[str, int]:
    return {
        "RANK": padded(rank),
        "TOKENS": tiles.tokens,
        "COLUMNS": tiles.columns,
        "STAGES": tiles.stages if has_large_shared_memory(device) else 1,
        "num_warps": tiles.warps,
    }


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    gate,
    up,
    gate_inner,
    up_inner,
    gate_B,
    up_B,
    product,
    gate_B_stride,
    up_B_stride,
    tokens,
    width,
    rank,
    tokens_each,
    RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    lane = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    gate_B_tile = _across(gate_B + lane * gate_B_stride, columns, width, rank, RANK)
    up_B_tile = _across(up_B + lane * up_B_stride, columns, width, rank, RANK)
    first = tl.program_id(1) * tokens_each
    last = min(first + tokens_each, tokens)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        rows = start + tl.arange(0, TOKENS)
        at = (lane * tokens + rows)[:, None] * width + columns[None, :]
        inside = (rows < tokens)[:, None] & (columns < width)[None, :]
        g = tl.load(gate + at, mask=inside, other=0.0)
        u = tl.load(up + at, mask=inside, other=0.0)
        gate_rows = _along(gate_inner, lane, rows, tokens, rank, RANK)
        up_rows = _along(up_inner, lane, rows, tokens, rank, RANK)
        g = g.to(tl.float32) + tl.dot(gate_rows, gate_B_tile)
        u = u.to(tl.float32) + tl.dot(up_rows, up_B_tile)
        value = g * tl.sigmoid(g) * u
        tl.store(product + at, value.to(product.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    by_product,
    by_inner,
    gate,
    up,
    gate_inner,
    up_inner,
    gate_B,
    up_B,
    down_A,
    by_gate,
    by_up,
    by_gate_B,
    by_up_B,
    by_down_A,
    gate_B_stride,
    up_B_stride,
    down_A_stride,
    tokens,
    width,
    rank,
    tokens_each,
    RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    lane = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK)
    kept = (ranks < rank)[:, None] & (columns < width)[None, :]
    transposed = columns[None, :] * rank + ranks[:, None]  # where [R, F] lies in [F, R]
    gate_B_tile = _across(gate_B + lane * gate_B_stride, columns, width, rank, RANK)
    up_B_tile = _across(up_B + lane * up_B_stride, columns, width, rank, RANK)
    down_A_tile = tl.load(down_A + lane * down_A_stride + transposed, mask=kept, other=0.0)
    gate_sum = tl.zeros([RANK, COLUMNS], tl.float32)
    up_sum = tl.zeros([RANK, COLUMNS], tl.float32)
    down_sum = tl.zeros([RANK, COLUMNS], tl.float32)
    first = tl.program_id(1) * tokens_each
    last = min(first + tokens_each, tokens)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        rows = start + tl.arange(0, TOKENS)
        at = (lane * tokens + rows)[:, None] * width + columns[None, :]
        inside = (rows < tokens)[:, None] & (columns < width)[None, :]
        g = tl.load(gate + at, mask=inside, other=0.0)
        u = tl.load(up + at, mask=inside, other=0.0)
        d = tl.load(by_product + at, mask=inside, other=0.0)
        gate_rows = _along(gate_inner, lane, rows, tokens, rank, RANK)
        up_rows = _along(up_inner, lane, rows, tokens, rank, RANK)
        inner_rows = _along(by_inner, lane, rows, tokens, rank, RANK)
        g = g.to(tl.float32) + tl.dot(gate_rows, gate_B_tile)
        u = u.to(tl.float32) + tl.dot(up_rows, up_B_tile)
        d = d.to(tl.float32) + tl.dot(inner_rows, down_A_tile)
        kind = by_gate.dtype.element_ty
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        by_g = (d * u * (sigmoid + silu * (1 - sigmoid))).to(kind)
        by_u = (d * silu).to(kind)
        tl.store(by_gate + at, by_g, mask=inside)
        tl.store(by_up + at, by_u, mask=inside)
        gate_sum += tl.dot(tl.trans(gate_rows), by_g)
        up_sum += tl.dot(tl.trans(up_rows), by_u)
        down_sum += tl.dot(tl.trans(inner_rows), (silu * u).to(kind))
    part = (tl.program_id(1) * tl.num_programs(2) + lane) * rank * width
    to = part + ranks[:, None] * width + columns[None, :]
    tl.store(by_gate_B + to, gate_sum.to(by_gate_B.dtype.element_ty), mask=kept)
    tl.store(by_up_B + to, up_sum.to(by_up_B.dtype.element_ty), mask=kept)
    to = part + transposed
    tl.store(by_down_A + to, down_sum.to(by_down_A.dtype.element_ty), mask=kept)


@triton.jit  # type: ignore[untyped-decorator]
def _across(weights, columns, width, rank, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns of a lane's B, [R, F]."""
    ranks = tl.arange(0, RANK)
    return tl.load(
        weights + ranks[:, None] * width + columns[None, :],
        mask=(ranks < rank)[:, None] & (columns < width)[None, :],
        other=0.0,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _along(inner, lane, rows, tokens, rank, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens' inner values, [T, R]."""
    ranks = tl.arange(0, RANK)
    return tl.load(
        inner + (lane * tokens + rows)[:, None] * rank + ranks[None, :],
        mask=(rows < tokens)[:, None] & (ranks < rank)[None, :],
        other=0.0,
    )

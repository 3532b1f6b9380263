"""Dropout masks by a hash, so that no generator's state is part of a step.

A mask is a function of (the trial's seed, step, block of the step, layer, place in the block): the
same alone and in a pack, in whatever micro-batches and on however many workers the step is done, in
a recomputed forward pass, after a resume, on a CPU, on a GPU and in a CUDA graph.

Shapes: n lanes, b blocks per lane, S block length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drops:
    """What one lane drops in the next forward pass."""

    rate: float = 0.0
    seeds: tuple[int, ...] = ()
    """63 bits for each of the lane's blocks; none needed where nothing is dropped."""


class Dropout:
    """Of all lanes; masks the inputs of their adapters."""

    def __init__(
        self, num_lanes: int, blocks: int | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        """`blocks` per lane make a constant program, which always masks; with None masks are made
        where some lane drops something. `dtype` is that of the factors."""
        self.active = blocks is not None
        self._blocks = blocks
        size = num_lanes * (blocks or 0)
        self._seeds = torch.zeros(size, 2, 1, 1, dtype=torch.int32, device=device)
        self._thresholds = torch.zeros(size, 1, 1, dtype=torch.int32, device=device)
        self._factors = torch.ones(size, 1, 1, dtype=dtype, device=device)

    def set(self, lanes: Sequence[Drops], idle: int) -> None:
        """What each lane drops; `idle` more lanes drop nothing."""
        if self._blocks is None:
            self.active = any(lane.rate for lane in lanes)
        if not self.active:
            return
        blocks = self._blocks or max(len(lane.seeds) for lane in lanes)
        spread = [(lane, block) for lane in [*lanes, *[Drops()] * idle] for block in range(blocks)]
        seeds = [_halves(lane.seeds[block]) if lane.rate else (0, 0) for lane, block in spread]
        self._seeds = self._put(self._seeds, seeds)
        # A rate next to 1 rounds to 2**31, which int32 does not hold.
        thresholds = [min(round(lane.rate * 2**31), 2**31 - 1) for lane, _ in spread]
        self._thresholds = self._put(self._thresholds, thresholds)
        self._factors = self._put(self._factors, [1 / (1 - lane.rate) for lane, _ in spread])

    def __call__(self, tokens: Tensor, layer: Tensor) -> Tensor:  # [n, b*S, in] -> the same
        by_block = tokens.reshape(len(self._seeds), -1, tokens.shape[-1])  # [n*b, S, in]
        _, length, width = by_block.shape
        starts, turns = row_starts(length, width, tokens.device)
        places = starts + torch.arange(width, dtype=torch.int32, device=tokens.device)
        random = _hash(places ^ self._seeds[:, 0])
        random = _hash(random ^ (self._seeds[:, 1] ^ _hash(layer) ^ _hash(turns)))
        # One byte a value is kept for the backward pass, not a factor.
        kept = by_block * ((random & 0x7FFFFFFF) >= self._thresholds)
        return (kept * self._factors).to(tokens.dtype).view_as(tokens)

    def _put(self, tensor: Tensor, values: Sequence[object]) -> Tensor:
        """The values in the tensor's place: into it where the program reads it there."""
        source = torch.tensor(values, dtype=tensor.dtype).view(-1, *tensor.shape[1:])
        if self._blocks is None:
            return source.to(tensor.device)
        return tensor.copy_(source)


def row_starts(length: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each row of [length, width] the number of its first value, as 32 bits that wrap around,
    and how often they did: [length, 1] each. A block may have 2**32 values and more."""
    starts = torch.arange(length, dtype=torch.int64, device=device).unsqueeze(1) * width
    low = starts & 0xFFFFFFFF
    return (low - (low >> 31 << 32)).to(torch.int32), (starts >> 32).to(torch.int32)


def _hash(x: Tensor) -> Tensor:
    """A 32-bit mixer on int32 that wraps around: lowbias32 (Chris Wellons, hash-prospector) but for
    its second factor, 0x846CA68B there. It stays, for masks must be those of earlier runs."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7935B975  # 0x86CA468B
    return x ^ ((x >> 16) & 0xFFFF)


def _halves(seed: int) -> tuple[int, int]:
    """A seed's two halves as signed 32-bit numbers."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)

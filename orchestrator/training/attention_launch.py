"""Launches attention's kernels: tile sizes, grids, and the buffers between them.

Shapes: B blocks, S block length, H query heads, K key heads, D head width. query [B, H, S, D], key
and value [B, K, S, D] of any strides but the last; extents [2, B, S] of int32: where the document
of each token starts and ends. Outputs and gradients lie as [B, S, heads, D].
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orchestrator.training import attention_kernels


class Tiles(NamedTuple):
    own: int
    """Rows that a program holds: queries, or keys where the gradients are by keys."""
    other: int
    """Rows of the other kind that it reads at a time."""
    warps: int
    stages: int
    registers: int | None = None
    """Most of a thread: with 128 or fewer, two programs of 8 warps share a multiprocessor."""


# By head width, for cards that give a program 160 KiB of shared memory or more (sm_80, sm_90), and
# for those that give it 99 KiB. Those for 64 and 128 are meant for an H200.
FORWARD = {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 3), 256: Tiles(128, 32, 8, 2)}
BACKWARD = {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 8, 1)}
SMALL_FORWARD = {64: Tiles(128, 64, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(64, 32, 4, 1)}
SMALL_BACKWARD = {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 4, 1), 256: Tiles(32, 16, 4, 1)}
LARGE_SHARED_MEMORY = frozenset({(8, 0), (9, 0), (10, 0), (10, 3)})  # compute capabilities

# Below so many tiles of keys per multiprocessor the last ones leave the card idle: the query heads
# of a key head are then shared out among several programs.
KEY_TILES_PER_PROCESSOR = 1.5


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extents: Tensor,
    scale: float,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, S, H, D], and the base-2 logarithm of each row's sum [B, H, S] in fp32."""
    num_blocks, num_heads, length, width = query.shape
    query, key, value = (_with_whole_rows(part) for part in (query, key, value))
    output = query.new_empty(num_blocks, length, num_heads, width)
    normaliser = query.new_empty(num_blocks, num_heads, length, dtype=torch.float32)
    tiles = tiles or _tiles(query, FORWARD, SMALL_FORWARD)
    num_rows = num_blocks * num_heads
    attention_kernels.forward[(_cdiv(length, tiles.own) * num_rows,)](
        query,
        key,
        value,
        extents,
        output,
        normaliser,
        query.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        num_rows,
        num_heads,
        num_heads // key.shape[1],
        length,
        scale,
        **_settings(width, tiles),
    )
    return output, normaliser


def backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extents: Tensor,
    output: Tensor,
    normaliser: Tensor,
    scale: float,
    tiles: Tiles | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by query [B, S, H, D], key and value [B, S, K, D]; `gradient` is the output's.

    `parts` programs share the query heads of a key head.
    """
    num_blocks, num_heads, length, width = query.shape
    num_key_heads = key.shape[1]
    query, key, value = (_with_whole_rows(part) for part in (query, key, value))
    tiles = tiles or _tiles(query, BACKWARD, SMALL_BACKWARD)
    num_tiles = _cdiv(length, tiles.own)
    key_tiles = num_tiles * num_blocks * num_key_heads
    parts = parts or _parts(key_tiles, num_heads // num_key_heads, query.device)
    by_query = torch.empty_like(output)
    by_key = query.new_empty(num_blocks, length, num_key_heads, width)
    by_value = torch.empty_like(by_key)
    by_both = (by_key, by_value)
    if parts > 1:
        shape = (2, parts, *by_key.shape)
        by_both = tuple(query.new_empty(shape, dtype=torch.float32))
    gradient = gradient.contiguous()
    delta = _output_products(gradient, output, normaliser)
    # Both kinds in one launch: where there are few programs, one kind alone leaves the card idle,
    # and where there are many, the short ones by queries fill the gaps that the long ones leave.
    attention_kernels.backward[(key_tiles * parts + num_tiles * num_blocks * num_heads,)](
        query,
        key,
        value,
        extents,
        gradient,
        normaliser,
        delta,
        by_query,
        *by_both,
        query.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        num_blocks,
        num_heads,
        num_key_heads,
        parts,
        length,
        scale,
        **_settings(width, tiles),
    )
    if parts > 1:
        size = by_key.numel()
        attention_kernels.add_parts[(_cdiv(size, 1024), 2)](
            *by_both, by_key, by_value, size, parts, 1024
        )
    return by_query, by_key, by_value


def _output_products(gradient: Tensor, output: Tensor, normaliser: Tensor) -> Tensor:
    """The sum of each output's products with its gradient, [B, H, S]: what a softmax's backward
    pass takes off."""
    num_blocks, length, num_heads, width = output.shape
    delta = torch.empty_like(normaliser)
    attention_kernels.multiply_outputs[(_cdiv(length, 64), num_blocks * num_heads)](
        gradient, output, delta, num_heads, length, width, 64
    )
    return delta


def _with_whole_rows(part: Tensor) -> Tensor:
    return part if part.stride(-1) == 1 else part.contiguous()


def _cdiv(number: int, by: int) -> int:
    return -(-number // by)


def _settings(width: int, tiles: Tiles) -> dict[str, int | None]:
    return {
        "WIDTH": width,
        "OWN": tiles.own,
        "OTHER": tiles.other,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "maxnreg": tiles.registers,
    }


def _tiles(query: Tensor, large: dict[int, Tiles], small: dict[int, Tiles]) -> Tiles:
    table = large if has_large_shared_memory(query.device) else small
    return table[max(64, attention_kernels.padded(query.shape[-1]))]


def _parts(key_tiles: int, group: int, device: torch.device) -> int:
    """The fewest programs for a key head that give the card enough to do; a divisor of its
    `group` of query heads."""
    wanted = KEY_TILES_PER_PROCESSOR * card(device).multi_processor_count
    divisors = [parts for parts in range(1, group + 1) if group % parts == 0]
    return next((parts for parts in divisors if key_tiles * parts >= wanted), group)


def has_large_shared_memory(device: torch.device) -> bool:
    return (card(device).major, card(device).minor) in LARGE_SHARED_MEMORY


@cache
def card(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)

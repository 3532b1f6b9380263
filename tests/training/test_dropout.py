"""Masks are functions of places that no size of block makes wrong, and that never change."""

import pytest
import torch
from torch import Tensor

from orchestrator.training.dropout import Dropout, Drops, row_starts

SEED, LAYER, RATE = 0x1234_5678_9ABC_DEF0, -77, 0.3


def mixed(x: int) -> int:
    """dropout.py's mixer on Python's numbers."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x86CA468B & 0xFFFFFFFF
    return x ^ (x >> 16)


def kept(place: int) -> bool:
    """As all earlier runs had it, of a place below 2**31."""
    first = mixed(place ^ (SEED & 0xFFFFFFFF))
    second = mixed(first ^ (SEED >> 32) ^ mixed(LAYER & 0xFFFFFFFF))
    return (second & 0x7FFFFFFF) >= round(RATE * 2**31)


def masked(tokens: Tensor) -> Tensor:
    dropout = Dropout(1, None, torch.device("cpu"), torch.float32)
    dropout.set([Drops(RATE, (SEED,))], idle=0)
    return dropout(tokens, torch.tensor(LAYER, dtype=torch.int32))


def test_masks_are_those_of_earlier_runs() -> None:
    found = masked(torch.ones(1, 64, 48)).ravel()
    assert [bool(value) for value in found] == [kept(place) for place in range(64 * 48)]


@pytest.mark.parametrize("length", [64, 131_072, 1_000_000])
def test_rows_of_a_block_with_more_than_two_to_the_31_values_begin_where_they_should(
    length: int,
) -> None:
    """131,072 tokens of Qwen2.5-72B's MLP are 3.9 * 10**9 values."""
    starts, turns = row_starts(length, 29_568, torch.device("cpu"))
    assert starts.dtype == turns.dtype == torch.int32
    for row in (0, 1, length // 2, length - 1):
        expected = (turns[row].item() << 32) + (starts[row].item() & 0xFFFFFFFF)
        assert expected == row * 29_568

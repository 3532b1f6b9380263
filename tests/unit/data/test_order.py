from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from orchestrator.data.order import step_block_indices

seeds = st.integers(0, 2**70)


def epoch_order(seed: int, epoch: int, num_blocks: int) -> NDArray[np.int64]:
    return step_block_indices(seed, epoch, batch_size=num_blocks, num_blocks=num_blocks)


@given(
    seed=seeds,
    num_blocks=st.integers(1, 60),
    batch_size=st.integers(1, 90),
    epochs=st.integers(1, 3),
)
def test_every_block_comes_exactly_once_per_epoch(
    seed: int, num_blocks: int, batch_size: int, epochs: int
) -> None:
    num_steps = -(-epochs * num_blocks // batch_size)
    stream = np.concatenate(
        [step_block_indices(seed, step, batch_size, num_blocks) for step in range(num_steps)]
    )
    assert len(stream) == num_steps * batch_size
    for epoch in range(epochs):
        blocks = stream[epoch * num_blocks : (epoch + 1) * num_blocks]
        assert sorted(blocks) == list(range(num_blocks))


@given(seed=seeds, num_blocks=st.integers(900, 5000), epoch=st.integers(0, 2**40))
def test_a_late_epoch_of_many_blocks_has_each_of_them_once(
    seed: int, num_blocks: int, epoch: int
) -> None:
    assert np.array_equal(np.sort(epoch_order(seed, epoch, num_blocks)), np.arange(num_blocks))


def test_a_hundred_million_blocks_are_not_listed_for_a_step_of_four() -> None:
    blocks = step_block_indices(3, 10**9, batch_size=4, num_blocks=10**8)  # their list: 0.8 GB
    assert len(set(blocks.tolist())) == 4
    assert 0 <= blocks.min() <= blocks.max() < 10**8


@given(seed=st.integers(0, 1000), small=st.integers(1, 7), factor=st.integers(1, 5))
def test_batch_size_does_not_change_the_order(seed: int, small: int, factor: int) -> None:
    large = step_block_indices(seed, 3, small * factor, 23)
    parts = [step_block_indices(seed, 3 * factor + part, small, 23) for part in range(factor)]
    assert np.array_equal(large, np.concatenate(parts))


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {tuple(epoch_order(seed, epoch, 40)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


# Each epoch is one draw: 20,000 of them. Chi-square minus its mean in standard deviations; the
# numbers are the same in every run, and right ones stay below 4.
@pytest.mark.parametrize("num_blocks", [2, 3, 4, 5, 6, 7, 9, 12, 16, 17, 33])
def test_every_block_is_equally_likely_at_every_place(num_blocks: int) -> None:
    orders = _many_orders(num_blocks)
    for place in range(num_blocks):
        assert _excess(np.bincount(orders[:, place], minlength=num_blocks)) < 4


@pytest.mark.parametrize("num_blocks", [3, 4, 5, 6, 7, 9, 16, 17])
def test_every_pair_of_blocks_is_equally_likely_at_neighbouring_places(num_blocks: int) -> None:
    orders = _many_orders(num_blocks)
    for place in range(num_blocks - 1):
        pairs = orders[:, place] * num_blocks + orders[:, place + 1]
        counts = np.bincount(pairs, minlength=num_blocks**2).reshape(num_blocks, num_blocks)
        assert _excess(counts[~np.eye(num_blocks, dtype=bool)]) < 4


@pytest.mark.parametrize("num_blocks", [3, 4, 5, 6])
def test_every_order_of_a_few_blocks_is_equally_likely(num_blocks: int) -> None:
    found = [tuple(order) for order in _many_orders(num_blocks).tolist()]
    numbers = {order: number for number, order in enumerate(permutations(range(num_blocks)))}
    counts = np.bincount([numbers[order] for order in found], minlength=len(numbers))
    assert _excess(counts) < 4


def test_order_is_the_same_in_every_version() -> None:
    assert epoch_order(0, 0, 8).tolist() == ORDER_0_0
    assert epoch_order(7, 3, 11).tolist() == ORDER_7_3


def _many_orders(num_blocks: int, count: int = 20_000) -> NDArray[np.int64]:
    return step_block_indices(1, 0, count * num_blocks, num_blocks).reshape(count, num_blocks)


def _excess(counts: NDArray[np.int64]) -> float:
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return (chi_square - freedom) / float(np.sqrt(2 * freedom))


# Computed apart, in Python's integers. A change would give every sweep another order of samples.
ORDER_0_0 = [1, 2, 3, 5, 6, 0, 4, 7]
ORDER_7_3 = [5, 3, 2, 0, 10, 7, 1, 4, 6, 9, 8]

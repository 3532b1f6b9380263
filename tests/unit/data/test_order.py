import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.order import epoch_order, step_block_indices


@given(
    seed=st.integers(0, 2**70),
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


@given(seed=st.integers(0, 1000), small=st.integers(1, 7), factor=st.integers(1, 5))
def test_batch_size_does_not_change_the_order(seed: int, small: int, factor: int) -> None:
    large = step_block_indices(seed, 3, small * factor, 23)
    parts = [step_block_indices(seed, 3 * factor + part, small, 23) for part in range(factor)]
    assert np.array_equal(large, np.concatenate(parts))


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {tuple(epoch_order(seed, epoch, 40)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_order_is_the_same_in_every_version() -> None:
    assert epoch_order(0, 0, 8).tolist() == ORDER_0_0
    assert epoch_order(7, 3, 8).tolist() == ORDER_7_3


def test_first_places_are_uniform() -> None:
    firsts = [int(epoch_order(seed, 0, 10)[0]) for seed in range(2000)]
    counts = np.bincount(firsts, minlength=10)
    assert counts.min() > 140  # 200 expected, 4.5 standard deviations below
    assert counts.max() < 260


# Computed apart, in Python's integers. A change would give every sweep another order of samples.
ORDER_0_0 = [0, 7, 2, 5, 4, 6, 3, 1]
ORDER_7_3 = [2, 3, 1, 6, 5, 7, 0, 4]

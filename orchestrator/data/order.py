"""The order of samples as a pure function of seed and step; nothing but the step is ever saved.

In: seed, step, sizes. Out: block indices. Every block comes exactly once per epoch.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# The constants of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
# 2014). Hashing and sorting is the same in every version of numpy; its own shuffles may change.
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
MASK_64 = (1 << 64) - 1

# Each slot of a pack has its own seed and may stand at the border of two epochs.
CACHED_EPOCHS = 64


@lru_cache(maxsize=CACHED_EPOCHS)
def epoch_order(seed: int, epoch: int, num_blocks: int) -> NDArray[np.int64]:
    """A permutation of the blocks; read-only, for it is shared."""
    stream = _splitmix64(_splitmix64(_uint64(seed)) + _uint64(epoch))
    hashes = _splitmix64(stream + GOLDEN_GAMMA * np.arange(num_blocks, dtype=np.uint64))
    order = np.argsort(hashes, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def step_block_indices(seed: int, step: int, batch_size: int, num_blocks: int) -> NDArray[np.int64]:
    """The blocks of one optimizer step: positions of the endless stream of epochs."""
    start = step * batch_size
    epochs = range(start // num_blocks, (start + batch_size - 1) // num_blocks + 1)
    stream = np.concatenate([epoch_order(seed, epoch, num_blocks) for epoch in epochs])
    offset = start - epochs[0] * num_blocks
    return stream[offset : offset + batch_size]


def _uint64(number: int) -> NDArray[np.uint64]:
    return np.array([number & MASK_64], dtype=np.uint64)


def _splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Arrays only: numpy lets them overflow in silence, as is wanted here."""
    values = values + GOLDEN_GAMMA
    values = (values ^ (values >> np.uint64(30))) * MIX_1
    values = (values ^ (values >> np.uint64(27))) * MIX_2
    return values ^ (values >> np.uint64(31))

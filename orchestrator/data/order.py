"""The order of samples as a pure function of seed and step; nothing but the step is ever saved.

In: seed, step, sizes. Out: block indices. Every block comes exactly once per epoch.

The order of an epoch is a pseudo-random permutation: a Feistel network, keyed by seed and epoch,
gives the block at each place by itself. So no list of blocks is shuffled, sorted or kept, and a
step of a hundred million blocks costs what a step of a hundred does.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

UInts = NDArray[np.uint64]

# The constants of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
# 2014). It is the same in every version of numpy; numpy's own shuffles may change.
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
MASK_64 = (1 << 64) - 1
HALF_BITS = np.uint64(32)

# A few rounds look random where a half has many values (Luby, Rackoff, 1988); few blocks need more.
# Every order of N <= 6 blocks comes equally often but for 4e-4 in sum; with 16 rounds 6e-3, with 8
# 0.09 (total variation over all keys, computed exactly).
ROUNDS = 24

# numpy takes nearly as long for one position as for a thousand: half a millisecond.
STRETCH = 1024
CACHED_STRETCHES = 64  # each slot of a pack has its own seed and may stand at a border of two


def step_block_indices(seed: int, step: int, batch_size: int, num_blocks: int) -> NDArray[np.int64]:
    """The blocks of one optimizer step: positions of the endless stream of epochs.

    Step `s` takes the positions from `s * batch_size` on. So one integer resumes the stream: the
    number of steps done. Neither what died before has a part in it nor the number of workers, which
    only share out each step's blocks (training/feed.py).
    """
    start = step * batch_size
    numbers = range(start // STRETCH, (start + batch_size - 1) // STRETCH + 1)
    stream = np.concatenate([_stretch(seed, number, num_blocks) for number in numbers])
    offset = start - numbers[0] * STRETCH
    return stream[offset : offset + batch_size]


@lru_cache(maxsize=CACHED_STRETCHES)
def _stretch(seed: int, number: int, num_blocks: int) -> NDArray[np.int64]:
    """The blocks at positions `number * STRETCH` and after; read-only, for it is shared."""
    start = number * STRETCH
    positions = np.arange(start, start + STRETCH, dtype=np.uint64)
    epochs, places = np.divmod(positions, np.uint64(num_blocks))
    keys = _splitmix64(_splitmix64(np.array([seed & MASK_64], dtype=np.uint64)) + epochs)
    blocks = _permuted(places, keys, num_blocks).astype(np.int64)
    blocks.flags.writeable = False
    return blocks


def _permuted(places: UInts, keys: UInts, num_blocks: int) -> UInts:
    """Cycle walking: what falls outside is permuted again until it is a block."""
    # A rectangle hardly larger than `num_blocks`, so that few fall outside; halves of whole bits
    # could make it four times as large. (Black, Rogaway: Ciphers with arbitrary finite domains,
    # 2002.)
    width = math.isqrt(num_blocks - 1) + 1
    height = -(-num_blocks // width)
    blocks = _encipher(places, keys, width, height)
    while (outside := np.flatnonzero(blocks >= num_blocks)).size:
        blocks[outside] = _encipher(blocks[outside], keys[outside], width, height)
    return blocks


def _encipher(values: UInts, keys: UInts, width: int, height: int) -> UInts:
    """A permutation of 0 to width * height - 1 for each key."""
    sizes = np.array([width, height], dtype=np.uint64)
    halves: list[UInts] = list(np.divmod(values, sizes[1]))
    for number in range(ROUNDS):
        side = number % 2
        # Number (round, other half) of the key's stream of random numbers.
        place = halves[1 - side] + np.uint64(number << 32)
        drawn = _splitmix64(keys + place * GOLDEN_GAMMA) >> HALF_BITS
        halves[side] = (halves[side] + (drawn * sizes[side] >> HALF_BITS)) % sizes[side]
    enciphered: UInts = halves[0] * sizes[1] + halves[1]
    return enciphered


def _splitmix64(values: UInts) -> UInts:
    """Arrays only: numpy lets them overflow in silence, as is wanted here."""
    values = values + GOLDEN_GAMMA
    values = (values ^ (values >> np.uint64(30))) * MIX_1
    values = (values ^ (values >> np.uint64(27))) * MIX_2
    return values ^ (values >> np.uint64(31))

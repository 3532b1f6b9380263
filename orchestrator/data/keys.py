"""Which examples belong to which role: each example's key is a hash of its content, each role a
range of keys.

In: examples' keys. Out: ranges of keys. So an example's side of the split depends on nothing but
itself, equal examples are on one side, and "the first n by content hash" is the range that ends
behind the n-th smallest key. Pure.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ORDER_BYTES = 8
END_OF_KEYS = 1 << 64

KeyOrders = NDArray[np.uint64]


@dataclass(frozen=True)
class KeyRange:
    """Orders from `start` up to, but not including, `end`."""

    start: int = 0
    end: int = END_OF_KEYS

    def __contains__(self, order: int) -> bool:
        return self.start <= order < self.end

    def mask(self, orders: KeyOrders) -> NDArray[np.bool_]:
        if self.end <= self.start:
            return np.zeros(len(orders), dtype=np.bool_)
        # The end may be 2^64, which no uint64 holds.
        return (orders >= np.uint64(self.start)) & (orders <= np.uint64(self.end - 1))

    @property
    def share(self) -> float:
        """The part of all examples that is expected in it."""
        return (self.end - self.start) / END_OF_KEYS

    def first(self, fraction: float) -> "KeyRange":
        if fraction >= 1:  # which a float would only come near
            return self
        return KeyRange(self.start, self.start + int((self.end - self.start) * fraction))


def key_order(key: bytes) -> int:
    """The key's place among all keys: its first 64 bits. Two of 100 million examples share theirs
    with a probability of 3 in 10,000."""
    return int.from_bytes(key[:ORDER_BYTES], "big")


def key_orders(keys: NDArray[np.uint8]) -> KeyOrders:
    """Of keys [n, 32]."""
    first = np.ascontiguousarray(keys[:, :ORDER_BYTES])
    return first.view(">u8").ravel().astype(np.uint64)


def split_ranges(held_out_fraction: float) -> tuple[KeyRange, KeyRange]:
    """The key ranges of train and held-out examples."""
    held_out = KeyRange().first(held_out_fraction)
    return KeyRange(start=held_out.end), held_out

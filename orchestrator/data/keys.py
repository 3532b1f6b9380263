"""Which rows belong to which role: each row's key is a hash of its content, each role a key range.

In: rows. Out: keys and ranges of keys. So a row's side of the split depends on nothing but itself,
and "the first n by content hash" is the range that ends at the n-th smallest key.
"""

import hashlib
import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.data.slices import Row, Slice
from orchestrator.data.sources import read_slice

AFTER_ALL_KEYS = "g"  # sorts after every hex digit
SPLIT_DIGITS = 16  # 64 bits of the key decide the split


@dataclass(frozen=True)
class KeyRange:
    """Keys from `start` up to, but not including, `end`, compared as text."""

    start: str = ""
    end: str = AFTER_ALL_KEYS

    def __contains__(self, key: str) -> bool:
        return self.start <= key < self.end


@dataclass(frozen=True)
class KeyTask:
    """Find the `count` smallest keys of a slice within a range."""

    part: Slice
    keys: KeyRange
    count: int


def row_key(row: Row) -> str:
    """SHA-256 of the row's canonical JSON; values that JSON does not know (dates) as text."""
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()


def split_ranges(held_out_fraction: float) -> tuple[KeyRange, KeyRange]:
    """The key ranges of train and held-out rows."""
    border = f"{int(held_out_fraction * 16**SPLIT_DIGITS):0{SPLIT_DIGITS}x}"
    return KeyRange(start=border), KeyRange(end=border)


def smallest_keys(task: KeyTask) -> list[str]:
    """In ascending order; never more than the slice has rows."""
    keys = (row_key(row) for _, row in read_slice(task.part))
    return heapq.nsmallest(task.count, (key for key in keys if key in task.keys))


def capped_range(keys: KeyRange, found: Iterable[list[str]], count: int) -> KeyRange:
    """The part of the range that holds its `count` smallest keys, given those of each slice."""
    smallest = heapq.nsmallest(count, heapq.merge(*found))
    if len(smallest) < count:
        return keys
    return KeyRange(keys.start, smallest[-1] + "0")  # the next text after the last key

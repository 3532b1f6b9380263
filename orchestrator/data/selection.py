"""Choose the examples of each role: split, weights, repeats, caps.

In: the sources' slices and, where a choice depends on all examples, the key orders of each slice.
Out: portions, which say of each slice which of its examples to take. Pure, but for `slice_orders`,
the task that reads a slice's keys.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.formats import RowFormat, example_key
from orchestrator.data.keys import KeyOrders, KeyRange, key_order, split_ranges
from orchestrator.data.manifest import Repeats, Role
from orchestrator.data.slices import RowProblem, Slice, read_options
from orchestrator.data.sources import place, read_slice
from orchestrator.data_config import DataConfig
from orchestrator.errors import DataError


@dataclass(frozen=True)
class WeighedSlice:
    """A slice of one of the sources, with what the source says of it."""

    part: Slice
    form: RowFormat
    weight: float = 1.0
    number: int = 0
    """Its place among all slices: the same one may be there twice."""


@dataclass(frozen=True, eq=False)
class Portion:
    """Some examples of one slice."""

    part: Slice
    form: RowFormat
    keys: KeyRange
    """Those with such a key, where `taken` does not say which."""
    taken: NDArray[np.bool_] | None = None
    """Of the slice's usable rows, in order."""
    again: bool = False
    """Its examples are in an epoch already: the source's weight is over 1."""
    expected_bytes: float = 0.0

    def takes(self, number: int, order: int) -> bool:
        """Whether usable row `number` of the slice, counted from 0, is among them."""
        return bool(self.taken[number]) if self.taken is not None else order in self.keys


@dataclass(frozen=True)
class KeyTask:
    part: Slice
    form: RowFormat
    config: DataConfig


def slice_orders(task: KeyTask) -> KeyOrders:
    """The key order of each usable row of a slice.

    Raises:
        DataError: with file and line, for a row that cannot be used, unless these are skipped.
    """
    orders = []
    for number, row in read_slice(task.part, read_options(task.config)):
        try:
            if isinstance(row, RowProblem):
                raise row
            orders.append(key_order(example_key(row, task.form)))
        except RowProblem as problem:
            if task.config.on_bad_row == "error":
                raise DataError(f"{place(task.part, number)}: {problem}") from problem
    return np.array(orders, dtype=np.uint64)


def needs_orders(config: DataConfig, role: Role) -> bool:
    """Whether the role's choice depends on all examples of its sources."""
    train = config.max_train_examples is not None or config.deduplicate or config.decontaminate
    return train or (role == "held_out" and config.max_held_out_examples is not None)


def select_by_range(
    config: DataConfig, role: Role, slices: Sequence[WeighedSlice]
) -> list[Portion]:
    """The choice for which no example has to be read."""
    keys = _role_range(config, role)
    portions = []
    for number, item in _passes(slices):
        chosen = keys.first(min(1.0, item.weight - number))
        num_bytes = item.part.num_bytes * chosen.share
        portions.append(Portion(item.part, item.form, chosen, None, number > 0, num_bytes))
    return portions


def select_held_out(
    config: DataConfig, slices: Sequence[WeighedSlice], orders: Sequence[KeyOrders]
) -> tuple[list[Portion], KeyOrders]:
    """The portions, and the orders of the examples in them."""
    keys = _role_range(config, "held_out")
    joined = _joined(orders)
    taken = keys.mask(joined)
    if config.max_held_out_examples is not None:
        taken = _capped(taken, config.max_held_out_examples, (joined,))
    return _portions(config, slices, orders, taken, keys), joined[taken]


def select_train(
    config: DataConfig,
    slices: Sequence[WeighedSlice],
    orders: Sequence[KeyOrders],
    held_out: KeyOrders,
) -> tuple[list[Portion], Repeats]:
    """The portions, and the repeats among their examples. `held_out`: orders of the held-out ones.

    Of equal examples the first one stays, and the cap counts those that stay.
    """
    keys = _role_range(config, "train")
    joined = _joined(orders)
    parts = [
        keys.first(min(1.0, item.weight)).mask(found)
        for item, found in zip(slices, orders, strict=True)
    ]
    taken = np.concatenate([np.zeros(0, np.bool_), *parts])
    duplicate, contaminated = _later_ones(joined, taken), taken & np.isin(joined, held_out)
    left_out = (duplicate & config.deduplicate) | (contaminated & config.decontaminate)
    taken &= ~left_out
    if config.max_train_examples is not None:
        places = _joined(
            [_places(item, keys, found) for item, found in zip(slices, orders, strict=True)]
        )
        taken = _capped(taken, config.max_train_examples, (joined, places))
        last = int(places[taken].max()) if taken.any() else 0
        keys = KeyRange(keys.start, min(keys.end, keys.start + last + 1))
        left_out &= places <= np.uint64(last)
    seen = taken | left_out
    counts = Repeats(int((duplicate & seen).sum()), int((contaminated & seen).sum()))
    return _portions(config, slices, orders, taken, keys), counts


def count_repeats(train: Sequence[KeyOrders], held_out: Sequence[KeyOrders]) -> Repeats:
    """Of the examples that became documents."""
    orders = _joined(train)
    duplicates = len(orders) - len(np.unique(orders))
    return Repeats(duplicates, int(np.isin(orders, _joined(held_out)).sum()))


def _role_range(config: DataConfig, role: Role) -> KeyRange:
    if config.held_out is not None:
        return KeyRange()
    train, held_out = split_ranges(config.held_out_fraction)
    return train if role == "train" else held_out


def _passes(slices: Sequence[WeighedSlice]) -> Iterator[tuple[int, WeighedSlice]]:
    """All slices once, then those that come a second time, and so on."""
    most = math.ceil(max((item.weight for item in slices), default=0.0))
    for number in range(most):
        yield from ((number, item) for item in slices if item.weight > number)


def _portions(
    config: DataConfig,
    slices: Sequence[WeighedSlice],
    orders: Sequence[KeyOrders],
    taken: NDArray[np.bool_],
    keys: KeyRange,
) -> list[Portion]:
    """Of each slice what is taken of it; in a last, partial pass the first of that by hash."""
    borders = np.cumsum([len(found) for found in orders])[:-1]
    masks = dict(enumerate(np.split(taken, borders)))
    numbered = [replace(item, number=number) for number, item in enumerate(slices)]
    portions = []
    for number, item in _passes(numbered):
        mask, found = masks[item.number], orders[item.number]
        if number:
            mask = mask & keys.first(min(1.0, item.weight - number)).mask(found)
        share = np.count_nonzero(mask) / max(1, len(mask))
        # A slice of which nothing is taken may still have rows to report.
        if share or (config.on_bad_row == "skip" and not number):
            num_bytes = item.part.num_bytes * share
            portions.append(Portion(item.part, item.form, keys, mask, number > 0, num_bytes))
    return portions


def _places(item: WeighedSlice, keys: KeyRange, orders: KeyOrders) -> KeyOrders:
    """How far from the start of the role's range each example would be, if its source's part of
    that were as wide as the range. So the first of all sources' are the same part of each one's.

    Examples outside the source's part are at 0. Doubles divide alike on every machine (IEEE 754).
    """
    part = keys.first(min(1.0, item.weight))
    offsets = np.where(part.mask(orders), orders - np.uint64(keys.start), np.uint64(0))
    if item.weight >= 1:  # a double would round it
        return offsets
    last_double = np.nextafter(2.0**64, 0)  # that a uint64 holds
    return np.minimum(offsets / np.float64(item.weight), last_double).astype(np.uint64)


def _capped(taken: NDArray[np.bool_], count: int, keys: tuple[KeyOrders, ...]) -> NDArray[np.bool_]:
    """The first `count` of those taken by the last of the keys, then by the one before it, and of
    equal ones by their order."""
    inside = np.flatnonzero(taken)
    kept = inside[np.lexsort([key[inside] for key in keys])[:count]]
    capped = np.zeros_like(taken)
    capped[kept] = True
    return capped


def _later_ones(orders: KeyOrders, inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Those inside that are equal to an earlier one inside."""
    places = np.flatnonzero(inside)
    _, first = np.unique(orders[places], return_index=True)
    later = inside.copy()
    later[places[first]] = False
    return later


def _joined(orders: Sequence[KeyOrders]) -> KeyOrders:
    return np.concatenate([np.empty(0, np.uint64), *orders])

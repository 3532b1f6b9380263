"""Choose the examples of each role: split, weights, repeats, caps.

In: the sources' slices and, where a choice depends on all examples, the key orders of each slice.
Out: portions, which say of each slice which of its examples to take. Pure, but for `slice_orders`,
the task that reads a slice's keys.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.formats import RowFormat, example_key
from orchestrator.data.keys import KeyOrders, KeyRange, capped, key_order, split_ranges
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


@dataclass(frozen=True, eq=False)
class Portion:
    """Some examples of one slice."""

    part: Slice
    form: RowFormat
    keys: KeyRange
    left_out: NDArray[np.bool_] | None = None
    """Of the slice's usable rows, in order: those that repeat an example taken elsewhere."""
    again: bool = False
    """Its examples are in an epoch already: the source's weight is over 1."""
    expected_bytes: float = 0.0


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
    return [
        Portion(item.part, item.form, chosen, None, number > 0, item.part.num_bytes * chosen.share)
        for number, item, chosen in _passes(slices, keys, keys)
    ]


def select_held_out(
    config: DataConfig, slices: Sequence[WeighedSlice], orders: Sequence[KeyOrders]
) -> tuple[list[Portion], KeyOrders]:
    """The portions, and the orders of the examples in them."""
    keys = _role_range(config, "held_out")
    joined = _joined(orders)
    if config.max_held_out_examples is not None:
        keys = capped(keys, joined[keys.mask(joined)], config.max_held_out_examples)
    portions = [
        _sized(Portion(item.part, item.form, keys), found)
        for item, found in zip(slices, orders, strict=True)
    ]
    return [portion for portion in portions if portion.expected_bytes], joined[keys.mask(joined)]


def select_train(
    config: DataConfig,
    slices: Sequence[WeighedSlice],
    orders: Sequence[KeyOrders],
    held_out: KeyOrders,
) -> tuple[list[Portion], Repeats]:
    """The portions, and the repeats among their examples. `held_out`: orders of the held-out ones.

    Of equal examples the first one stays, and the cap counts those that stay.
    """
    whole = _role_range(config, "train")
    joined = _joined(orders)
    inside = np.concatenate(
        [
            whole.first(min(1.0, item.weight)).mask(found)
            for item, found in zip(slices, orders, strict=True)
        ]
    )
    duplicate = _later_ones(joined, inside)
    contaminated = inside & np.isin(joined, held_out)
    left_out = (duplicate & config.deduplicate) | (contaminated & config.decontaminate)
    keys = whole
    if config.max_train_examples is not None:
        keys = capped(whole, joined[inside & ~left_out], config.max_train_examples)
    borders = np.cumsum([len(found) for found in orders])[:-1]
    by_slice = {
        item: (found, repeats if repeats.any() else None)
        for item, found, repeats in zip(slices, orders, np.split(left_out, borders), strict=True)
    }
    portions = []
    for number, item, chosen in _passes(slices, whole, keys):
        found, repeats = by_slice[item]
        portion = Portion(item.part, item.form, chosen, repeats, number > 0)
        portions.append(_sized(portion, found))
    capped_to = keys.mask(joined)
    counts = Repeats(int((duplicate & capped_to).sum()), int((contaminated & capped_to).sum()))
    return [portion for portion in portions if portion.expected_bytes], counts


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


def _passes(
    slices: Sequence[WeighedSlice], whole: KeyRange, keys: KeyRange
) -> list[tuple[int, WeighedSlice, KeyRange]]:
    """All slices once, then those that come a second time, and so on: number, slice, its keys.

    `keys` is what a cap left of `whole`. A source of weight 0.5 gives half of the whole range, of
    which the cap takes the first; one of weight 1.5 gives what is capped and then half of that.
    """
    most = math.ceil(max((item.weight for item in slices), default=0.0))
    passes = []
    for number in range(most):
        for item in slices:
            share = min(1.0, item.weight - number)
            if share <= 0:
                continue
            if number == 0:
                chosen = KeyRange(keys.start, min(keys.end, whole.first(share).end))
            else:
                chosen = keys.first(share)
            passes.append((number, item, chosen))
    return passes


def _sized(portion: Portion, orders: KeyOrders) -> Portion:
    """With the bytes that its examples are expected to have; 0 if it has none."""
    taken = portion.keys.mask(orders)
    if portion.left_out is not None:
        taken &= ~portion.left_out
    share = np.count_nonzero(taken) / max(1, len(orders))
    num_bytes = max(1.0, portion.part.num_bytes * share) if share else 0.0
    return Portion(
        portion.part, portion.form, portion.keys, portion.left_out, portion.again, num_bytes
    )


def _later_ones(orders: KeyOrders, inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Those inside that are equal to an earlier one inside."""
    places = np.flatnonzero(inside)
    _, first = np.unique(orders[places], return_index=True)
    later = inside.copy()
    later[places[first]] = False
    return later


def _joined(orders: Sequence[KeyOrders]) -> KeyOrders:
    return np.concatenate([np.empty(0, np.uint64), *orders])

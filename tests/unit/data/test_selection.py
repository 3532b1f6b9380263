"""Which examples each role takes, from the order of their keys alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.formats import row_format
from orchestrator.data.keys import END_OF_KEYS, KeyOrders, split_ranges
from orchestrator.data.selection import (
    Portion,
    WeighedSlice,
    count_repeats,
    select_by_range,
    select_held_out,
    select_train,
)
from orchestrator.data.slices import Slice
from orchestrator.data_config import DataConfig

HALF = END_OF_KEYS // 2


def _config(**settings: Any) -> DataConfig:
    return DataConfig.model_validate({"train": "a.jsonl", "held_out": "b.jsonl"} | settings)


def _slices(orders: Sequence[KeyOrders], weights: Sequence[float] = ()) -> list[WeighedSlice]:
    config = _config()
    form = row_format(config, config.train_sources[0])
    weights = weights or [1.0] * len(orders)
    return [
        WeighedSlice(Slice(f"{number}.jsonl", "", 0, 100, 100), form, weight)
        for number, weight in zip(range(len(orders)), weights, strict=True)
    ]


def _orders(*slices: Sequence[int]) -> list[KeyOrders]:
    return [np.array(found, dtype=np.uint64) for found in slices]


def _taken(portions: Sequence[Portion], orders: Sequence[KeyOrders]) -> list[int]:
    """What a reader of the portions would take, in its order."""
    taken = []
    for portion in portions:
        found = orders[int(portion.part.file.removesuffix(".jsonl"))]
        assert portion.expected_bytes > 0
        taken += [
            order for number, order in enumerate(found.tolist()) if portion.takes(number, order)
        ]
    return taken


def _nothing() -> KeyOrders:
    return np.empty(0, dtype=np.uint64)


def test_of_equal_examples_the_first_stays() -> None:
    orders = _orders([5, 7, 5], [7, 9], [5])
    config = _config(deduplicate=True)
    portions, repeats = select_train(config, _slices(orders), orders, _nothing())
    assert _taken(portions, orders) == [5, 7, 9]
    assert repeats.duplicates == 3
    assert [portion.part.file for portion in portions] == ["0.jsonl", "1.jsonl"]


def test_repeats_are_counted_where_they_stay() -> None:
    orders = _orders([5, 7, 5], [7, 9])
    portions, repeats = select_train(
        _config(max_train_examples=10), _slices(orders), orders, np.array([9], dtype=np.uint64)
    )
    assert _taken(portions, orders) == [5, 7, 5, 7, 9]
    assert (repeats.duplicates, repeats.contaminated) == (2, 1)
    assert repeats == count_repeats(orders, [np.array([9, 4], dtype=np.uint64)])


def test_examples_of_the_held_out_set_are_left_out_on_request() -> None:
    orders = _orders([1, 2], [3, 2])
    held_out = np.array([2], dtype=np.uint64)
    portions, repeats = select_train(_config(decontaminate=True), _slices(orders), orders, held_out)
    assert _taken(portions, orders) == [1, 3]
    assert repeats.contaminated == 2


def test_the_cap_counts_what_deduplication_leaves() -> None:
    orders = _orders([1, 1, 2, 2], [3, 4])
    config = _config(deduplicate=True, max_train_examples=3)
    portions, _ = select_train(config, _slices(orders), orders, _nothing())
    assert sorted(_taken(portions, orders)) == [1, 2, 3]


def test_a_held_out_cap_takes_the_first_by_hash() -> None:
    orders = _orders([50, 10], [40, 20, 30])
    config = _config(max_held_out_examples=3)
    portions, chosen = select_held_out(config, _slices(orders), orders)
    assert sorted(_taken(portions, orders)) == sorted(chosen.tolist()) == [10, 20, 30]


@pytest.mark.parametrize(
    ("weight", "times"), [(1.0, (1, 1)), (2.0, (2, 2)), (0.5, (1, 0)), (1.5, (2, 1)), (3.0, (3, 3))]
)
@pytest.mark.parametrize("by_range", [True, False])
def test_a_weight_is_how_often_an_example_comes(
    weight: float, times: tuple[int, int], by_range: bool
) -> None:
    low, high = 7, HALF + 7
    orders = _orders([high, low], [low + 1, high + 1])
    slices = _slices(orders, [weight, 1.0])
    portions = (
        select_by_range(_config(), "train", slices)
        if by_range
        else select_train(_config(deduplicate=True), slices, orders, _nothing())[0]
    )
    taken = _taken(portions, orders)
    assert (taken.count(low), taken.count(high)) == times
    assert (taken.count(low + 1), taken.count(high + 1)) == (1, 1)
    again = [portion for portion in portions if portion.again]
    assert len(_taken(again, orders)) == sum(times) - sum(min(1, count) for count in times)


def _random_orders(*counts: int) -> list[KeyOrders]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, END_OF_KEYS, count, dtype=np.uint64) for count in counts]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1.0, 0.1), (909, 91)),
        ((0.1, 1.0), (91, 909)),
        ((0.5, 0.25), (667, 333)),
        ((2.0, 0.5), (667, 333)),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"held_out": None, "held_out_fraction": 0.3}])
def test_a_cap_leaves_the_mixture_as_its_weights_say(
    weights: tuple[float, float], expected: tuple[int, int], settings: dict[str, Any]
) -> None:
    """Different examples: a weight above 1 has as many of these as a weight of 1."""
    orders = _random_orders(100_000, 100_000)
    config = _config(max_train_examples=1000, **settings)
    portions, _ = select_train(config, _slices(orders, weights), orders, _nothing())
    masks = [portion.taken for portion in portions if not portion.again]
    taken = [np.sort(found[mask]) for found, mask in zip(orders, masks, strict=True)]
    assert sum(map(len, taken)) == 1000
    assert [len(keys) for keys in taken] == pytest.approx(expected, abs=40)
    start = split_ranges(0.3)[0].start if settings else 0
    for found, keys in zip(orders, taken, strict=True):
        assert np.array_equal(keys, np.sort(found[found >= start])[: len(keys)])


def test_a_cap_that_all_sources_pass_cuts_each_at_the_same_part_of_its_own() -> None:
    tenth = END_OF_KEYS // 10
    orders = _orders([tenth, 4 * tenth, 7 * tenth], [tenth // 10 + 5, tenth // 2, 2 * tenth])
    config = _config(max_train_examples=3)
    portions, _ = select_train(config, _slices(orders, [1.0, 0.1]), orders, _nothing())
    assert _taken(portions, orders) == [tenth, 4 * tenth, tenth // 10 + 5]


def test_a_cap_counts_an_example_that_comes_again_once() -> None:
    orders = _random_orders(10_000, 10_000)
    config = _config(max_train_examples=1000)
    portions, _ = select_train(config, _slices(orders, [1.5, 1.0]), orders, _nothing())
    taken = _taken(portions, orders)
    assert len(set(taken)) == 1000
    assert len(taken) == pytest.approx(1250, abs=40)


KEYS = st.lists(st.integers(0, 40).map(lambda n: n * (END_OF_KEYS // 41)), max_size=12)


@given(
    st.lists(KEYS, min_size=1, max_size=4),
    KEYS,
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(1, 20),
)
def test_the_choice_is_what_a_plain_reading_in_order_gives(
    keys: list[list[int]],
    held_out: list[int],
    deduplicate: bool,
    decontaminate: bool,
    cap: int | None,
) -> None:
    orders = _orders(*keys)
    config = _config(deduplicate=deduplicate, decontaminate=decontaminate, max_train_examples=cap)
    portions, repeats = select_train(
        config, _slices(orders), orders, np.array(held_out, dtype=np.uint64)
    )
    seen: set[int] = set()
    kept = []
    for key in (key for found in keys for key in found):
        repeated = (deduplicate and key in seen) or (decontaminate and key in held_out)
        seen.add(key)
        if not repeated:
            kept.append(key)
    if cap is not None:
        first = sorted(range(len(kept)), key=lambda place: (kept[place], place))[:cap]
        kept = [kept[place] for place in sorted(first)]
    assert _taken(portions, orders) == kept
    if cap is None:
        every = [key for found in keys for key in found]
        assert repeats.duplicates == len(every) - len(set(every))
        assert repeats.contaminated == sum(key in held_out for key in every)


def test_a_file_that_is_listed_twice_keeps_its_first_examples() -> None:
    orders = _orders([1, 2], [1, 2])
    once = _slices(orders)[0]
    portions, repeats = select_train(_config(deduplicate=True), [once, once], orders, _nothing())
    assert [portion.taken.tolist() for portion in portions if portion.taken is not None] == [
        [True, True]
    ]
    assert repeats.duplicates == 2


def test_a_cap_is_never_passed_by_equal_examples() -> None:
    orders = _orders([7, 7, 7], [7, 3, 3])
    portions, _ = select_train(_config(max_train_examples=3), _slices(orders), orders, _nothing())
    assert sorted(_taken(portions, orders)) == [3, 3, 7]


@given(st.floats(1e-30, 1 - 1e-9), st.sampled_from([1e-9, 0.3, 1.0, 1.7]))
def test_any_fraction_and_weight_can_be_chosen_by(fraction: float, weight: float) -> None:
    config = DataConfig(
        train="a.jsonl", held_out_fraction=fraction, deduplicate=True, max_train_examples=2
    )
    orders = _orders([0, 1, HALF, END_OF_KEYS - 1])
    slices = _slices(orders, [weight])
    select_by_range(config, "train", slices)
    _, chosen = select_held_out(config, _slices(orders), orders)
    portions, _ = select_train(config, slices, orders, chosen)
    assert not set(_taken(portions, orders)) & set(chosen.tolist())


def test_a_slice_with_nothing_to_take_is_kept_for_the_bad_rows_in_it() -> None:
    orders = _orders([1], [])
    for on_bad_row, files in (("skip", ["0.jsonl", "1.jsonl"]), ("error", ["0.jsonl"])):
        config = _config(deduplicate=True, on_bad_row=on_bad_row)
        portions, _ = select_train(config, _slices(orders), orders, _nothing())
        assert [portion.part.file for portion in portions] == files


def test_the_split_depends_on_the_key_alone() -> None:
    config = DataConfig(train="a.jsonl", held_out_fraction=0.25, max_held_out_examples=None)
    draw = np.random.default_rng(0)
    orders = [draw.integers(0, END_OF_KEYS, 500, dtype=np.uint64)]
    train = _taken(select_by_range(config, "train", _slices(orders)), orders)
    held_out = _taken(select_by_range(config, "held_out", _slices(orders)), orders)
    assert sorted(train + held_out) == sorted(orders[0].tolist())
    assert max(held_out) < END_OF_KEYS // 4 <= min(train)

import contextlib
import json
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.formats import Tokenizer, example_key, row_format
from orchestrator.data.keys import key_order, split_ranges
from orchestrator.data.manifest import Manifest, fetch_manifest, load_manifest
from orchestrator.data.prepare import prepare
from orchestrator.data.reader import IGNORED, BlockReader
from orchestrator.data.shards import bad_rows, prepare_shard
from orchestrator.data_config import DataConfig
from orchestrator.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
WriteRows = Callable[..., Path]

ROWS = [{"prompt": f"{i}?", "completion": "x" * (1 + i % 23)} for i in range(200)]


def _config(train: Path, **settings: Any) -> DataConfig:
    defaults = {"block_length": 64, "slice_bytes": 1200, "max_held_out_examples": None}
    return DataConfig.model_validate({"train": str(train), **defaults, **settings})


def _keys(manifest: Manifest) -> list[str]:
    return sorted(BlockReader(manifest).document_keys)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_backwards(function: Callable[[T], R], tasks: Sequence[T], /) -> Iterator[R]:
    copies = [pickle.loads(pickle.dumps(task)) for task in tasks]
    results = [pickle.loads(pickle.dumps(function(task))) for task in reversed(copies)]
    return reversed(results)


def run_until_crash(function: Callable[[T], R], tasks: Sequence[T], /) -> Iterator[R]:
    if function is not prepare_shard:
        return map(function, tasks)
    for task in tasks[:3]:
        function(task)
    raise KeyboardInterrupt


def _key(row: dict[str, str]) -> bytes:
    config = DataConfig(train="rows.jsonl")
    return example_key(row, row_format(config, config.train_sources[0]))


def test_manifests_are_the_same_whatever_the_order_of_tasks(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = _config(write_rows(ROWS), max_held_out_examples=5)
    one = prepare(config, tokenizer_dir, tmp_path / "one")
    two = prepare(config, tokenizer_dir, tmp_path / "two", run_tasks=run_backwards)
    assert _files(one.train.folder) == _files(two.train.folder)
    assert one.train.digest == two.train.digest
    assert len(one.train.shards) > 3


def test_only_what_is_missing_is_redone_after_a_crash(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = _config(write_rows(ROWS))
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tokenizer_dir, tmp_path, run_tasks=run_until_crash)
    (folder,) = (tmp_path / "shards").iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sum(path.suffix == ".safetensors" for path in before) == 3
    damaged = min(before)
    damaged.with_suffix(".safetensors").write_bytes(b"damaged")
    prepared = prepare(config, tokenizer_dir, tmp_path)
    changed = {path.stem for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {damaged.stem}
    whole = prepare(config, tokenizer_dir, tmp_path / "whole")
    assert _files(prepared.train.folder) == _files(whole.train.folder)


@settings(max_examples=12)
@given(st.randoms(use_true_random=False), st.integers(0, 30))
def test_any_order_and_any_crash_give_the_same_bytes(
    tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory, draw: random.Random, crash: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = _config(rows, slice_bytes=600, max_held_out_examples=9)
    left = [crash]

    def run(function: Callable[[T], R], tasks: Sequence[T], /) -> Iterator[R]:
        order = draw.sample(range(len(tasks)), len(tasks))
        results = {}
        for number in order:
            if not left[0] and function is prepare_shard:
                left[0] = -1
                raise KeyboardInterrupt
            results[number] = function(tasks[number])
            left[0] -= function is prepare_shard
        return iter([results[number] for number in range(len(tasks))])

    with contextlib.suppress(KeyboardInterrupt):
        prepare(config, tokenizer_dir, folder / "one", run)
    one = prepare(config, tokenizer_dir, folder / "one", run)
    two = prepare(config, tokenizer_dir, folder / "two")
    assert _files(one.train.folder) == _files(two.train.folder)


def test_finished_data_is_reused_without_any_task(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    config = _config(write_rows(ROWS))
    first = prepare(config, tokenizer_dir, tmp_path, report=lines.append)
    assert lines[0].startswith("data: making ")
    assert "data: token ids: remembered for each pre-token" in lines
    assert prepare(config, tokenizer_dir, tmp_path, run_until_crash, lines.append) == first
    assert lines[-1].startswith("data: reusing the shards")
    (first.train.folder / first.train.shards[0].file).unlink()
    assert prepare(config, tokenizer_dir, tmp_path) == first


def test_a_copy_of_the_data_elsewhere_gives_the_same_shards(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    one = prepare(_config(write_rows(ROWS)), tokenizer_dir, tmp_path)
    two = prepare(_config(write_rows(ROWS, "copy.jsonl")), tokenizer_dir, tmp_path)
    assert one == two
    other = prepare(_config(write_rows(ROWS[1:], "copy.jsonl")), tokenizer_dir, tmp_path)
    assert other.train.digest != one.train.digest


def test_manifest_records_totals_and_recipe(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = _config(write_rows(ROWS), block_length=20, overlong="drop")
    manifest = prepare(config, tokenizer_dir, tmp_path).train
    record = json.loads((manifest.folder / "train.json").read_text())
    totals = record["totals"]
    assert totals["rows"] == totals["num_documents"] + totals["dropped"]
    assert totals["dropped"] > 0
    assert 0.5 < totals["packing_efficiency"] <= 1
    assert record["digest"] == manifest.digest
    assert record["recipe"]["settings"]["block_length"] == 20
    assert str(tmp_path) not in json.dumps(record)
    assert load_manifest(str(manifest.folder), "train") == manifest


def test_hash_split_is_stable_when_rows_are_added(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    def split(rows: list[dict[str, str]]) -> tuple[set[str], set[str]]:
        config = _config(write_rows(rows), held_out_fraction=0.2)
        prepared = prepare(config, tokenizer_dir, tmp_path)
        return set(_keys(prepared.train)), set(_keys(prepared.held_out))

    few_train, few_held_out = split(ROWS[:150])
    train, held_out = split(random.Random(0).sample(ROWS, len(ROWS)))
    assert few_train < train
    assert few_held_out < held_out
    assert train | held_out == {_key(row).hex() for row in ROWS}
    assert not train & held_out
    assert 20 < len(held_out) < 60


@pytest.mark.parametrize("cap", [1, 7, 30, 1000])
def test_caps_take_just_the_first_examples_by_hash(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path, cap: int
) -> None:
    config = _config(
        write_rows(ROWS),
        held_out_fraction=0.3,
        max_train_examples=cap,
        max_held_out_examples=cap,
    )
    prepared = prepare(config, tokenizer_dir, tmp_path)
    train, held_out = split_ranges(0.3)
    keys = sorted(map(_key, ROWS))
    for manifest, inside in ((prepared.train, train), (prepared.held_out, held_out)):
        chosen = [key.hex() for key in keys if key_order(key) in inside][:cap]
        assert _keys(manifest) == chosen


def test_few_rows_from_many_slices_share_a_shard(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = _config(write_rows(ROWS), slice_bytes=300, max_held_out_examples=6)
    prepared = prepare(config, tokenizer_dir, tmp_path)
    assert len(prepared.train.shards) > 20
    assert len(prepared.held_out.shards) == 1


def test_all_of_a_held_out_source_is_held_out(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    other = [{"prompt": str(i), "completion": "y"} for i in range(40)]
    held_out = write_rows(other, "test.jsonl")
    prepared = prepare(_config(write_rows(ROWS), held_out=str(held_out)), tokenizer_dir, tmp_path)
    assert _keys(prepared.train) == sorted(_key(row).hex() for row in ROWS)
    assert _keys(prepared.held_out) == sorted(_key(row).hex() for row in other)


def test_repeats_are_reported_and_left_out_on_request(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    train = write_rows([*ROWS, *ROWS[:50], {"prompt": " 7? ", "completion": "xxxxxxxx\n"}])
    held_out = write_rows(ROWS[:9], "test.jsonl")
    lines: list[str] = []
    kept = _config(train, held_out=str(held_out))
    prepared = prepare(kept, tokenizer_dir, tmp_path, report=lines.append)
    assert prepared.train.totals.rows == 251
    assert (prepared.train.repeats.duplicates, prepared.train.repeats.contaminated) == (51, 19)
    assert "51 training examples are equal to an earlier one; data.deduplicate: true" in lines[-2]
    assert "19 training examples are equal to a held-out one; data.decont" in lines[-1]
    config = _config(train, held_out=str(held_out), deduplicate=True, decontaminate=True)
    cleaned = prepare(config, tokenizer_dir, tmp_path).train
    assert _keys(cleaned) == sorted(_key(row).hex() for row in ROWS[9:])
    assert cleaned.repeats == prepared.train.repeats


def test_a_mixture_reads_each_source_in_its_own_way(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    pairs = write_rows(ROWS[:10], "pairs.jsonl")
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"line {number}\n" for number in range(10)))
    held_out = write_rows(ROWS[10:20], "test.jsonl")
    sources = [
        {"path": str(pairs), "weight": 2},
        {"path": str(texts), "weight": 0.5, "format": "text"},
    ]
    data = DataConfig.model_validate(
        {"train": sources, "held_out": str(held_out), "block_length": 64}
    )
    prepared = prepare(data, tokenizer_dir, tmp_path)
    keys = _keys(prepared.train)
    assert all(keys.count(_key(row).hex()) == 2 for row in ROWS[:10])
    assert 20 < len(keys) < 30
    assert prepared.train.repeats.duplicates == 0


def test_a_row_that_cannot_be_used_is_skipped_and_listed_on_request(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    train = write_rows([*ROWS[:3], {"prompt": 1, "completion": "x"}, *ROWS[3:]])
    train.write_text(train.read_text() + "{broken\n")
    prepared = prepare(_config(train, on_bad_row="skip"), tokenizer_dir, tmp_path)
    assert prepared.train.totals.bad_rows == 2
    assert prepared.held_out.totals.bad_rows == 0
    rows = prepared.train.totals.rows + prepared.held_out.totals.rows
    assert rows == len(ROWS)
    found = [row for shard in prepared.train.shards for row in bad_rows(prepared.place, shard)]
    assert [row["place"].rpartition(":")[2] for row in found] == ["4", "202"]
    assert "column 'prompt' must be text" in found[0]["problem"]


def test_shards_in_an_object_store_are_those_of_a_folder(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    train = write_rows(ROWS)
    local = prepare(_config(train), tokenizer_dir, tmp_path / "one")
    there = _config(train, shards_dir=f"file://{tmp_path}/bucket")
    remote = prepare(there, tokenizer_dir, tmp_path / "two")
    assert remote.train.digest == local.train.digest
    assert remote.held_out.digest == local.held_out.digest
    bucket = tmp_path / "bucket" / remote.place.rpartition("/")[2]
    assert _files(bucket) == _files(local.train.folder)
    reader = BlockReader(fetch_manifest(remote.place, "train"))
    assert reader.manifest.folder != local.train.folder
    every = range(reader.num_blocks)
    assert np.array_equal(
        reader.blocks(every).input_ids, BlockReader(local.train).blocks(every).input_ids
    )
    lines: list[str] = []
    assert prepare(there, tokenizer_dir, tmp_path / "two", run_until_crash, lines.append) == remote
    assert lines == [f"data: reusing the shards in {remote.place}"]


def test_reader_gathers_the_right_documents(
    write_rows: WriteRows, tokenizer_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    manifest = prepare(_config(write_rows(ROWS)), tokenizer_dir, tmp_path).train
    reader = BlockReader(manifest)
    order = np.random.default_rng(0).permutation(reader.num_blocks)
    batch = reader.blocks(order)
    by_key = {_key(row).hex(): row for row in ROWS}
    seen = []
    for block in range(len(order)):
        for document in np.unique(batch.document_ids[block]):
            if document < 0:
                continue
            place = batch.document_ids[block] == document
            row = by_key[reader.document_keys[document]]
            text = tokenizer.decode(batch.input_ids[block][place])
            assert text == row["prompt"] + row["completion"] + "<|end|>"
            assert batch.position_ids[block][place].tolist() == list(range(place.sum()))
            learned = batch.labels[block][place]
            answer = tokenizer.decode(learned[learned != IGNORED])
            assert answer == row["completion"] + "<|end|>"
            seen.append(int(document))
    assert sorted(seen) == list(range(manifest.totals.num_documents))
    assert np.all(batch.labels[batch.document_ids < 0] == IGNORED)


def test_reader_gives_blocks_in_the_order_asked_for(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    reader = BlockReader(prepare(_config(write_rows(ROWS)), tokenizer_dir, tmp_path).train)
    last = reader.num_blocks - 1
    batch, single = reader.blocks([last, 0, last]), reader.blocks([0])
    assert np.array_equal(batch.input_ids[0], batch.input_ids[2])
    assert np.array_equal(batch.document_ids[1], single.document_ids[0])
    assert batch.input_ids.dtype == np.int64


def test_reader_passes_over_empty_shards(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"{i:02}", "completion": "y" * (90 if 8 <= i < 24 else 3)} for i in range(40)
    ]
    held_out = write_rows(ROWS[:5], "test.jsonl")
    config = _config(write_rows(rows), slice_bytes=400, overlong="drop", held_out=str(held_out))
    manifest = prepare(config, tokenizer_dir, tmp_path).train
    counts = [shard.num_documents for shard in manifest.shards]
    assert sum(counts) == 24
    assert 0 in counts[1:-1]
    batch = BlockReader(manifest).blocks(range(manifest.totals.num_blocks))
    assert np.array_equal(np.unique(batch.document_ids[batch.document_ids >= 0]), np.arange(24))


def test_damaged_shard_is_refused_with_the_remedy(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    manifest = prepare(_config(write_rows(ROWS)), tokenizer_dir, tmp_path).train
    path = manifest.folder / manifest.shards[0].file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="delete the folder .* and run again"):
        BlockReader(manifest).blocks([0])


def test_bad_row_is_named_with_its_line(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    train = write_rows([*ROWS, {"prompt": "p", "answer": "a"}])
    held_out = write_rows(ROWS[:3], "test.jsonl")
    with pytest.raises(DataError, match=r"train\.jsonl:201: there is no column 'completion'"):
        prepare(_config(train, held_out=str(held_out)), tokenizer_dir, tmp_path)


def _failure(config: DataConfig, tokenizer_dir: Path, cache: Path) -> str:
    with pytest.raises(DataError) as caught:
        prepare(config, tokenizer_dir, cache)
    return str(pickle.loads(pickle.dumps(caught.value)))


@pytest.mark.parametrize("cap", [None, 256])
def test_empty_held_out_set_is_refused(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path, cap: int | None
) -> None:
    config = _config(write_rows(ROWS), held_out_fraction=1e-9, max_held_out_examples=cap)
    message = _failure(config, tokenizer_dir, tmp_path)
    assert "at least one held_out example is needed" in message
    assert "chose no row: raise it, add rows, or give data.held_out" in message


def test_empty_train_set_is_refused(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = _config(write_rows(ROWS), held_out_fraction=0.999999)
    assert "left no row: lower it" in _failure(config, tokenizer_dir, tmp_path)
    config = _config(write_rows(ROWS), block_length=1, overlong="drop")
    message = _failure(config, tokenizer_dir, tmp_path)
    assert "are longer than data.block_length=1" in message
    assert not list(tmp_path.rglob("train.json"))

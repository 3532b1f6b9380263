import json
import pickle
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from orchestrator.config import DataConfig
from orchestrator.data.formats import Tokenizer
from orchestrator.data.keys import row_key, split_ranges
from orchestrator.data.manifest import Manifest, load_manifest, manifest_path
from orchestrator.data.prepare import PreparedData, prepare, run_in_process
from orchestrator.data.reader import BlockReader
from orchestrator.data.shards import ShardTask
from orchestrator.data.tokenizing import IGNORED
from orchestrator.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
WriteRows = Callable[..., Path]

ROWS = [{"prompt": f"{i}?", "completion": "x" * (1 + i % 23)} for i in range(200)]


def _config(train: Path, **settings: Any) -> DataConfig:
    defaults = {"block_length": 64, "rows_per_slice": 32, "max_held_out_examples": None}
    return DataConfig.model_validate({"train": str(train), **defaults, **settings})


def _keys(manifest: Manifest) -> list[str]:
    return sorted(BlockReader(manifest).document_keys)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_backwards(function: Callable[[T], R], tasks: Sequence[T], /) -> list[R]:
    copies = [pickle.loads(pickle.dumps(task)) for task in tasks]
    return [pickle.loads(pickle.dumps(function(task))) for task in reversed(copies)][::-1]


def run_until_crash(function: Callable[[T], R], tasks: Sequence[T], /) -> list[R]:
    for task in tasks[:3]:
        function(task)
    raise KeyboardInterrupt


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


def test_finished_data_is_reused_without_any_task(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    config = _config(write_rows(ROWS))
    first = prepare(config, tokenizer_dir, tmp_path, report=lines.append)
    assert lines[0].startswith("data: making ")
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
    record = json.loads(manifest_path(manifest.folder, "train").read_text())
    totals = record["totals"]
    assert totals["rows"] == totals["num_documents"] + totals["dropped"]
    assert totals["dropped"] > 0
    assert 0.5 < totals["packing_efficiency"] <= 1
    assert record["digest"] == manifest.digest
    assert record["recipe"]["settings"]["block_length"] == 20
    assert str(tmp_path) not in json.dumps(record)
    assert load_manifest(manifest_path(manifest.folder, "train")) == manifest


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
    assert train | held_out == set(map(row_key, ROWS))
    assert not train & held_out
    assert 20 < len(held_out) < 60


def test_split_follows_the_first_64_bits_of_the_key() -> None:
    train, held_out = split_ranges(0.3)
    for number in range(500):
        key = row_key({"n": number})
        assert (key in held_out) == (int(key[:16], 16) / 2**64 < 0.3)
        assert (key in train) != (key in held_out)


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
    keys = sorted(map(row_key, ROWS))
    assert _keys(prepared.train) == [key for key in keys if key in train][:cap]
    assert _keys(prepared.held_out) == [key for key in keys if key in held_out][:cap]


def test_few_rows_from_many_slices_share_a_shard(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = _config(write_rows(ROWS), rows_per_slice=8, max_held_out_examples=6)
    prepared = prepare(config, tokenizer_dir, tmp_path)
    assert len(prepared.train.shards) == 25
    assert len(prepared.held_out.shards) == 1


def test_all_of_a_held_out_source_is_held_out(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    other = [{"prompt": str(i), "completion": "y"} for i in range(40)]
    held_out = write_rows(other, "test.jsonl")
    prepared = prepare(_config(write_rows(ROWS), held_out=str(held_out)), tokenizer_dir, tmp_path)
    assert _keys(prepared.train) == sorted(map(row_key, ROWS))
    assert _keys(prepared.held_out) == sorted(map(row_key, other))


def test_duplicate_rows_are_kept(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    prepared = prepare(_config(write_rows(ROWS + ROWS[:50])), tokenizer_dir, tmp_path)
    assert prepared.train.totals.rows + prepared.held_out.totals.rows == 250


def test_reader_gathers_the_right_documents(
    write_rows: WriteRows, tokenizer_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    manifest = prepare(_config(write_rows(ROWS)), tokenizer_dir, tmp_path).train
    reader = BlockReader(manifest)
    order = np.random.default_rng(0).permutation(reader.num_blocks)
    batch = reader.blocks(order)
    by_key = {row_key(row): row for row in ROWS}
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
    rows = [{"prompt": str(i), "completion": "y" * (90 if 8 <= i < 24 else 3)} for i in range(40)]
    held_out = write_rows(ROWS[:5], "test.jsonl")
    config = _config(write_rows(rows), rows_per_slice=8, overlong="drop", held_out=str(held_out))
    manifest = prepare(config, tokenizer_dir, tmp_path).train
    assert [shard.num_documents for shard in manifest.shards] == [8, 0, 0, 8, 8]
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


def test_tasks_cross_processes_unchanged(
    write_rows: WriteRows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    tasks: list[object] = []

    def run_and_note(function: Callable[[T], R], items: Sequence[T], /) -> list[R]:
        tasks.extend(items)
        return run_in_process(function, items)

    prepared = prepare(_config(write_rows(ROWS)), tokenizer_dir, tmp_path, run_and_note)
    assert isinstance(prepared, PreparedData)
    assert all(isinstance(task, ShardTask) for task in tasks)
    assert pickle.loads(pickle.dumps(tasks)) == tasks

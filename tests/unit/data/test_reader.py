from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.manifest import Manifest
from orchestrator.data.reader import IGNORED, MAX_MAPPED_SHARDS, NO_DOCUMENT, Batch, BlockReader
from orchestrator.data.tokenizing import Document
from orchestrator.errors import DataError
from tests.shards import PAD_ID, make_document, write_shards

BLOCK_LENGTH = 12
shards_of_lengths = st.lists(
    st.lists(st.integers(1, BLOCK_LENGTH), max_size=20), min_size=1, max_size=4
).filter(any)


def make_documents(shards: list[list[int]]) -> list[list[Document]]:
    numbers = iter(range(1000))
    return [[make_document(next(numbers), length) for length in shard] for shard in shards]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    shards = [[5, 7, 3, 12, 1], [], [2, 2, 2, 9, 12, 4], [8]]
    return write_shards(tmp_path, make_documents(shards), BLOCK_LENGTH)


@given(shards=shards_of_lengths, seed=st.integers(0, 100))
def test_every_document_comes_whole_with_its_own_labels_and_positions(
    shards: list[list[int]], seed: int
) -> None:
    documents = make_documents(shards)
    with TemporaryDirectory() as folder:
        reader = BlockReader(write_shards(Path(folder), documents, BLOCK_LENGTH))
        order = np.random.default_rng(seed).permutation(reader.num_blocks)
        batch = reader.blocks(order)
        keys = reader.document_keys
    expected = {document.key.hex(): document for shard in documents for document in shard}
    assert sorted(keys) == sorted(expected)
    for number, key in enumerate(keys):
        place = batch.document_ids == number
        document = expected[key]
        assert batch.input_ids[place].tolist() == document.input_ids.tolist()
        assert batch.position_ids[place].tolist() == list(range(len(document.input_ids)))
        following = np.append(document.input_ids[1:], IGNORED)
        labels = np.where(document.has_label, following, IGNORED)
        assert batch.labels[place].tolist() == labels.tolist()
    padding = batch.document_ids == NO_DOCUMENT
    assert np.all(batch.input_ids[padding] == PAD_ID)
    assert np.all(batch.labels[padding] == IGNORED)


def test_positions_restart_at_each_document_and_at_the_padding(tmp_path: Path) -> None:
    reader = BlockReader(write_shards(tmp_path, make_documents([[3, 2]]), 8))
    batch = reader.blocks([0])
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, NO_DOCUMENT, NO_DOCUMENT, NO_DOCUMENT]]
    assert {array.dtype for array in arrays(batch)} == {np.dtype(np.int64)}


def test_documents_are_numbered_through_all_shards_and_an_empty_one_is_passed(
    manifest: Manifest,
) -> None:
    reader = BlockReader(manifest)
    batch = reader.blocks(range(reader.num_blocks))
    assert np.unique(batch.document_ids).tolist() == [NO_DOCUMENT, *range(12)]
    ids = batch.document_ids[batch.document_ids != NO_DOCUMENT]
    assert ids.tolist() == sorted(ids)  # they stand in the blocks in the order of their numbers


def test_blocks_come_in_the_order_asked_for(manifest: Manifest) -> None:
    reader = BlockReader(manifest)
    last = reader.num_blocks - 1
    whole = reader.blocks(range(reader.num_blocks))
    picked = reader.blocks([last, 0, last])
    for all_of_them, some in zip(arrays(whole), arrays(picked), strict=True):
        assert np.array_equal(some, all_of_them[[last, 0, last]])


def test_no_blocks_are_an_empty_batch(manifest: Manifest) -> None:
    assert {array.shape for array in arrays(BlockReader(manifest).blocks([]))} == {
        (0, BLOCK_LENGTH)
    }


def test_a_block_that_is_not_there_is_noticed(manifest: Manifest) -> None:
    reader = BlockReader(manifest)
    with pytest.raises(AssertionError, match="no such block"):
        reader.blocks([reader.num_blocks])


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [flip_last_byte, Path.unlink])
def test_a_damaged_or_missing_shard_is_refused_with_the_remedy(
    manifest: Manifest, harm: Callable[[Path], None]
) -> None:
    harm(manifest.folder / manifest.shards[2].file)
    reader = BlockReader(manifest)
    reader.blocks([0])  # another shard's
    with pytest.raises(DataError, match="delete the folder .* and run again"):
        reader.blocks([0, reader.num_blocks - 2])


def test_more_shards_than_a_process_may_open_files_are_read(tmp_path: Path) -> None:
    number = 2 * MAX_MAPPED_SHARDS
    manifest = write_shards(tmp_path, [[make_document(0, 5)]], BLOCK_LENGTH)
    many = BlockReader(replace(manifest, shards=manifest.shards * number))
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert many.blocks(range(number)).document_ids.max() == number - 1
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= MAX_MAPPED_SHARDS


def test_threads_share_a_reader(manifest: Manifest) -> None:
    expected = BlockReader(manifest).blocks(range(4))
    reader = BlockReader(manifest)
    with ThreadPoolExecutor(8) as threads:
        for batch in threads.map(lambda _: reader.blocks(range(4)), range(64)):
            for found, right in zip(arrays(batch), arrays(expected), strict=True):
                assert np.array_equal(found, right)


def arrays(batch: Batch) -> list[np.ndarray]:
    return [batch.input_ids, batch.labels, batch.position_ids, batch.document_ids]

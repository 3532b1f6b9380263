import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.block_files import NAMES, map_blocks, write_blocks
from orchestrator.data.packing import Blocks, build_blocks, pack
from tests.shards import make_document

many_lengths = st.lists(st.integers(1, 50), max_size=200)


@given(lengths=many_lengths)
def test_packing_never_splits_loses_or_overfills(lengths: list[int]) -> None:
    block_of = pack(lengths, 50)
    filled = np.bincount(block_of, weights=lengths)
    assert len(block_of) == len(lengths)
    assert np.all((filled > 0) & (filled <= 50))
    assert np.array_equal(pack(lengths, 50), block_of)


@given(lengths=many_lengths)
def test_blocks_are_numbered_by_their_first_documents(lengths: list[int]) -> None:
    seen = list(dict.fromkeys(pack(lengths, 50).tolist()))
    assert seen == list(range(len(seen)))


@given(lengths=many_lengths)
def test_no_two_blocks_fit_into_one(lengths: list[int]) -> None:
    filled = np.sort(np.bincount(pack(lengths, 50), weights=lengths))
    assert len(filled) < 2 or filled[0] + filled[1] > 50


def test_packing_fills_99_percent_on_lengths_like_gsm8k() -> None:
    draw = random.Random(0)
    for _ in range(5):
        lengths = [min(2048, max(40, round(draw.lognormvariate(5.1, 0.4)))) for _ in range(5000)]
        assert sum(lengths) / (2048 * (pack(lengths, 2048).max() + 1)) > 0.99


def test_packing_many_documents_is_quick() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 8192) for _ in range(100_000)]
    assert pack(lengths, 8192).max() > 0  # takes about 0.1 s; a quadratic packer takes minutes


@given(lengths=st.lists(st.integers(1, 12), max_size=40))
def test_blocks_hold_every_document_whole_with_its_labels_and_key(lengths: list[int]) -> None:
    documents = [make_document(number, length) for number, length in enumerate(lengths)]
    blocks = build_blocks(documents, block_length=12, pad_id=0, vocab_size=1000)
    flags = np.unpackbits(blocks.has_label, axis=1, count=12)
    found = []
    number = 0
    for block, count in enumerate(blocks.documents_per_block):
        start = 0
        for length in blocks.document_lengths[number : number + count]:
            place = slice(start, start + length)
            key = bytes(blocks.document_keys[number])
            found.append((key, blocks.input_ids[block, place].tolist(), flags[block, place].sum()))
            start, number = place.stop, number + 1
        assert not blocks.input_ids[block, start:].any()
        assert not flags[block, start:].any()
    expected = [(d.key, d.input_ids.tolist(), d.has_label.sum()) for d in documents]
    assert sorted(found) == sorted(expected)
    assert blocks.num_tokens == sum(lengths)
    assert blocks.num_labels == flags.sum()


def test_padding_counts_as_one_document_more() -> None:
    full = build_blocks([make_document(n, 4) for n in range(2)], 8, pad_id=0, vocab_size=1000)
    padded = build_blocks([make_document(n, 3) for n in range(2)], 8, pad_id=0, vocab_size=1000)
    assert (full.max_documents, padded.max_documents) == (2, 3)


def test_a_token_too_large_for_its_vocabulary_never_becomes_another_one() -> None:
    document = make_document(0, 200, vocab_size=10**6)
    with pytest.raises(AssertionError, match="16 bits"):
        build_blocks([document], 200, pad_id=0, vocab_size=1000)


@pytest.mark.parametrize(("vocab_size", "most"), [(65_536, 2.5), (65_537, 4.5)])
def test_a_file_has_two_bytes_a_token_or_four_where_words_are_many(
    tmp_path: Path, vocab_size: int, most: float
) -> None:
    documents = [make_document(number, 200, vocab_size) for number in range(100)]
    blocks = build_blocks(documents, 1000, pad_id=0, vocab_size=vocab_size)
    write_blocks(tmp_path / "shard", blocks)
    assert (tmp_path / "shard").stat().st_size / blocks.num_tokens < most


@pytest.mark.parametrize("lengths", [[], [1], [3, 8, 8, 5, 2, 1]])
@pytest.mark.parametrize("vocab_size", [1000, 70_000])
def test_a_mapped_file_has_what_was_written(
    tmp_path: Path, lengths: list[int], vocab_size: int
) -> None:
    documents = [make_document(n, length, vocab_size) for n, length in enumerate(lengths)]
    blocks = build_blocks(documents, 8, pad_id=0, vocab_size=vocab_size)
    write_blocks(tmp_path / "shard", blocks)
    _assert_equal(map_blocks(tmp_path / "shard"), blocks)


def test_a_file_can_be_read_by_safetensors_and_its_bytes_depend_on_the_documents_alone(
    tmp_path: Path,
) -> None:
    from safetensors.numpy import load_file

    documents = [make_document(number, 5 + number) for number in range(20)]
    for name in ("one", "other"):
        write_blocks(tmp_path / name, build_blocks(documents, 40, pad_id=0, vocab_size=1000))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    _assert_equal(Blocks(**load_file(tmp_path / "one")), map_blocks(tmp_path / "other"))


def _assert_equal(one: Blocks, other: Blocks) -> None:
    for name in NAMES:
        found, expected = getattr(one, name), getattr(other, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected, err_msg=name)

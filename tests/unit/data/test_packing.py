import random
from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.packing import NO_DOCUMENT, build_blocks, pack
from orchestrator.data.tokenizing import IGNORED, Document


def _document(number: int, length: int) -> Document:
    ids = np.arange(length, dtype=np.int32) + 1000 * number
    labels = np.append(ids[1:], IGNORED).astype(np.int32)
    return Document(ids, labels, key=f"{number:064x}")


@given(lengths=st.lists(st.integers(1, 50), max_size=200))
def test_packing_never_splits_loses_or_overfills(lengths: list[int]) -> None:
    blocks = pack(lengths, 50)
    assert sorted(chain.from_iterable(blocks)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in block) <= 50 for block in blocks)
    assert pack(lengths, 50) == blocks


def test_packing_fills_more_than_95_percent_on_random_lengths() -> None:
    draw = random.Random(0)
    for _ in range(20):
        lengths = [draw.randint(1, 1024) for _ in range(1000)]
        assert sum(lengths) / (1024 * len(pack(lengths, 1024))) > 0.95


def test_packing_many_documents_is_quick() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 8192) for _ in range(50_000)]
    assert len(pack(lengths, 8192)) > 0  # takes about 0.1 s; a quadratic packer takes minutes


def test_positions_restart_at_each_document_and_at_the_padding() -> None:
    blocks = build_blocks([_document(1, 3), _document(2, 2)], block_length=8, pad_id=9)
    assert blocks.input_ids.tolist() == [[1000, 1001, 1002, 2000, 2001, 9, 9, 9]]
    assert blocks.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert blocks.document_ids.tolist() == [[0, 0, 0, 1, 1, NO_DOCUMENT, NO_DOCUMENT, NO_DOCUMENT]]
    assert blocks.labels.tolist() == [[1001, 1002, -100, 2001, -100, -100, -100, -100]]


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_labels_never_cross_documents(lengths: list[int]) -> None:
    blocks = build_blocks([_document(i, n) for i, n in enumerate(lengths, 1)], 12, pad_id=0)
    block, place = np.nonzero(blocks.labels != IGNORED)
    assert np.array_equal(blocks.labels[block, place], blocks.input_ids[block, place + 1])
    same = blocks.document_ids[block, place] == blocks.document_ids[block, place + 1]
    assert same.all()
    assert len(block) == sum(lengths) - len(lengths)


def test_no_documents_make_no_blocks() -> None:
    assert build_blocks([], block_length=8, pad_id=0).input_ids.shape == (0, 8)

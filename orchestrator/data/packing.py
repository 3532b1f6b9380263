"""Pack documents into blocks of a fixed length: best fit, the longest first.

In: documents. Out: blocks, as compact as a shard's file has them (block_files.py). Pure. A document
is never split; at block length 2,048 more than 99 % of GSM8K's positions hold a token.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from orchestrator.data.tokenizing import Document

KEY_BYTES = 32  # SHA-256


@dataclass(frozen=True, eq=False)
class Blocks:
    """Some blocks and the documents in them; what else a model takes follows from these."""

    input_ids: NDArray[np.uint16] | NDArray[np.uint32]
    """[blocks, block_length]"""
    has_label: NDArray[np.uint8]
    """Whether a position has a label, which is the next token; a bit each, as numpy.packbits packs
    them. [blocks, block_length / 8, rounded up]"""
    documents_per_block: NDArray[np.int32]
    document_lengths: NDArray[np.int32]
    """In the order in which documents stand in the blocks. [documents]"""
    document_keys: NDArray[np.uint8]
    """In the same order. [documents, KEY_BYTES]"""

    @property
    def num_tokens(self) -> int:
        return int(self.document_lengths.sum(dtype=np.int64))

    @property
    def num_labels(self) -> int:
        return int(np.bitwise_count(self.has_label).sum(dtype=np.int64))

    @property
    def max_documents(self) -> int:
        """Most documents in one block, padding counted as one."""
        if not len(self.input_ids):
            return 0
        firsts = np.cumsum(self.documents_per_block) - self.documents_per_block
        filled = np.add.reduceat(self.document_lengths, firsts)
        return int((self.documents_per_block + (filled < self.input_ids.shape[1])).max())


def build_blocks(
    documents: Sequence[Document], block_length: int, pad_id: int, vocab_size: int
) -> Blocks:
    """Each document has 1 to `block_length` tokens."""
    lengths = np.fromiter((len(d.input_ids) for d in documents), np.int32, len(documents))
    block_of = pack(lengths, block_length)
    order = np.argsort(block_of, kind="stable")
    placed = [documents[index] for index in order]
    documents_per_block = np.bincount(block_of).astype(np.int32)
    ends = np.cumsum(documents_per_block).tolist()
    paddings = (block_length - np.bincount(block_of, weights=lengths)).astype(int).tolist()
    shape = (len(ends), block_length)
    no_ids = np.full(block_length, pad_id, dtype=np.int32)
    no_labels = np.zeros(block_length, dtype=np.bool_)
    ids: list[NDArray[np.int32]] = []
    flags: list[NDArray[np.bool_]] = []
    for start, end, padding in zip([0, *ends], ends, paddings, strict=False):
        ids += [document.input_ids for document in placed[start:end]]
        ids.append(no_ids[:padding])
        flags += [document.has_label for document in placed[start:end]]
        flags.append(no_labels[:padding])
    input_ids = np.concatenate([*ids, no_ids[:0]]).reshape(shape)
    has_label = np.concatenate([*flags, no_labels[:0]]).reshape(shape)
    keys = np.frombuffer(b"".join(document.key for document in placed), dtype=np.uint8)
    return Blocks(
        _narrowed(input_ids, vocab_size),
        np.packbits(has_label, axis=1),
        documents_per_block,
        lengths[order],
        keys.reshape(-1, KEY_BYTES),
    )


def pack(lengths: ArrayLike, block_length: int) -> NDArray[np.int64]:
    """The block that each document goes to. Each length is 1 to `block_length`.

    Blocks are numbered by their first documents: document 0 is in block 0.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    found: list[int] = []  # the block of each of these
    num_blocks = 0
    by_space: dict[int, list[int]] = {}  # free positions -> blocks with just that many
    spaces: list[int] = []  # the keys of by_space, sorted
    for length in lengths[longest_first].tolist():
        fits = bisect_left(spaces, length)
        if fits == len(spaces):
            block, space = num_blocks, block_length
            num_blocks += 1
        else:
            space = spaces[fits]
            block = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[fits]
        found.append(block)
        space -= length
        if space and space not in by_space:
            by_space[space] = []
            insort(spaces, space)
        if space:
            by_space[space].append(block)
    block_of = np.empty(len(lengths), dtype=np.int64)
    block_of[longest_first] = found
    return _numbered_by_first(block_of)


def document_starts(position_ids: NDArray[Any]) -> NDArray[np.bool_]:
    """Where positions [blocks, block_length] start again: the first token of each document, and of
    the padding."""
    starts = np.ones(position_ids.shape, dtype=bool)
    starts[:, 1:] = np.diff(position_ids, axis=1) != 1
    return starts


def _numbered_by_first(block_of: NDArray[np.int64]) -> NDArray[np.int64]:
    _, firsts = np.unique(block_of, return_index=True)
    return np.argsort(np.argsort(firsts))[block_of]


def _narrowed(
    input_ids: NDArray[np.int32], vocab_size: int
) -> NDArray[np.uint16] | NDArray[np.uint32]:
    if vocab_size > 1 << 16:
        return input_ids.astype(np.uint32)
    # Some vocabularies have gaps, so that an id may be as large as their number of words.
    assert not input_ids.size or input_ids.max() < 1 << 16, "a token needs more than 16 bits"
    return input_ids.astype(np.uint16)

"""Gather blocks from memory-mapped shards.

In: a manifest and block indices. Out: batches of int64 arrays. Threads may share a reader. Imports
no torch.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.block_files import map_blocks
from orchestrator.data.manifest import Manifest
from orchestrator.data.packing import Blocks
from orchestrator.digests import known_file_digest
from orchestrator.errors import DataError
from orchestrator.files import record_digest

IGNORED = -100  # PyTorch's cross entropy leaves this label out
NO_DOCUMENT = -1

# Each mapping holds a file descriptor, of which a process often may have 1,024 only. Mapping a
# shard anew takes 0.1 ms.
MAX_MAPPED_SHARDS = 256


@dataclass(frozen=True, eq=False)
class Batch:
    """Arrays of int64 [blocks, block_length]."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    """The token to predict at each position, which is the next one; IGNORED where it has no loss
    and at the end of a document."""
    position_ids: NDArray[np.int64]
    """Counts from 0 in each document, and again in the padding."""
    document_ids: NDArray[np.int64]
    """Index into the reader's `document_keys`; NO_DOCUMENT on padding."""

    def part(self, start: int, stop: int, every: int = 1) -> "Batch":
        return Batch(*(array[start:stop:every] for array in self._arrays()))

    @staticmethod
    def concatenate(batches: "Sequence[Batch]") -> "Batch":
        columns = zip(*(batch._arrays() for batch in batches), strict=True)
        return Batch(*(np.concatenate(arrays) for arrays in columns))

    def _arrays(self) -> tuple[NDArray[np.int64], ...]:
        return (self.input_ids, self.labels, self.position_ids, self.document_ids)


class BlockReader:
    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._first_blocks = _starts([shard.num_blocks for shard in manifest.shards]).tolist()
        self._first_documents = _starts([s.num_documents for s in manifest.shards]).tolist()
        verified: set[int] = set()
        self._shard = lru_cache(MAX_MAPPED_SHARDS)(partial(_map_verified, manifest, verified))

    @property
    def num_blocks(self) -> int:
        return int(self._first_blocks[-1])

    @cached_property
    def document_keys(self) -> tuple[str, ...]:
        """Each document's content hash, by its number in the whole manifest."""
        shards = (self._shard(index) for index in range(len(self.manifest.shards)))
        return tuple(bytes(key).hex() for shard in shards for key in shard.blocks.document_keys)

    @cached_property
    def examples_digest(self) -> str:
        """Names the documents as keys, tokens and labels, however they are packed and ordered: with
        equal digests, losses can be compared document by document. Reads all blocks once."""
        return record_digest(
            sorted(
                [key, hashlib.sha256(tokens.tobytes() + labels.tobytes()).hexdigest()]
                for key, tokens, labels in self.documents()
            )
        )

    def documents(self) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.int64]]]:
        """Key, tokens and labels of each document, in the order of the blocks."""
        for number in range(self.num_blocks):
            block = self.blocks([number])
            (ids,) = block.document_ids
            borders = np.flatnonzero(np.diff(ids)) + 1
            parts = zip(
                *(np.split(array[0], borders) for array in (block.input_ids, block.labels)),
                strict=True,
            )
            for document, (tokens, labels) in zip(ids[[0, *borders]], parts, strict=True):
                if document != NO_DOCUMENT:
                    yield self.document_keys[document], tokens, labels

    def blocks(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """The blocks in the order asked for.

        Raises:
            DataError: a shard is missing or damaged.
        """
        wanted = np.asarray(indices, dtype=np.int64).tolist()
        block_length = self.manifest.block_length
        input_ids = np.empty((len(wanted), block_length), dtype=np.int64)
        has_label = np.empty((len(wanted), -(-block_length // 8)), dtype=np.uint8)
        # What follows one another in the blocks, and how long: documents, and padding after them.
        numbers: list[int] = []
        lengths: list[int] = []
        for place, block in enumerate(wanted):
            assert 0 <= block < self.num_blocks, "no such block"
            # From the right, so that an empty shard, which starts where the next does, is passed.
            index = bisect_right(self._first_blocks, block) - 1
            shard, row = self._shard(index), block - self._first_blocks[index]
            input_ids[place] = shard.blocks.input_ids[row]
            has_label[place] = shard.blocks.has_label[row]
            start, end = shard.borders[row : row + 2].tolist()
            filled = shard.blocks.document_lengths[start:end].tolist()
            first = self._first_documents[index]
            numbers += range(first + start, first + end)
            numbers.append(NO_DOCUMENT)
            lengths += filled
            lengths.append(block_length - sum(filled))
        counts = np.array(lengths, dtype=np.int64)
        position_ids = np.arange(input_ids.size) - np.repeat(np.cumsum(counts) - counts, counts)
        document_ids = np.repeat(np.array(numbers, dtype=np.int64), counts)
        return Batch(
            input_ids,
            _labels(input_ids, has_label),
            position_ids.reshape(input_ids.shape),
            document_ids.reshape(input_ids.shape),
        )


@dataclass(frozen=True, eq=False)
class _Shard:
    blocks: Blocks
    borders: NDArray[np.int64]
    """The first document of each block, counted within the shard, and then the end."""


def _map_verified(manifest: Manifest, verified: set[int], index: int) -> _Shard:
    shard = manifest.shards[index]
    path = manifest.folder / shard.file
    if not path.exists() or not (index in verified or known_file_digest(path) == shard.digest):
        raise DataError(
            f"{path}: the shard is missing or damaged: its content must have the digest "
            f"{shard.digest}: delete the folder {manifest.folder} and run again"
        )
    verified.add(index)
    blocks = map_blocks(path)
    return _Shard(blocks, _starts(blocks.documents_per_block))


def _starts(sizes: Sequence[int] | NDArray[np.int32]) -> NDArray[np.int64]:
    """Where each one starts, and then the end."""
    return np.append(0, np.cumsum(sizes, dtype=np.int64))


def _labels(input_ids: NDArray[np.int64], has_label: NDArray[np.uint8]) -> NDArray[np.int64]:
    flags = np.unpackbits(has_label, axis=1, count=input_ids.shape[1]).view(np.bool_)
    labels = np.full_like(input_ids, IGNORED)
    np.copyto(labels[:, :-1], input_ids[:, 1:], where=flags[:, :-1])
    return labels

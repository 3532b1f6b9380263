"""Gather blocks from memory-mapped shards.

In: a manifest and block indices. Out: batches of int64 arrays. Imports no torch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.manifest import Manifest
from orchestrator.data.packing import NO_DOCUMENT, document_starts
from orchestrator.errors import DataError
from orchestrator.files import file_digest, record_digest


@dataclass(frozen=True, eq=False)
class Batch:
    """Arrays of int64 [blocks, block_length]; see packing.Blocks."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    position_ids: NDArray[np.int64]
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
        self._first_blocks = _starts([shard.num_blocks for shard in manifest.shards])
        self._first_documents = _starts([shard.num_documents for shard in manifest.shards])
        self._opened: dict[int, Any] = {}

    @property
    def num_blocks(self) -> int:
        return int(self._first_blocks[-1])

    @cached_property
    def document_keys(self) -> tuple[str, ...]:
        """Each document's content hash, by its number in the whole manifest."""
        shards = (self._open(index) for index in range(len(self.manifest.shards)))
        return tuple(
            bytes(key).hex() for shard in shards for key in shard.get_tensor("document_keys")
        )

    @cached_property
    def max_documents(self) -> int:
        """Most documents in one block, padding counted as one. Reads all positions once."""
        counts = [
            document_starts(self._open(number).get_tensor("position_ids")).sum(axis=1).max()
            for number, shard in enumerate(self.manifest.shards)
            if shard.num_blocks
        ]
        return int(max(counts, default=1))

    @cached_property
    def examples_digest(self) -> str:
        """Names the documents as keys, tokens and labels, however they are packed and ordered: with
        equal digests, losses can be compared document by document. Reads all blocks once."""
        documents = []
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
                    content = hashlib.sha256(tokens.tobytes() + labels.tobytes()).hexdigest()
                    documents.append([self.document_keys[document], content])
        return record_digest(sorted(documents))

    def blocks(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """The blocks in the order asked for.

        Raises:
            DataError: a shard is missing or damaged.
        """
        numbers = np.asarray(indices, dtype=np.int64)
        assert np.all((numbers >= 0) & (numbers < self.num_blocks)), "no such block"
        # From the right, so that an empty shard, which starts where the next one does, is passed.
        shards = np.searchsorted(self._first_blocks, numbers, side="right") - 1
        rows = [
            (self._open(int(shard)), int(number - self._first_blocks[shard]))
            for shard, number in zip(shards, numbers, strict=True)
        ]
        document_ids = _gather("document_ids", rows, self.manifest.block_length)
        offsets = self._first_documents[shards][:, None]
        return Batch(
            input_ids=_gather("input_ids", rows, self.manifest.block_length),
            labels=_gather("labels", rows, self.manifest.block_length),
            position_ids=_gather("position_ids", rows, self.manifest.block_length),
            document_ids=np.where(document_ids == NO_DOCUMENT, NO_DOCUMENT, document_ids + offsets),
        )

    def _open(self, index: int) -> Any:
        if index not in self._opened:
            self._opened[index] = self._open_verified(index)
        return self._opened[index]

    def _open_verified(self, index: int) -> Any:
        from safetensors import safe_open

        shard = self.manifest.shards[index]
        path = self.manifest.folder / shard.file
        if not path.exists() or file_digest(path) != shard.digest:
            raise DataError(
                f"{path}: the shard is missing or damaged: its content must have the digest "
                f"{shard.digest}: delete the folder {self.manifest.folder} and run again"
            )
        return safe_open(path, framework="numpy")


def _starts(sizes: list[int]) -> NDArray[np.int64]:
    """Where each shard starts, and then the end."""
    return np.cumsum([0, *sizes], dtype=np.int64)


def _gather(name: str, rows: list[tuple[Any, int]], block_length: int) -> NDArray[np.int64]:
    gathered = np.empty((len(rows), block_length), dtype=np.int64)
    for place, (shard, row) in enumerate(rows):
        gathered[place] = shard.get_slice(name)[row]
    return gathered

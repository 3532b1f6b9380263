"""What prepared data look like: the documents of a block, and the figures of a whole role.

In: a manifest, and a block's number. Out: records to show. Reads each shard once for the figures,
but none of its tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.block_files import map_blocks
from orchestrator.data.manifest import Manifest
from orchestrator.data.reader import IGNORED, NO_DOCUMENT, BlockReader

SHOWN_QUANTILES = {"shortest": 0.0, "median": 0.5, "95 %": 0.95, "longest": 1.0}


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of a document that all have loss, or all have none."""

    token_ids: tuple[int, ...]
    is_learned: bool


@dataclass(frozen=True)
class ShownDocument:
    key: str
    num_tokens: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class ShownBlock:
    number: int
    documents: tuple[ShownDocument, ...]
    num_padding: int


@dataclass(frozen=True, eq=False)
class Figures:
    document_lengths: NDArray[np.int64]
    documents_per_block: NDArray[np.int64]

    @property
    def quantiles(self) -> dict[str, int]:
        """Of the documents' lengths, in tokens."""
        values = np.quantile(self.document_lengths, list(SHOWN_QUANTILES.values()))
        return dict(zip(SHOWN_QUANTILES, map(round, values.tolist()), strict=True))

    def histogram(self, num_bins: int) -> list[tuple[int, int, int]]:
        """Shortest and longest length of each bin, and the documents in it."""
        longest = int(self.document_lengths.max())
        edges = np.unique(np.linspace(0, longest, num_bins + 1).round().astype(int))
        counts, _ = np.histogram(self.document_lengths, edges + 0.5)
        pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
        return [(low + 1, high, count) for low, high, count in pairs]


def show_block(reader: BlockReader, number: int) -> ShownBlock:
    batch = reader.blocks([number])
    ids, labels, document_ids = batch.input_ids[0], batch.labels[0], batch.document_ids[0]
    documents = []
    for document in dict.fromkeys(document_ids[document_ids != NO_DOCUMENT].tolist()):
        places = np.flatnonzero(document_ids == document)
        # A position's label is the next token: a token is learned where the one before has a label.
        is_learned = np.append(False, labels[places][:-1] != IGNORED)
        runs = tuple(_runs(ids[places].tolist(), is_learned.tolist()))
        documents.append(ShownDocument(reader.document_keys[document], len(places), runs))
    num_padding = int(np.count_nonzero(document_ids == NO_DOCUMENT))
    return ShownBlock(number, tuple(documents), num_padding)


def read_figures(manifest: Manifest) -> Figures:
    lengths, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for shard in manifest.shards:
        blocks = map_blocks(manifest.folder / shard.file)
        lengths.append(blocks.document_lengths.astype(np.int64))
        counts.append(blocks.documents_per_block.astype(np.int64))
    return Figures(np.concatenate(lengths), np.concatenate(counts))


def _runs(token_ids: list[int], is_learned: list[bool]) -> Iterator[Run]:
    pairs = zip(token_ids, is_learned, strict=True)
    for flag, members in groupby(pairs, key=lambda pair: pair[1]):
        yield Run(tuple(token for token, _ in members), flag)

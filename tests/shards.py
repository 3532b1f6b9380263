"""Prepared data made on the spot: documents of given lengths, packed and written as shards."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from orchestrator.data.block_files import write_blocks
from orchestrator.data.manifest import Manifest, Recipe, Repeats
from orchestrator.data.packing import build_blocks
from orchestrator.data.shards import describe_shard
from orchestrator.data.tokenizing import Document

PAD_ID = 0


def make_document(number: int, length: int, vocab_size: int = 1000) -> Document:
    """Of random tokens but PAD_ID, about half of which have a label; the same for equal numbers."""
    draw = np.random.default_rng(number)
    has_label = draw.random(length) < 0.5
    has_label[-1] = False
    ids = draw.integers(1, vocab_size, length, dtype=np.int32)
    return Document(ids, has_label, number.to_bytes(32, "big"))


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[Document]],
    block_length: int,
    vocab_size: int = 1000,
) -> Manifest:
    """A shard of each list of documents."""
    records = []
    for index, documents in enumerate(shards):
        path = folder / f"train-{index:05d}.safetensors"
        blocks = build_blocks(documents, block_length, PAD_ID, vocab_size)
        write_blocks(path, blocks)
        records.append(describe_shard(path, blocks, rows=len(documents)))
    recipe = Recipe(settings={}, tokenizer="", train_files=(), held_out_files=())
    return Manifest(folder, "train", block_length, recipe, tuple(records), Repeats(0, 0))

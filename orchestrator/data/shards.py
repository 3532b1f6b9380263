"""Make one shard: read slices, keep a role's rows, tokenise, pack, write.

In: a ShardTask, which pickles. Out: a ShardRecord, which pickles too, and a safetensors file of the
same bytes in whatever process or order. A shard that is already there whole is not made again.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from orchestrator.config import DataConfig
from orchestrator.data.formats import RowProblem, Tokenizer, segments
from orchestrator.data.keys import KeyRange, row_key
from orchestrator.data.manifest import Role, ShardRecord
from orchestrator.data.packing import NO_DOCUMENT, Blocks, build_blocks
from orchestrator.data.slices import Slice
from orchestrator.data.sources import read_slice
from orchestrator.data.tokenizing import IGNORED, Example, Tokenized, load_tokenizer, tokenize
from orchestrator.errors import DataError
from orchestrator.files import file_digest, read_json, write_file, write_json

KEY_BYTES = 32  # SHA-256


@dataclass(frozen=True)
class ShardTask:
    slices: tuple[Slice, ...]
    keys: KeyRange
    """Which rows of the slices to take."""
    role: Role
    index: int
    config: DataConfig
    tokenizer_dir: str
    out_dir: str
    """A folder that belongs to one recipe alone."""

    @property
    def path(self) -> Path:
        return Path(self.out_dir) / f"{self.role}-{self.index:05d}.safetensors"


def prepare_shard(task: ShardTask) -> ShardRecord:
    """Raises DataError, with file and line, for a row that cannot be used."""
    finished = _finished(task)
    if finished:
        return finished
    tokenizer = load_tokenizer(task.tokenizer_dir)
    examples = list(_examples(task, tokenizer))
    tokenized = tokenize(examples, tokenizer, task.config)
    blocks = build_blocks(tokenized.documents, task.config.block_length, _pad_id(tokenizer))
    write_file(task.path, lambda temporary: _write_blocks(temporary, blocks))
    record = _describe(task.path, len(examples), tokenized, blocks)
    write_json(_record_path(task), asdict(record))
    return record


def _finished(task: ShardTask) -> ShardRecord | None:
    """The record is written last, so it vouches for the shard; the digest finds later damage."""
    if not _record_path(task).exists() or not task.path.exists():
        return None
    record = ShardRecord(**read_json(_record_path(task)))
    return record if file_digest(task.path) == record.digest else None


def _record_path(task: ShardTask) -> Path:
    return task.path.with_suffix(".json")


def _examples(task: ShardTask, tokenizer: Tokenizer) -> Iterator[Example]:
    for part in task.slices:
        for number, row in read_slice(part):
            key = row_key(row)
            if key not in task.keys:
                continue
            place = f"{part.file}:{number}"
            try:
                yield Example(place, key, segments(row, task.config, tokenizer))
            except RowProblem as problem:
                raise DataError(f"{place}: {problem}") from problem


def _pad_id(tokenizer: Tokenizer) -> int:
    # Padding has no loss and no document, so any id will do where the tokenizer names none.
    return int(tokenizer.pad_token_id or 0)


def _write_blocks(path: Path, blocks: Blocks) -> None:
    from safetensors.numpy import save_file

    keys = np.frombuffer(bytes.fromhex("".join(blocks.keys)), dtype=np.uint8)
    arrays = {
        "input_ids": blocks.input_ids,
        "labels": blocks.labels,
        "position_ids": blocks.position_ids,
        "document_ids": blocks.document_ids,
        "document_keys": keys.reshape(-1, KEY_BYTES),
    }
    save_file(arrays, path)


def _describe(path: Path, num_rows: int, tokenized: Tokenized, blocks: Blocks) -> ShardRecord:
    return ShardRecord(
        file=path.name,
        num_bytes=path.stat().st_size,
        digest=file_digest(path),
        num_blocks=len(blocks.input_ids),
        num_documents=len(blocks.keys),
        num_tokens=int(np.count_nonzero(blocks.document_ids != NO_DOCUMENT)),
        num_loss_tokens=int(np.count_nonzero(blocks.labels != IGNORED)),
        rows=num_rows,
        truncated=tokenized.truncated,
        dropped=tokenized.dropped,
        without_loss=tokenized.without_loss,
    )

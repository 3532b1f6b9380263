"""Make one shard: read slices, keep the chosen rows, tokenise, pack, write.

In: a ShardTask, which pickles. Out: a MadeShard, which pickles too, and a shard of the same bytes
in whatever process or order. A shard that is already there whole is not made again.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.data.block_files import map_blocks, write_blocks
from orchestrator.data.formats import Tokenizer, example_key, segments
from orchestrator.data.keys import KeyOrders, key_order, key_orders
from orchestrator.data.manifest import Role, ShardRecord
from orchestrator.data.packing import Blocks, build_blocks
from orchestrator.data.selection import Portion
from orchestrator.data.slices import RowProblem, read_options
from orchestrator.data.sources import place, read_slice
from orchestrator.data.store import open_store
from orchestrator.data.tokenizing import Example, load_tokenizer, tokenize
from orchestrator.data_config import DataConfig
from orchestrator.errors import DataError
from orchestrator.files import file_digest, record_digest


@dataclass(frozen=True, eq=False)
class ShardTask:
    portions: tuple[Portion, ...]
    role: Role
    index: int
    config: DataConfig
    tokenizer_dir: str
    place: str
    """A store's, which belongs to one recipe alone."""

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index:05d}"

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors"

    @property
    def rows_digest(self) -> str:
        """Names the rows that the shard is made of, but for the files that they are in."""
        return record_digest([_rows(portion) for portion in self.portions])

    @property
    def counts_unreadable(self) -> bool:
        """Whether rows without a key are its own: of rows that both roles read, train has them."""
        return self.role == "train" or self.config.held_out is not None


def _rows(portion: Portion) -> list[Any]:
    taken = portion.taken
    chosen = (
        [portion.keys.start, portion.keys.end]
        if taken is None
        else sha256(taken.tobytes()).hexdigest()
    )
    form = portion.form
    read_as = [form.format, form.template, form.fields.model_dump()]
    return [portion.part.start, portion.part.end, read_as, chosen]


@dataclass
class _Reading:
    """What was seen while the rows went by."""

    rows: int = 0
    bad: list[dict[str, str]] = field(default_factory=list)


class MadeShard(NamedTuple):
    record: ShardRecord
    way: str | None
    """How token ids were found; None where none were, since the shard was there or is empty."""


def prepare_shard(task: ShardTask) -> MadeShard:
    """Raises DataError, with file and line, for a row that cannot be used and is not skipped."""
    finished = _finished(task)
    if finished:
        return MadeShard(finished, None)
    tokenizer = load_tokenizer(task.tokenizer_dir)
    reading = _Reading()
    config = task.config
    tokenized = tokenize(
        _examples(task, tokenizer, reading), tokenizer, config.block_length, config.overlong
    )
    blocks = build_blocks(
        tokenized.documents,
        config.block_length,
        _pad_id(tokenizer),
        len(tokenizer),
    )
    store = open_store(task.place)
    path = store.write(task.file, lambda temporary: write_blocks(temporary, blocks))
    record = describe_shard(
        path,
        blocks,
        rows=reading.rows,
        truncated=tokenized.truncated,
        split=tokenized.split,
        dropped=tokenized.dropped,
        without_loss=tokenized.without_loss,
        bad_rows=len(reading.bad),
    )
    store.write_record(
        _record_name(task),
        {"shard": asdict(record), "bad_rows": reading.bad, "rows": task.rows_digest},
    )
    return MadeShard(record, tokenized.way)


def describe_shard(
    path: Path,
    blocks: Blocks,
    *,
    rows: int,
    truncated: int = 0,
    split: int = 0,
    dropped: int = 0,
    without_loss: int = 0,
    bad_rows: int = 0,
) -> ShardRecord:
    """The record of blocks that were written to a path; the counts are of their making."""
    return ShardRecord(
        file=path.name,
        max_documents=blocks.max_documents,
        num_bytes=path.stat().st_size,
        digest=file_digest(path),
        num_blocks=len(blocks.input_ids),
        num_documents=len(blocks.document_keys),
        num_tokens=blocks.num_tokens,
        num_loss_tokens=blocks.num_labels,
        rows=rows,
        truncated=truncated,
        split=split,
        dropped=dropped,
        without_loss=without_loss,
        bad_rows=bad_rows,
    )


def document_orders(task: ShardTask) -> KeyOrders:
    """Of the documents in a finished shard."""
    record = _finished(task)
    assert record is not None, f"{task.file} is not there"
    store = open_store(task.place)
    store.fetch([(record.file, record.digest)])
    return key_orders(map_blocks(store.folder / record.file).document_keys)


def bad_rows(place: str, shard: ShardRecord) -> list[dict[str, str]]:
    """Place and problem of each row that was skipped."""
    record = open_store(place).read_record(shard.file.replace(".safetensors", ".json"))
    return list(record["bad_rows"]) if record else []


def _finished(task: ShardTask) -> ShardRecord | None:
    """The record is written last, so it vouches for the shard, unless that was changed since."""
    store = open_store(task.place)
    content = store.read_record(_record_name(task))
    if content is None:
        return None
    if content.get("rows") != task.rows_digest:  # another version has cut the files otherwise
        return None
    record = ShardRecord(**content["shard"])
    return record if store.holds(record.file, record.num_bytes, record.digest) else None


def _record_name(task: ShardTask) -> str:
    return f"{task.name}.json"


def _examples(task: ShardTask, tokenizer: Tokenizer, reading: _Reading) -> Iterator[Example]:
    config = task.config
    for portion in task.portions:
        usable = 0
        for number, row in read_slice(portion.part, read_options(config)):
            is_ours = task.counts_unreadable
            try:
                if isinstance(row, RowProblem):
                    raise row
                key = example_key(row, portion.form)
                is_taken = portion.takes(usable, key_order(key))
                usable += 1
                if not is_taken:
                    continue
                is_ours = True
                parts = segments(row, portion.form, tokenizer)
            except RowProblem as problem:
                if config.on_bad_row == "error":
                    raise DataError(f"{place(portion.part, number)}: {problem}") from problem
                if is_ours and not portion.again:
                    where = place(portion.part, number)
                    reading.bad.append({"place": where, "problem": str(problem)})
                continue
            reading.rows += 1
            yield Example(partial(place, portion.part, number), key, parts)


def _pad_id(tokenizer: Any) -> int:
    # Padding has no loss and no document, so any id will do where the tokenizer names none.
    return int(tokenizer.pad_token_id or 0)

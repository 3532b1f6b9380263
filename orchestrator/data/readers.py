"""The table of file types: how files of each name ending are cut into slices and read.

In: a file's name. Out: its reader.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from orchestrator.data.arrow_files import plan_arrow, read_arrow
from orchestrator.data.csv_files import plan_csv, read_csv
from orchestrator.data.json_lists import is_json_list, write_list_as_lines
from orchestrator.data.lines import place_of_line, plan_lines, read_jsonl
from orchestrator.data.parquet_files import needed_parquet_copy, plan_parquet, read_parquet
from orchestrator.data.slices import NumberedRow, ReadOptions, Slice
from orchestrator.data.spool import Rewrite, decompress
from orchestrator.data.streams import (
    COMPRESSIONS,
    can_seek,
    compression,
    fingerprint,
    is_remote,
    path_part,
)
from orchestrator.data.tables import place_of_row
from orchestrator.data.text_files import read_text
from orchestrator.errors import DataError


def needed_plain_copy(file: str) -> Rewrite | None:
    cannot_be_entered = compression(file) or not can_seek(file, fingerprint(file))
    return decompress if cannot_be_entered else None


def needed_json_copy(file: str) -> Rewrite | None:
    return write_list_as_lines if is_json_list(file) else needed_plain_copy(file)


def needed_arrow_copy(file: str) -> Rewrite | None:
    return decompress if is_remote(file) else None  # only a local file can be mapped


@dataclass(frozen=True)
class Reader:
    """`path` is where the file's plain copy is, or the file itself."""

    plan: Callable[[str, str, int], tuple[list[int], int]]
    """Of path, file for messages, slice_bytes: borders, none if there is no row, and bytes."""
    read: Callable[[str, Slice, ReadOptions], Iterator[NumberedRow]]
    place: Callable[[str, Slice, int], str]
    needed_copy: Callable[[str], Rewrite | None] = needed_plain_copy
    """What makes the plain copy; None if the file can be read as it is."""
    may_be_compressed: bool = True
    plans_by_reading: bool = False


def is_known_file(file: str) -> bool:
    return _extension(file) in DATASET_READERS


def file_type(file: str) -> str:
    """What its rows are read by: `.jsonl.gz`. Files of equal bytes may hold different rows."""
    return _extension(file) + (compression(file) or "")


def reader_of(file: str) -> Reader:
    extension = _extension(file)
    if extension not in DATASET_READERS:
        known = " ".join(DATASET_READERS)
        raise DataError(
            f"{file}: the file's type is told by its name's ending, which must be one of {known} "
            f"(the text ones may be followed by {', '.join(COMPRESSIONS)}), but got "
            f"{extension!r}: rename or convert the file"
        )
    return DATASET_READERS[extension]


def _extension(file: str) -> str:
    path = PurePosixPath(path_part(file).lower())
    inner = PurePosixPath(path.stem).suffix
    if path.suffix in COMPRESSIONS and inner in DATASET_READERS:
        return inner if DATASET_READERS[inner].may_be_compressed else path.suffix
    return path.suffix


ARROW = Reader(plan_arrow, read_arrow, place_of_row, needed_arrow_copy, may_be_compressed=False)
DATASET_READERS: dict[str, Reader] = {
    ".jsonl": Reader(plan_lines, read_jsonl, place_of_line),
    ".json": Reader(plan_lines, read_jsonl, place_of_line, needed_json_copy),
    ".csv": Reader(plan_csv, read_csv, place_of_line, plans_by_reading=True),
    ".parquet": Reader(
        plan_parquet, read_parquet, place_of_row, needed_parquet_copy, may_be_compressed=False
    ),
    ".arrow": ARROW,
    ".feather": ARROW,
    ".txt": Reader(plan_lines, read_text, place_of_line),
}

"""The table of file types: how files of each name ending are cut into slices and read.

In: a file's name. Out: its reader.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from orchestrator.data.json_files import plan_json, plan_jsonl, read_json, read_jsonl
from orchestrator.data.slices import NumberedRow, Slice
from orchestrator.data.streams import COMPRESSIONS
from orchestrator.data.tables import plan_csv, plan_parquet, read_csv, read_parquet
from orchestrator.errors import DataError


@dataclass(frozen=True)
class Reader:
    plan: Callable[[str, int], list[Slice]]
    read: Callable[[Slice], Iterator[NumberedRow]]


def is_known_file(file: str) -> bool:
    return _extension(file) in DATASET_READERS


def reader_of(file: str) -> Reader:
    extension = _extension(file)
    if extension not in DATASET_READERS:
        known = " ".join(DATASET_READERS)
        raise DataError(
            f"{file}: the file's type is told by its name's ending, which must be one of {known} "
            f"(the text ones may be followed by .gz or .zst), but got {extension!r}: "
            "rename or convert the file"
        )
    return DATASET_READERS[extension]


def _extension(file: str) -> str:
    path = PurePosixPath(file)
    if path.suffix in COMPRESSIONS and PurePosixPath(path.stem).suffix != ".parquet":
        path = PurePosixPath(path.stem)
    return path.suffix


DATASET_READERS: dict[str, Reader] = {
    ".jsonl": Reader(plan_jsonl, read_jsonl),
    ".json": Reader(plan_json, read_json),
    ".csv": Reader(plan_csv, read_csv),
    ".parquet": Reader(plan_parquet, read_parquet),
}

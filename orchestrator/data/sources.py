"""From a source to its rows: find files, cut them into slices, read a slice, say where a row is.

In: a source as the configuration gives it. Out: files, slices, numbered rows. Where files are is
listing.py's and hub.py's business, how they are read that of readers.py.
"""

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from orchestrator.data.hub import downloaded
from orchestrator.data.listing import find_files, looks_like_path, not_found
from orchestrator.data.readers import reader_of
from orchestrator.data.slices import NumberedRow, ReadOptions, RowProblem, Slice, cut
from orchestrator.data.spool import Rewrite, spooled
from orchestrator.data.stdlib_docs import STDLIB_DOCS_VERSION, write_stdlib_docs
from orchestrator.data.streams import check_unchanged, fingerprint, is_remote, reading
from orchestrator.data_config import SourceConfig
from orchestrator.errors import DataError
from orchestrator.files import cache_dir, file_digest

STDLIB_DOCS = "stdlib-docs"

# A dry run answers in about a second; record borders of CSV are found at about 500 MB/s.
ESTIMATE_LIMIT_BYTES = 256 << 20


@dataclass(frozen=True)
class PlanTask:
    file: str
    slice_bytes: int


def source_files(source: SourceConfig) -> list[str]:
    """The files that hold the source's rows, in a fixed order; fetches or makes them if need be.

    Raises:
        DataError: the source is missing, empty or cannot be reached.
    """
    if source.path == STDLIB_DOCS:
        path = _stdlib_docs_path()
        if not path.exists():
            write_stdlib_docs(path)
        return [str(path)]
    return _files_there(source) or [str(downloaded(source))]


def content_digest(file: str) -> str:
    """Changes when the file's content does: a hash of it, or what a remote store says of it."""
    if is_remote(file):
        return fingerprint(file)
    with reading(file):
        return file_digest(Path(file))


def must_be_read(file: str) -> bool:
    """Whether `plan_file` has to read or copy the file, or to ask a store for parts of it."""
    if is_remote(file):
        return True
    return reader_of(file).plans_by_reading or _needed_copy(file, fingerprint(file)) is not None


def plan_file(task: PlanTask) -> list[Slice]:
    """Slices of about `slice_bytes` of text that together have each of the file's rows once.

    Raises:
        DataError: the file has no rows, is damaged or cannot be read.
    """
    found = fingerprint(task.file)
    path = _plain_path(task.file, found)
    borders, num_bytes = reader_of(task.file).plan(path, task.file, task.slice_bytes)
    check_unchanged(task.file, found)
    if not borders:
        raise DataError(
            f"{task.file}: a dataset's file must hold at least one row, but has none: "
            "add rows or remove the file"
        )
    return cut(task.file, found, borders, num_bytes)


def read_slice(part: Slice, options: ReadOptions) -> Iterator[NumberedRow]:
    """The slice's rows. Numbers grow, but leave out blank lines and the inner lines of a row.

    Raises:
        DataError: the file is missing, damaged, or has changed since it was cut.
    """
    check_unchanged(part.file, part.fingerprint)
    path = _plain_path(part.file, part.fingerprint)
    is_checked = False
    try:
        for numbered in reader_of(part.file).read(path, part, options):
            if isinstance(numbered[1], RowProblem) and not is_checked:
                check_unchanged(part.file, part.fingerprint)  # the better reason, if it is one
                is_checked = True
            yield numbered
    except DataError:
        check_unchanged(part.file, part.fingerprint)
        raise
    check_unchanged(part.file, part.fingerprint)


def place(part: Slice, number: int) -> str:
    """`file:line`, or `file:row` for tables and lists, of a row as `read_slice` numbers it.

    Lines are counted from the file's beginning, so ask only for what is shown to somebody. Far
    into a remote file it is the line after a byte.
    """
    path = _plain_path(part.file, part.fingerprint)
    return reader_of(part.file).place(path, part, number)


def estimate_slices(source: SourceConfig, slice_bytes: int) -> list[Slice] | None:
    """All slices if that is cheap, else None: nothing is fetched, written or read for long."""
    if source.path == STDLIB_DOCS:
        files = [str(path) for path in [_stdlib_docs_path()] if path.exists()]
    else:
        files = [] if is_remote(source.path) else _files_there(source)
    if not files or any(_needed_copy(file, fingerprint(file)) for file in files):
        return None
    to_read = [Path(file).stat().st_size for file in files if must_be_read(file)]
    if sum(to_read) > ESTIMATE_LIMIT_BYTES:
        return None
    return [part for file in files for part in plan_file(PlanTask(file, slice_bytes))]


def _files_there(source: SourceConfig) -> list[str]:
    """None are where the source can only be a hub id."""
    files = find_files(source.path, source.split)
    if not files and looks_like_path(source.path):
        raise not_found(source.path)
    return files


def _plain_path(file: str, expected: str) -> str:
    rewrite = _needed_copy(file, expected)
    return file if rewrite is None else spooled(file, expected, rewrite)


@lru_cache(maxsize=4096)
def _needed_copy(file: str, expected: str) -> Rewrite | None:
    return reader_of(file).needed_copy(file)


def _stdlib_docs_path() -> Path:
    name = f"stdlib-docs-{platform.python_version()}-{STDLIB_DOCS_VERSION}.jsonl"
    return cache_dir() / "datasets" / name

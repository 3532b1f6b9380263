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
from orchestrator.data.listing import check_all_is_read, find_files, looks_like_path, not_found
from orchestrator.data.readers import file_type, reader_of
from orchestrator.data.slices import NumberedRow, ReadOptions, RowProblem, Slice, cut
from orchestrator.data.spool import Rewrite, spooled
from orchestrator.data.stdlib_docs import STDLIB_DOCS_VERSION, write_stdlib_docs
from orchestrator.data.streams import (
    check_unchanged,
    fingerprint,
    is_remote,
    parts_of_chain,
    reading,
)
from orchestrator.data_config import DataConfig, SourceConfig
from orchestrator.digests import known_file_digest
from orchestrator.errors import DataError
from orchestrator.files import cache_dir

STDLIB_DOCS = "stdlib-docs"

# A dry run answers in about a second; record borders of CSV are found at about 500 MB/s.
ESTIMATE_LIMIT_BYTES = 256 << 20

# An actor's start and imports take as long as preparing some 10 MB of text does.
SMALL_BYTES = 8 << 20


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
        check_all_is_read(source)
        path = _stdlib_docs_path()
        if not path.exists():
            write_stdlib_docs(path)
        return [str(path)]
    return _files_there(source) or [str(downloaded(source))]


def content_digest(file: str) -> str:
    """Changes when the file's rows do: its type, and a hash of it or what a store says of it."""
    return f"{file_type(file)}:{_bytes_digest(file)}"


def must_be_read(file: str) -> bool:
    """Whether `plan_file` has to read or copy the file, or to ask a store for parts of it."""
    if is_remote(file):
        return True
    return reader_of(file).plans_by_reading or _needed_copy(file, fingerprint(file)) is not None


def plan_file(task: PlanTask) -> list[Slice]:
    """Slices of about `slice_bytes` of text that together have each of the file's rows once; none
    for a file without rows, of which some tools write one among others.

    Raises:
        DataError: the file is damaged or cannot be read.
    """
    found = fingerprint(task.file)
    path = _plain_path(task.file, found)
    borders, num_bytes = reader_of(task.file).plan(path, task.file, task.slice_bytes)
    check_unchanged(task.file, found)
    return cut(task.file, found, borders, num_bytes) if borders else []


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
        check_all_is_read(source)
        files = [str(path) for path in [_stdlib_docs_path()] if path.exists()]
    else:
        files = [] if is_remote(source.path) else _files_there(source)
    if not files or any(_needed_copy(file, fingerprint(file)) for file in files):
        return None
    to_read = [Path(file).stat().st_size for file in files if must_be_read(file)]
    if sum(to_read) > ESTIMATE_LIMIT_BYTES:
        return None
    slices = [part for file in files for part in plan_file(PlanTask(file, slice_bytes))]
    if not slices:
        raise no_rows(source.path)
    return slices


def is_small(config: DataConfig) -> bool:
    """Whether it is cheap to tell that a process of its own would take longer to start than all
    the text takes to prepare."""
    num_bytes = 0.0
    for source in (*config.train_sources, *config.held_out_sources):
        slices = estimate_slices(source, config.slice_bytes)
        if slices is None:
            return False
        num_bytes += max(1.0, source.weight) * sum(part.num_bytes for part in slices)
    return num_bytes <= SMALL_BYTES


def no_rows(path: str) -> DataError:
    """For a source of which no file has a row."""
    return DataError(
        f"{path}: a dataset must hold at least one row, but has none: add rows or remove it"
    )


def _bytes_digest(file: str) -> str:
    member, container = parts_of_chain(file)
    if container:
        return f"{member}{_bytes_digest(container)}"
    if is_remote(file):
        return fingerprint(file)
    with reading(file):
        return known_file_digest(Path(file))


def _files_there(source: SourceConfig) -> list[str]:
    """None are where the source can only be a hub id."""
    files = find_files(source)
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

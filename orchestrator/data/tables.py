"""Read tables: CSV and Parquet files.

In: a path or URL, or a slice. Out: slices, or a slice's numbered rows. pyarrow is imported inside a
function.
"""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import IO, Any

from orchestrator.data.slices import NumberedRow, Row, Slice, cut, cut_evenly
from orchestrator.data.streams import COMPRESSIONS, decode_line, open_stream, unreadable
from orchestrator.errors import DataError

PARQUET_BATCH_ROWS = 1024


def plan_csv(file: str, rows_per_slice: int) -> list[Slice]:
    can_seek = not file.endswith(COMPRESSIONS)
    starts = []
    num_rows = 0
    with open_stream(file) as stream:
        records = _csv_records(_Lines(stream, file))
        _csv_header(records, file)
        for number, offset, _ in records:
            if num_rows % rows_per_slice == 0:
                starts.append((number, offset if can_seek else 0))
            num_rows += 1
    return cut(file, starts, num_rows, rows_per_slice)


def read_csv(part: Slice) -> Iterator[NumberedRow]:
    with open_stream(part.file) as stream:
        lines = _Lines(stream, part.file)
        records = _csv_records(lines)
        header = _csv_header(records, part.file)
        if part.byte_offset:
            lines.seek(part.first_row, part.byte_offset)
        wanted = (record for record in records if record[0] >= part.first_row)
        for number, _, values in islice(wanted, part.num_rows):
            yield number, _csv_row(header, values, part.file, number)


class _Lines:
    """A stream's lines as text; knows how many lines and bytes went by."""

    def __init__(self, stream: IO[bytes], file: str) -> None:
        self.file = file
        self.number = 0
        self.offset = 0
        self._stream = stream

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._stream)
        self.number += 1
        self.offset += len(line)
        return decode_line(line, self.file, self.number)

    def seek(self, number: int, offset: int) -> None:
        """Go on with the line of this number, which starts at this offset."""
        self._stream.seek(offset)
        self.number, self.offset = number - 1, offset


def _csv_records(lines: _Lines) -> Iterator[tuple[int, int, list[str]]]:
    """Line number and byte offset of each record that is not blank, and its values."""
    table = csv.reader(lines, strict=True)
    while True:
        number, offset = lines.number + 1, lines.offset
        try:
            values = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{lines.file}:{number}: not valid CSV ({error}): correct the record's quotes, "
                "or save the file as JSONL"
            ) from error
        if values:
            yield number, offset, values


def _csv_header(records: Iterator[tuple[int, int, list[str]]], file: str) -> list[str]:
    number, _, header = next(records, (1, 0, []))
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise DataError(f"{file}:{number}: column {twice[0]!r} is there twice: rename one of them")
    return header


def _csv_row(header: list[str], values: list[str], file: str, number: int) -> Row:
    if len(values) != len(header):
        raise DataError(
            f"{file}:{number}: a row must have as many values as the header has columns "
            f"({len(header)}), but got {len(values)}: quote values that hold commas or line ends"
        )
    return dict(zip(header, values, strict=True))


def plan_parquet(file: str, rows_per_slice: int) -> list[Slice]:
    with _open_parquet(file) as table:
        return cut_evenly(file, table.metadata.num_rows, rows_per_slice)


def read_parquet(part: Slice) -> Iterator[NumberedRow]:
    first = part.first_row - 1
    end = first + part.num_rows
    with _open_parquet(part.file) as table:
        groups, row = _covering_row_groups(table, first, end)
        for batch in table.iter_batches(PARQUET_BATCH_ROWS, row_groups=groups):
            start = max(first, row)
            wanted = batch.slice(start - row, max(end - start, 0))
            yield from enumerate(wanted.to_pylist(), start=start + 1)
            row += batch.num_rows


def _covering_row_groups(table: Any, first: int, end: int) -> tuple[list[int], int]:
    """The row groups that hold rows from `first` up to `end`, and the first row of the first."""
    groups: list[int] = []
    first_covered = start = 0
    for group in range(table.num_row_groups):
        group_end = start + table.metadata.row_group(group).num_rows
        if group_end > first and start < end:
            first_covered = first_covered if groups else start
            groups.append(group)
        start = group_end
    return groups, first_covered


@contextmanager
def _open_parquet(file: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with open_stream(file) as stream, pyarrow.parquet.ParquetFile(stream) as table:
            yield table
    except pyarrow.ArrowException as error:
        raise unreadable(file, error) from error

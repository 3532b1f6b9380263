"""CSV files: cut where a record starts, which a line end within quotes is not.

In: a plain path or URL, a slice. Out: borders of slices, numbered rows.
"""

import csv
import re
from collections.abc import Iterator
from typing import IO

from orchestrator.data.lines import BOM, count_newlines, decode, first_character, too_long
from orchestrator.data.slices import NumberedRow, ReadOptions, Row, RowProblem, Slice
from orchestrator.data.streams import CHUNK_BYTES, open_plain
from orchestrator.errors import DataError

MAX_HEADER_BYTES = 1 << 20

# As the csv module reads: a quote opens a value only where a value starts; elsewhere it stands for
# itself. Possessive, since nothing is to be tried again. The last group is empty at the data's end.
QUOTED = re.compile(rb'"(?<![^,\n]")[^"]*+(?:""[^"]*+)*+("?)')
REST_OF_QUOTED = re.compile(rb'[^"]*+(?:""[^"]*+)*+("?)')


def plan_csv(path: str, file: str, slice_bytes: int) -> tuple[list[int], int]:
    """Borders where records start, and the rows' bytes; reads the file once.

    Raises:
        DataError: the header is wrong, or quotes are never closed.
    """
    with open_plain(path) as stream:
        start = _read_header(stream, file)[1]
        stream.seek(start)
        if not first_character(stream):
            return [], 0
        starts = list(_record_starts(stream, file, start, slice_bytes))
        size = stream.seek(0, 2)
    return [start, *(border for border in starts if border < size), size], size - start


def read_csv(path: str, part: Slice, options: ReadOptions) -> Iterator[NumberedRow]:
    # Python's own limit for a value, 128 KiB, is less than ours for a row.
    csv.field_size_limit(max(csv.field_size_limit(), options.max_row_bytes))
    with open_plain(path) as stream:
        header, _ = _read_header(stream, part.file)
        lines = _Lines(stream, part.start, options.max_row_bytes)
        table = csv.reader(lines, strict=True)
        while lines.offset < part.end:
            number = lines.start_record()
            try:
                values = next(table)
            except StopIteration:  # the file was cut since, which the caller will see
                return
            except (csv.Error, RowProblem) as error:
                yield number, error if isinstance(error, RowProblem) else _bad_record(error)
                lines.skip_record(part.file)
                continue
            if values:
                yield number, _row(header, values)


class _Lines:
    """A stream's lines as text, from a record's start on; knows how many bytes and lines went by.

    Raises:
        RowProblem: a record is too long, or not UTF-8. Go on with `skip_record`.
    """

    def __init__(self, stream: IO[bytes], offset: int, max_bytes: int) -> None:
        stream.seek(offset)
        self.offset = self.record_start = offset
        self._stream = stream
        self._max_bytes = max_bytes
        self._num_lines = self._lines_before = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        room = self._max_bytes - (self.offset - self.record_start)
        line = self._stream.readline(max(0, room) + 1)
        if not line:
            raise StopIteration
        if len(line) > room and not (room >= 0 and line.endswith(b"\n")):
            raise too_long(self._max_bytes)
        self._num_lines += 1
        text = decode(line if self.offset else line.removeprefix(BOM))
        self.offset += len(line)
        return text

    def start_record(self) -> int:
        """The number of the line in which it starts, from 1."""
        self.record_start, self._lines_before = self.offset, self._num_lines
        return self._num_lines + 1

    def skip_record(self, file: str) -> None:
        starts = _record_starts(self._stream, file, self.record_start, 1)
        self.offset = next(starts, None) or self._stream.seek(0, 2)
        passed = count_newlines(self._stream, self.record_start, self.offset)
        self._num_lines = self._lines_before + passed
        self._stream.seek(self.offset)


def _record_starts(stream: IO[bytes], file: str, start: int, every: int) -> Iterator[int]:
    """The first record start `every` bytes or more after the one before; `start` is one."""
    stream.seek(start)
    target = start + every
    opened: int | None = None  # where the quotes were opened that are not closed yet
    before = b"\n"
    offset = start - 1  # of data[0], which is the byte before the chunk
    while chunk := _chunk(stream):
        data = before + chunk
        position = 1
        if opened is not None:
            rest = REST_OF_QUOTED.match(data, 1)
            assert rest is not None
            position = rest.end()
            opened = None if rest[1] else opened
        while opened is None:
            quoted = QUOTED.search(data, position)
            end = quoted.start() if quoted else len(data)
            while offset + end >= target:
                newline = data.find(b"\n", max(position, target - 1 - offset), end)
                if newline < 0:
                    break
                position = newline + 1
                yield offset + position
                target = offset + position + every
            if quoted is None:
                break
            position = quoted.end()
            opened = None if quoted[1] else offset + quoted.start()
        before = data[-1:]
        offset += len(data) - 1
    if opened is not None:
        raise _not_csv(file, stream, opened, "the quotes that are opened here are never closed")


def _chunk(stream: IO[bytes]) -> bytes:
    """Does not end in a quote, but at the file's end: what that means depends on what follows."""
    chunk = stream.read(CHUNK_BYTES)
    while chunk.endswith(b'"') and (more := stream.read(4096)):
        chunk += more
    return chunk


def _read_header(stream: IO[bytes], file: str) -> tuple[list[str], int]:
    """Column names, and where the rows start."""
    lines = _Lines(stream, 0, MAX_HEADER_BYTES)
    try:
        header = next((values for values in csv.reader(lines, strict=True) if values), [])
    except (csv.Error, RowProblem) as error:
        raise _not_csv(file, stream, 0, f"in the header: {error}") from error
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise DataError(f"{file}:1: column {twice[0]!r} is there twice: rename one of them")
    return header, lines.offset


def _row(header: list[str], values: list[str]) -> Row | RowProblem:
    if len(values) != len(header):
        return RowProblem(
            f"a row must have as many values as the header has columns ({len(header)}), but got "
            f"{len(values)}: quote values that hold commas or line ends"
        )
    return dict(zip(header, values, strict=True))


def _bad_record(error: csv.Error) -> RowProblem:
    return RowProblem(
        f"a record must be valid CSV, but this one is not ({error}): correct its quotes"
    )


def _not_csv(file: str, stream: IO[bytes], offset: int, reason: str) -> DataError:
    line = count_newlines(stream, 0, offset) + 1
    return DataError(
        f"{file}:{line}: not valid CSV ({reason}): correct the record's quotes, or save the file "
        "as JSONL"
    )

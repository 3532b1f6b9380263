"""Text files: a row is a line, a paragraph or the whole file, as in the `datasets` text builder.

In: a plain path or URL, a slice. Out: numbered rows with one column, `text`. Line ends are \\n.
"""

import sys
from collections.abc import Callable, Iterator
from typing import IO

from orchestrator.data.lines import BOM, decode, find_line_start, lines_from, too_long
from orchestrator.data.slices import NumberedRow, ReadOptions, Row, RowProblem, Slice
from orchestrator.data.streams import open_plain

TEXT_COLUMN = "text"


def read_text(path: str, part: Slice, options: ReadOptions) -> Iterator[NumberedRow]:
    with open_plain(path) as stream:
        yield from SAMPLERS[options.sample_by](stream, part, options.max_row_bytes)


def _lines(stream: IO[bytes], part: Slice, max_bytes: int) -> Iterator[NumberedRow]:
    first = find_line_start(stream, part.start, part.end)
    for number, _, line in lines_from(stream, first, part.end, max_bytes):
        if isinstance(line, RowProblem):
            yield number, line
        elif line.strip():
            yield number, _row(line.rstrip(b"\r\n"))


def _paragraphs(stream: IO[bytes], part: Slice, max_bytes: int) -> Iterator[NumberedRow]:
    """A paragraph belongs to the slice in which the blank line before it starts."""
    first = find_line_start(stream, part.start, part.end)
    if first >= part.end:
        return
    may_start = part.start == 0
    begun = 0  # the number of the paragraph's first line; 0 between paragraphs
    content: bytes | RowProblem = b""
    for number, start, line in lines_from(stream, first, sys.maxsize, max_bytes):
        if not isinstance(line, RowProblem) and not line.strip():
            if begun:
                yield begun, _finished(content)
            begun, content = 0, b""
            may_start = start < part.end
        elif begun:
            content = _joined(content, line, max_bytes)
        elif may_start:
            begun, content = number, line
        if not begun and not may_start and start >= part.end:
            return
    if begun:
        yield begun, _finished(content)


def _joined(
    content: bytes | RowProblem, line: bytes | RowProblem, max_bytes: int
) -> bytes | RowProblem:
    if isinstance(content, RowProblem):
        return content
    if isinstance(line, RowProblem) or len(content) + len(line) > max_bytes:
        return too_long(max_bytes)
    return content + line


def _finished(content: bytes | RowProblem) -> Row | RowProblem:
    return content if isinstance(content, RowProblem) else _row(content.rstrip(b"\r\n"))


def _document(stream: IO[bytes], part: Slice, max_bytes: int) -> Iterator[NumberedRow]:
    """The first slice has it."""
    if part.start == 0:
        stream.seek(0)
        content = stream.read(max_bytes + 1)
        if len(content) > max_bytes:
            yield 1, too_long(max_bytes)
        else:
            yield 1, _row(content.removeprefix(BOM))


def _row(content: bytes) -> Row | RowProblem:
    try:
        return {TEXT_COLUMN: decode(content).replace("\r\n", "\n")}
    except RowProblem as problem:
        return problem


SAMPLERS: dict[str, Callable[[IO[bytes], Slice, int], Iterator[NumberedRow]]] = {
    "line": _lines,
    "paragraph": _paragraphs,
    "document": _document,
}

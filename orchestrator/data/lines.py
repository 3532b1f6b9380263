"""Files of lines, cut anywhere: a slice has the lines that start within its bytes. And JSONL.

In: a plain path or URL, a slice. Out: borders of slices; numbered lines and rows.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import IO

from orchestrator.data.slices import NumberedRow, ReadOptions, Row, RowProblem, Slice
from orchestrator.data.streams import CHUNK_BYTES, is_remote, open_plain

BOM = b"\xef\xbb\xbf"

# Counting the lines before a row is worth seconds of download, not minutes.
MAX_COUNTED_REMOTE_BYTES = 256 << 20

_decode_json = json.JSONDecoder().raw_decode


def plan_lines(path: str, file: str, slice_bytes: int) -> tuple[list[int], int]:
    """Borders at any byte, and the file's size. No borders: the file has no line but blank ones."""
    with open_plain(path) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        if not first_character(stream):
            return [], 0
    count = max(1, round(size / slice_bytes))
    return [size * index // count for index in range(count + 1)], size


def first_character(stream: IO[bytes]) -> bytes:
    """The first byte after a byte order mark and white space; empty at the end."""
    while chunk := stream.read(CHUNK_BYTES):
        if content := chunk.removeprefix(BOM).strip():
            return content[:1]
    return b""


def read_jsonl(path: str, part: Slice, options: ReadOptions) -> Iterator[NumberedRow]:
    with open_plain(path) as stream:
        first = find_line_start(stream, part.start, part.end)
        for number, _, line in lines_from(stream, first, part.end, options.max_row_bytes):
            if isinstance(line, RowProblem):
                yield number, line
            elif line := line.strip():
                yield number, parse_row(line)


def parse_row(line: bytes) -> Row | RowProblem:
    try:
        text = decode(line)
        row, end = _decode_json(text)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except RowProblem as problem:
        return problem
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg}, character {error.pos + 1}"
        return RowProblem(
            f"each line must be one JSON object, but this one is not valid JSON ({reason}): "
            "correct or delete the line"
        )
    if not isinstance(row, dict):
        return RowProblem(
            f"a row must be a JSON object, but got {type(row).__name__}: "
            'write it as {"column": value, ...}'
        )
    return row


def find_line_start(stream: IO[bytes], start: int, end: int) -> int:
    """Go to the first line that starts at `start` or later; `end` or more if none does before."""
    if not start:
        stream.seek(0)
        return 0
    stream.seek(start - 1)
    return _skip_line(stream, start - 1, end)


def lines_from(
    stream: IO[bytes], offset: int, end: int, max_bytes: int
) -> Iterator[tuple[int, int, bytes | RowProblem]]:
    """Number, from 1, start and content of each line that starts at `offset`, where the stream is,
    or later and before `end`; line ends included, a byte order mark left out."""
    number = 0
    while offset < end:
        line = stream.readline(max_bytes + 1)
        if not line:
            return
        number += 1
        start = offset
        offset += len(line)
        if len(line) > max_bytes and not line.endswith(b"\n"):
            yield number, start, too_long(max_bytes)
            offset = _skip_line(stream, offset, end)
        else:
            yield number, start, line if start else line.removeprefix(BOM)


def _skip_line(stream: IO[bytes], offset: int, end: int) -> int:
    """Where the next line starts, if that is before `end`."""
    while offset < end:
        piece = stream.readline(CHUNK_BYTES)
        if not piece:
            return end
        offset += len(piece)
        if piece.endswith(b"\n"):
            break
    return offset


def decode(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise RowProblem(
            f"text must be UTF-8, but byte {error.start + 1} of this row is "
            f"0x{content[error.start]:02x}: save the file as UTF-8"
        ) from error


def too_long(max_bytes: int) -> RowProblem:
    return RowProblem(
        f"a row must have at most data.max_row_bytes={max_bytes} bytes, but this one is longer: "
        "shorten it, or raise data.max_row_bytes"
    )


def place_of_line(path: str, part: Slice, number: int) -> str:
    if is_remote(path) and part.start > MAX_COUNTED_REMOTE_BYTES:
        return f"{part.file}: line {number} after byte {part.start}"
    return f"{part.file}:{_lines_before(path, part.fingerprint, part.start) + number}"


@lru_cache(maxsize=1024)
def _lines_before(path: str, fingerprint: str, start: int) -> int:
    """Lines of which the slice has not the start."""
    if not start:
        return 0
    with open_plain(path) as stream:
        # The line that holds the byte before the slice is not the slice's, wherever it ends.
        return count_newlines(stream, 0, start - 1) + 1


def count_newlines(stream: IO[bytes], start: int, end: int) -> int:
    stream.seek(start)
    count = 0
    while start < end and (chunk := stream.read(min(CHUNK_BYTES, end - start))):
        count += chunk.count(b"\n")
        start += len(chunk)
    return count

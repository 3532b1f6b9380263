"""Read JSONL files, and JSON files that hold one list.

In: a path or URL, or a slice. Out: slices, or a slice's numbered rows.
"""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from orchestrator.data.slices import NumberedRow, Row, Slice, cut, cut_evenly
from orchestrator.data.streams import COMPRESSIONS, decode_line, open_stream
from orchestrator.errors import DataError


def plan_jsonl(file: str, rows_per_slice: int) -> list[Slice]:
    can_seek = not file.endswith(COMPRESSIONS)
    starts = []
    num_rows = offset = 0
    with open_stream(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                if num_rows % rows_per_slice == 0:
                    starts.append((number, offset if can_seek else 0))
                num_rows += 1
            offset += len(line)
    return cut(file, starts, num_rows, rows_per_slice)


def read_jsonl(part: Slice) -> Iterator[NumberedRow]:
    with open_stream(part.file, part.byte_offset) as stream:
        lines = enumerate(stream, start=part.first_row if part.byte_offset else 1)
        filled = ((n, line) for n, line in lines if n >= part.first_row and line.strip())
        for number, line in islice(filled, part.num_rows):
            yield number, _parse_line(line, part.file, number)


def _parse_line(line: bytes, file: str, number: int) -> Row:
    text = decode_line(line, file, number)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file}:{number}: each line must be one JSON object, but this one is not valid JSON "
            f"({error}): correct or delete the line"
        ) from error
    return _checked(row, file, number)


def _checked(row: object, file: str, number: int) -> Row:
    if not isinstance(row, dict):
        raise DataError(
            f"{file}:{number}: a row must be a JSON object, but got {type(row).__name__}: "
            'write it as {"column": value, ...}'
        )
    return row


def plan_json(file: str, rows_per_slice: int) -> list[Slice]:
    if not _is_json_list(file):
        return plan_jsonl(file, rows_per_slice)
    return cut_evenly(file, len(_load_json_list(file)), rows_per_slice)


def read_json(part: Slice) -> Iterator[NumberedRow]:
    if not _is_json_list(part.file):
        yield from read_jsonl(part)
        return
    first = part.first_row - 1
    rows = _load_json_list(part.file)[first : first + part.num_rows]
    for number, row in enumerate(rows, start=part.first_row):
        yield number, _checked(row, part.file, number)


def _is_json_list(file: str) -> bool:
    with open_stream(file) as stream:
        for line in stream:
            if text := line.removeprefix(b"\xef\xbb\xbf").strip():
                return text.startswith(b"[")
    return False


def _load_json_list(file: str) -> list[Any]:
    with open_stream(file) as stream:
        text = "".join(
            decode_line(line, file, number) for number, line in enumerate(stream, start=1)
        )
    try:
        rows: list[Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise DataError(
            f"{file}:{line}: the file must be one JSON list of objects, but it is not valid JSON "
            f"({error}): correct it, or write one object per line"
        ) from error
    return rows

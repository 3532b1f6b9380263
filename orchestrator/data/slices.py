"""The unit of reading: some rows of one file.

In: where a file's rows start, or how many there are. Out: slices of equal size. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import DataError

Row = dict[str, Any]
NumberedRow = tuple[int, Row]


@dataclass(frozen=True)
class Slice:
    """Some rows of a file. `first_row` counts from 1: lines in JSONL and CSV, rows in others."""

    file: str
    first_row: int
    num_rows: int
    byte_offset: int
    """Where the first row starts in an uncompressed JSONL or CSV file. 0: every slice reads from
    the file's start, which costs more the more slices there are."""


def cut_evenly(file: str, num_rows: int, rows_per_slice: int) -> list[Slice]:
    starts = [(row + 1, 0) for row in range(0, num_rows, rows_per_slice)]
    return cut(file, starts, num_rows, rows_per_slice)


def cut(
    file: str, starts: Sequence[tuple[int, int]], num_rows: int, rows_per_slice: int
) -> list[Slice]:
    """Slices from the first row and byte offset of each."""
    if not num_rows:
        raise DataError(
            f"{file}: a dataset's file must hold at least one row, but has none: "
            "add rows or remove the file"
        )
    sizes = [min(rows_per_slice, num_rows - done) for done in range(0, num_rows, rows_per_slice)]
    return [
        Slice(file, first_row, size, offset)
        for (first_row, offset), size in zip(starts, sizes, strict=True)
    ]

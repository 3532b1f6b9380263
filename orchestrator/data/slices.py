"""The unit of reading: some rows of one file, and what is wrong with a row.

In: how large a file is and where it may be cut. Out: slices of about equal size. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.data_config import DataConfig

Row = dict[str, Any]


class RowProblem(ValueError):
    """What is wrong with a row: rule, value and remedy, without the place."""


NumberedRow = tuple[int, Row | RowProblem]
"""A row's number within its slice, counted from 1, and the row or why it cannot be read."""


@dataclass(frozen=True)
class Slice:
    file: str
    fingerprint: str
    """The file's when it was cut; another one means that the file has changed since."""
    start: int
    end: int
    """Bytes of the decompressed file for formats of lines: the slice has the rows that start at
    `start` or later and before `end`. Row numbers from 0 for tables."""
    num_bytes: int
    """About as much text as it holds."""


@dataclass(frozen=True)
class ReadOptions:
    sample_by: str = "line"
    """For text files; see DataConfig."""
    max_row_bytes: int = 4 << 20


def read_options(config: DataConfig) -> ReadOptions:
    return ReadOptions(config.sample_by, config.max_row_bytes)


def cut(file: str, fingerprint: str, borders: Sequence[int], num_bytes: int) -> list[Slice]:
    """Slices between neighbouring borders, of which the last is the end; `num_bytes` is the whole
    file's, shared out in proportion."""
    whole = max(1, borders[-1] - borders[0])
    return [
        Slice(file, fingerprint, start, end, num_bytes * (end - start) // whole)
        for start, end in zip(borders, borders[1:], strict=False)
    ]

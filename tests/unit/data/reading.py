"""How the tests of the data package read a file: in slices, as preparing does."""

from pathlib import Path

from orchestrator.data.slices import ReadOptions, Row, RowProblem
from orchestrator.data.sources import PlanTask, place, plan_file, read_slice

ReadRow = tuple[str, Row | str]
"""Where a row is, and the row or what is wrong with it."""

WHOLE = 1 << 30
DEFAULTS = ReadOptions()


def read_file(
    path: Path | str, slice_bytes: int = WHOLE, options: ReadOptions = DEFAULTS
) -> list[ReadRow]:
    """All rows of a file, each with its line or row number as the user is told it."""
    rows: list[ReadRow] = []
    for part in plan_file(PlanTask(str(path), slice_bytes)):
        for number, row in read_slice(part, options):
            where = place(part, number)
            assert where.startswith(f"{path}:")
            shown = str(row) if isinstance(row, RowProblem) else row
            rows.append((where.rpartition(":")[2], shown))
    return rows


def rows_of(path: Path | str, slice_bytes: int = WHOLE) -> list[Row | str]:
    return [row for _, row in read_file(path, slice_bytes)]

"""What Parquet and Arrow files share: where to cut them, and record batches as rows.

In: sizes of parts; record batches. Out: borders of slices; rows. Rows hold whatever Python has for
a column's type, so also dates, decimals and bytes, which JSON does not know.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from orchestrator.data.lines import too_long
from orchestrator.data.slices import NumberedRow, Row, RowProblem, Slice
from orchestrator.errors import DataError

# Rows become Python objects this many bytes at a time.
BATCH_BYTES = 4 << 20
MAX_BATCH_ROWS = 4096


def row_borders(groups: Iterable[tuple[int, int]], slice_bytes: int) -> tuple[list[int], int]:
    """Borders that follow groups of rows, given as (rows, bytes), and the bytes of all.

    Small groups share a slice; a large one is cut into equal numbers of rows.
    """
    borders = [0]
    row = total = filled = 0
    for num_rows, num_bytes in groups:
        if not num_rows:
            continue
        total += num_bytes
        if filled and filled + num_bytes > slice_bytes:
            borders.append(row)
            filled = 0
        parts = min(num_rows, max(1, -(-num_bytes // slice_bytes)))
        borders += [row + num_rows * index // parts for index in range(1, parts)]
        filled = max(1, num_bytes // parts + (filled if parts == 1 else 0))
        row += num_rows
    return ([*borders, row] if row else []), total


def batch_rows(num_rows: int, num_bytes: int) -> int:
    """Rows to read at once."""
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * num_rows // max(1, num_bytes)))


def numbered_rows(
    batches: Iterable[Any], first: int, part: Slice, max_row_bytes: int
) -> Iterator[NumberedRow]:
    """The slice's rows of record batches, the first of which starts with row `first`."""
    for batch in batches:
        start, end = max(first, part.start), min(first + batch.num_rows, part.end)
        if start < end:
            rows = _rows(batch.slice(start - first, end - start), max_row_bytes)
            yield from enumerate(rows, start=start - part.start + 1)
        first += batch.num_rows
        if first >= part.end:
            return


def check_columns(file: str, names: list[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{file}: column {twice[0]!r} is there twice: rename one of them")


def place_of_row(path: str, part: Slice, number: int) -> str:
    return f"{part.file}:{part.start + number}"


def _rows(batch: Any, max_row_bytes: int) -> Iterable[Row | RowProblem]:
    if batch.nbytes <= max_row_bytes:
        rows = _converted(batch)
        if not isinstance(rows, RowProblem):
            return rows
    return (_row(batch.slice(index, 1), max_row_bytes) for index in range(batch.num_rows))


def _row(batch: Any, max_row_bytes: int) -> Row | RowProblem:
    batch = _by_itself(batch)
    if batch.nbytes > max_row_bytes:
        return too_long(max_row_bytes)
    rows = _converted(batch)
    return rows if isinstance(rows, RowProblem) else rows[0]


def _by_itself(row: Any) -> Any:
    """A row whose bytes are its own: one that refers to a dictionary, or to buffers of values that
    it views, counts them whole."""
    import pyarrow

    columns = []
    for column in row.columns:
        try:
            columns.append(column.cast(_plain_type(column.type)))
        except pyarrow.ArrowException:  # left as it is, and counted so
            columns.append(column)
    return pyarrow.RecordBatch.from_arrays(columns, names=row.schema.names)


def _plain_type(of: Any) -> Any:
    from pyarrow import binary, large_list, list_, string, struct, types

    if types.is_dictionary(of):
        return _plain_type(of.value_type)
    if types.is_string_view(of):
        return string()
    if types.is_binary_view(of):
        return binary()
    if types.is_list(of):
        return list_(_plain_type(of.value_type))
    if types.is_large_list(of):
        return large_list(_plain_type(of.value_type))
    if types.is_struct(of):
        return struct([field.with_type(_plain_type(field.type)) for field in of])
    return of


def _converted(batch: Any) -> list[Row] | RowProblem:
    import pyarrow

    try:
        rows: list[Row] = batch.to_pylist()
    except (ValueError, OverflowError, KeyError, pyarrow.ArrowException) as error:
        # Text that is not UTF-8, a date after the year 9999, a time zone that does not exist.
        return RowProblem(f"a value cannot be read ({error}): correct it, or leave the row out")
    return rows

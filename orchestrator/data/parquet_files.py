"""Parquet files: slices follow row groups, and large row groups are cut.

In: a path or URL, a slice. Out: borders of slices, numbered rows, and a copy in smaller row groups.
pyarrow is imported inside functions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.data.slices import NumberedRow, ReadOptions, Slice
from orchestrator.data.spool import Rewrite, decompress
from orchestrator.data.streams import CHUNK_BYTES, can_seek, fingerprint, open_plain, reading
from orchestrator.data.tables import batch_rows, check_columns, numbered_rows, row_borders

# A row group is read from its beginning, at about 1 GB/s. One of 64 MiB costs its 8 slices of 8 MiB
# 0.03 s each on average, a hundredth of what tokenising them takes; larger ones are rewritten.
MAX_ROW_GROUP_BYTES = 64 << 20


def plan_parquet(path: str, file: str, slice_bytes: int) -> tuple[list[int], int]:
    with _open(path) as table:
        check_columns(file, table.schema_arrow.names)
        return row_borders(_row_groups(table), slice_bytes)


def read_parquet(path: str, part: Slice, options: ReadOptions) -> Iterator[NumberedRow]:
    with _open(path) as table:
        groups: list[int] = []
        num_rows = num_bytes = first = row = 0
        for index, (group_rows, group_bytes) in enumerate(_row_groups(table)):
            if row < part.end and row + group_rows > part.start:
                first = first if groups else row
                groups.append(index)
                num_rows += group_rows
                num_bytes += group_bytes
            row += group_rows
        batches = table.iter_batches(
            batch_rows(num_rows, num_bytes), row_groups=groups, use_threads=False
        )
        yield from numbered_rows(batches, first, part, options.max_row_bytes)


def needed_parquet_copy(file: str) -> Rewrite | None:
    if not can_seek(file, fingerprint(file)):
        return decompress
    with _open(file) as table:
        is_large = any(size > MAX_ROW_GROUP_BYTES for _, size in _row_groups(table))
    return write_small_row_groups if is_large else None


def write_small_row_groups(file: str, copy: Path) -> None:
    from pyarrow.parquet import ParquetWriter

    with _open(file) as table:
        sizes = list(_row_groups(table))
        rows = batch_rows(sum(rows for rows, _ in sizes), sum(size for _, size in sizes))
        with ParquetWriter(copy, table.schema_arrow) as writer:
            for batch in table.iter_batches(rows, use_threads=False):
                writer.write_batch(batch)


def _row_groups(table: Any) -> Iterator[tuple[int, int]]:
    """Rows and uncompressed bytes of each."""
    for index in range(table.num_row_groups):
        group = table.metadata.row_group(index)
        yield group.num_rows, group.total_byte_size


@contextmanager
def _open(path: str) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with reading(path), open_plain(path) as stream:
        # Without these two, pyarrow loads a row group's columns whole: 169 MB for one of 187 MB.
        with ParquetFile(stream, buffer_size=CHUNK_BYTES, pre_buffer=False) as table:
            yield table

"""Arrow IPC files and streams, as `datasets` and Feather write them, mapped into memory.

In: a local path, a slice. Out: borders of slices, numbered rows. pyarrow is imported inside
functions. What lies before a slice is passed unread, at about 4 microseconds a record batch of a
stream and 16 of a file; where it is compressed, it has to be decompressed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.data.slices import NumberedRow, ReadOptions, Slice
from orchestrator.data.streams import reading
from orchestrator.data.tables import batch_rows, check_columns, numbered_rows, row_borders

FILE_MAGIC = b"ARROW1"


def plan_arrow(path: str, file: str, slice_bytes: int) -> tuple[list[int], int]:
    with _open(path) as (names, batches):
        check_columns(file, names)
        return row_borders(((batch.num_rows, batch.nbytes) for batch in batches), slice_bytes)


def read_arrow(path: str, part: Slice, options: ReadOptions) -> Iterator[NumberedRow]:
    with _open(path) as (_, batches):
        yield from numbered_rows(_in_parts(batches, part), 0, part, options.max_row_bytes)


def _in_parts(batches: Iterator[Any], part: Slice) -> Iterator[Any]:
    """Record batches may be of any size; those before the slice stay as they are."""
    first = 0
    for batch in batches:
        end = first + batch.num_rows
        size = batch_rows(batch.num_rows, batch.nbytes) if end > part.start else end - first
        for start in range(0, batch.num_rows, max(1, size)):
            yield batch.slice(start, size)
        first = end


@contextmanager
def _open(path: str) -> Iterator[tuple[list[str], Iterator[Any]]]:
    """Column names and record batches."""
    import pyarrow

    with reading(path), pyarrow.memory_map(path) as source:
        magic = source.read(len(FILE_MAGIC))
        source.seek(0)
        if magic == FILE_MAGIC:
            file = pyarrow.ipc.open_file(source)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
            yield file.schema.names, batches
        else:
            with pyarrow.ipc.open_stream(source) as stream:
                yield stream.schema.names, stream

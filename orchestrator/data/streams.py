"""Open a local or remote file as a stream of bytes, decompressed.

In: a local path or an fsspec URL. Out: a stream, and its lines as text. A file that cannot be
opened, is damaged or is not UTF-8 ends in a DataError. fsspec and zstandard are imported inside
functions.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any, cast

from orchestrator.errors import DataError

COMPRESSIONS = (".gz", ".zst")


def is_remote(file: str) -> bool:
    return "://" in file


@contextmanager
def open_stream(file: str, byte_offset: int = 0) -> Iterator[IO[bytes]]:
    """From `byte_offset` on, which counts decompressed bytes."""
    try:
        with ExitStack() as stack:
            stream = stack.enter_context(_open_raw(file))
            if file.endswith(".gz"):
                stream = cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=stream)))
            elif file.endswith(".zst"):
                stream = stack.enter_context(_open_zstandard(stream))
            if byte_offset:
                stream.seek(byte_offset)
            yield stream
    except (OSError, EOFError, zlib.error, ImportError) as error:
        raise unreadable(file, error) from error


def unreadable(file: str, error: Exception) -> DataError:
    return DataError(
        f"{file}: cannot be read ({error}): check that it is whole and that you may read it"
    )


def decode_line(line: bytes, file: str, number: int) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}:{number}: text must be UTF-8, but byte {error.start + 1} of this line "
            f"is 0x{line[error.start]:02x}: save the file as UTF-8"
        ) from error
    return text.removeprefix("\ufeff") if number == 1 else text


def _open_raw(file: str) -> IO[bytes]:
    if not is_remote(file):
        return open(file, "rb")
    import fsspec

    return cast(IO[bytes], fsspec.open(file, "rb").open())


@contextmanager
def _open_zstandard(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    import zstandard

    # Not fsspec's compression="infer": with the zstandard package that stops without a word after
    # the first frame, and files that were written in parallel or joined with `cat` have several.
    decompressor = zstandard.ZstdDecompressor()
    try:
        with decompressor.stream_reader(stream, read_across_frames=True) as plain:
            yield io.BufferedReader(cast(Any, plain))
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error

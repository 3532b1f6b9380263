"""Open a local or remote file as a stream of bytes, and tell whether it has changed.

In: a local path or an fsspec URL. Out: streams, fingerprints. Whatever the system, a store or a
decompressor says ends in a DataError. fsspec and pyarrow are imported inside functions.
"""

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from orchestrator.errors import DataError, is_disk_full
from orchestrator.files import record_digest

CHUNK_BYTES = 1 << 20
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")

# Errors without a common base. One that is raised has its module loaded.
LIBRARY_ERRORS = (
    ("pyarrow", "ArrowException"),
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
    ("zipfile", "BadZipFile"),
)
# fsspec reads this much ahead. Its default for S3, 50 MiB, is fetched for each slice of 8 MiB.
AHEAD_BYTES = 4 << 20
# What stores say of a file, by fsspec's names. Hashes of its content (HTTP, GCS, GitHub, Hugging
# Face) stand for it wherever it is. The others tell it from its own earlier content only: an ETag
# may be made of size and time. They go from the surest to the least sure.
CONTENT_FIELDS = ("Content-MD5", "Digest", "md5Hash", "sha", "blob_id")
VERSION_FIELDS = (
    *("ETag", "etag", "e_tag", "VersionId", "generation"),
    *("Last-Modified", "LastModified", "last_modified", "updated", "mtime", "modified", "created"),
)


def is_remote(file: str) -> bool:
    return "://" in file


def open_store_path(url: str) -> tuple[Any, str]:
    """fsspec's file system of a path or URL, and what it calls the path there."""
    from fsspec.core import url_to_fs

    file_system, path = url_to_fs(url)
    return file_system, str(path)


@contextmanager
def open_plain(file: str) -> Iterator[IO[bytes]]:
    """The file's own bytes. Seekable, if `can_seek` says so."""
    with reading(file):
        if is_remote(file):
            file_system, path = open_store_path(file)
            is_whole = file.startswith("http") and not can_seek(file, fingerprint(file))
            # 0 is fsspec's name for one request that is read to its end.
            ahead = 0 if is_whole else AHEAD_BYTES
            raw = cast(Any, file_system.open(path, "rb", block_size=ahead))
            stream: IO[bytes] = io.BufferedReader(raw, CHUNK_BYTES)
        else:
            stream = open(file, "rb", buffering=CHUNK_BYTES)
        with stream:
            yield stream


@contextmanager
def open_decompressed(file: str) -> Iterator[IO[bytes]]:
    """From the beginning on; only `read` is sure to work."""
    with reading(file), open_plain(file) as stream:
        ending = compression(file)
        if ending is None:
            yield stream
        else:
            with DECOMPRESSORS[ending](stream) as plain:
                yield plain


def compression(file: str) -> str | None:
    ending = PurePosixPath(path_part(file)).suffix.lower()
    return ending if ending in COMPRESSIONS else None


def path_part(file: str) -> str:
    """What has the file's name: an address without its query, of a chain the first with a path."""
    if not is_remote(file):
        return file
    url = next(url for url in file.split("::") if is_remote(url))
    return url.partition("?")[0] if url.startswith("http") else url


@lru_cache(maxsize=4096)
def can_seek(file: str, fingerprint: str) -> bool:
    """Whether reading may start anywhere at the cost of what is read."""
    if not is_remote(file):
        return True
    if "::" in file:  # a member of an archive is decompressed from its beginning
        return False
    if not file.startswith("http"):
        return True
    with reading(file):
        file_system, path = open_store_path(file)
        try:
            with file_system.open(path, "rb", cache_type="none") as stream:
                stream.seek(1)
                stream.read(1)
        except ValueError:  # the server sends whole files only
            return False
    return True


def fingerprint(file: str) -> str:
    """Changes when the file is written again. Cheap: nothing of it is read."""
    with reading(file):
        member, container = parts_of_chain(file)
        if container:  # an archive's member changes with the archive
            return f"{member}{fingerprint(container)}"
        if is_remote(file):
            return _remote_identity(file)
        status = Path(file).stat()
        return f"{status.st_size}-{status.st_mtime_ns}"


def parts_of_chain(file: str) -> tuple[str, str]:
    """What is chosen from an archive, if anything, and the archive's own path or URL; two empty
    strings where the file is in none. simplecache:: and its like choose nothing."""
    if not is_remote(file):
        return "", ""
    head, chained, container = file.partition("::")
    return (f"{head}::" if is_remote(head) else "", container) if chained else ("", "")


def check_unchanged(file: str, expected: str) -> None:
    found = fingerprint(file)
    if found != expected:
        raise DataError(
            f"{file}: the file changed while it was being prepared: it must stay as it was "
            f"({expected}), but now is another ({found}): let its writer finish, and run again"
        )


@contextmanager
def reading(file: str) -> Iterator[None]:
    """Errors become a DataError that names the file. A full disk stays what it is."""
    try:
        yield
    except read_errors(is_remote(file)) as error:
        if is_disk_full(error):
            raise
        where = ", and that the store can be reached with these credentials"
        raise DataError(
            f"{file}: cannot be read ({shown_error(error)}): check that it is whole and that you "
            f"may read it{where if is_remote(file) else ''}"
        ) from error


def read_errors(remote: bool) -> tuple[type[BaseException], ...]:
    """What may be raised by reading; evaluate it in the `except` clause."""
    libraries = [
        getattr(sys.modules[module], name)
        for module, name in LIBRARY_ERRORS
        if module in sys.modules
    ]
    stores = (ValueError, NotImplementedError, ImportError) if remote else ()
    return (OSError, EOFError, zlib.error, lzma.LZMAError, *stores, *libraries)


def shown_error(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _remote_identity(file: str) -> str:
    file_system, path = open_store_path(file)
    file_system.invalidate_cache(path)  # a listing kept from before would hide a change
    info = file_system.info(path)
    hashes = [str(info[name]) for name in CONTENT_FIELDS if info.get(name)]
    if hashes:
        return record_digest([info.get("size"), *hashes])[:32]
    versions = [str(info[name]) for name in VERSION_FIELDS if info.get(name)]
    if not versions and file.startswith("http"):  # its ukey is made of the address alone
        raise DataError(
            f"{file}: a server must say when a file changes, but this one sends neither ETag, "
            "Last-Modified, Content-MD5 nor Digest: download the file and give its local path"
        )
    version = versions[0] if versions else str(file_system.ukey(path))
    return record_digest([file, info.get("size"), version])[:32]


def _open_zstandard(stream: IO[bytes]) -> Any:
    # It reads all frames, of which parallel compressors and `cat` write several, and notices a cut
    # file. zstandard's own reader takes a cut file for a whole one, fsspec's stops after a frame.
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd")


DECOMPRESSORS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".zst": _open_zstandard,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}

"""Where one recipe's shards are kept: a folder, or a place in an object store.

In: names of files and what fills them. Out: files that are whole or absent, and local copies of
remote ones. A store is opened from its place, a path or fsspec URL, in whatever process needs it.
fsspec is imported inside functions.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from orchestrator.data.streams import is_remote, read_errors
from orchestrator.digests import known_file_digest
from orchestrator.errors import DataError, DataUnreachable, is_disk_full
from orchestrator.files import (
    cache_dir,
    file_digest,
    json_text,
    record_digest,
    write_file,
    write_text,
)

DOWNLOADS_AT_ONCE = 8


class ShardStore(Protocol):
    folder: Path
    """Where this machine has, or will have, the files."""

    def write(self, name: str, fill: Callable[[Path], None]) -> Path:
        """Have `fill` write a local file, and keep it under this name. Its local copy's path."""
        ...

    def write_record(self, name: str, record: Any) -> None: ...

    def read_record(self, name: str) -> Any | None:
        """None if there is none, or if a crash left a part of it."""
        ...

    def holds(self, name: str, num_bytes: int, digest: str) -> bool:
        """Whether the file is there, as far as that is cheap to tell."""
        ...

    def fetch(self, files: Iterable[tuple[str, str]]) -> None:
        """Have local copies of these names with these digests."""
        ...


def open_store(place: str) -> ShardStore:
    return RemoteStore(place) if is_remote(place) else FolderStore(Path(place))


def join(place: str, name: str) -> str:
    return f"{place.rstrip('/')}/{name}"


class FolderStore:
    """A folder of this machine, or one that all machines share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()

    def write(self, name: str, fill: Callable[[Path], None]) -> Path:
        write_file(self.folder / name, fill)
        return self.folder / name

    def write_record(self, name: str, record: Any) -> None:
        write_text(self.folder / name, json_text(record))

    def read_record(self, name: str) -> Any | None:
        path = self.folder / name
        return _parsed(path.read_bytes()) if path.exists() else None

    def holds(self, name: str, num_bytes: int, digest: str) -> bool:
        path = self.folder / name
        if not path.exists() or path.stat().st_size != num_bytes:
            return False
        return known_file_digest(path) == digest

    def fetch(self, files: Iterable[tuple[str, str]]) -> None:
        """They are here; whoever opens one checks its digest."""


class RemoteStore:
    """A folder of an fsspec URL; this machine's copies are in the user's cache."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self._url = url
        with _reaching(url):
            self._files, self._root = url_to_fs(url)
        self.folder = cache_dir() / "fetched" / record_digest(url)[:16]

    def write(self, name: str, fill: Callable[[Path], None]) -> Path:
        path = self.folder / name
        write_file(path, fill)
        with _reaching(self._url):
            self._files.makedirs(self._root, exist_ok=True)
            self._files.put_file(str(path), join(self._root, name))
        return path

    def write_record(self, name: str, record: Any) -> None:
        with _reaching(self._url):
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(join(self._root, name), json_text(record).encode())

    def read_record(self, name: str) -> Any | None:
        with _reaching(self._url):
            # A listing kept from before would hide what another machine has written since.
            self._files.invalidate_cache()
            try:
                return _parsed(self._files.cat_file(join(self._root, name)))
            except FileNotFoundError:
                return None

    def holds(self, name: str, num_bytes: int, digest: str) -> bool:
        with _reaching(self._url):
            self._files.invalidate_cache()
            try:
                return bool(self._files.size(join(self._root, name)) == num_bytes)
            except FileNotFoundError:
                return False

    def fetch(self, files: Iterable[tuple[str, str]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(self.folder / "fetch.lock"),  # the workers of a machine fetch together
            ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool,
        ):
            list(pool.map(lambda file: self._fetch_one(*file), files))

    def _fetch_one(self, name: str, digest: str) -> None:
        path = self.folder / name
        if path.exists() and known_file_digest(path) == digest:
            return

        def download(temporary: Path) -> None:
            with _reaching(self._url):
                self._files.get_file(join(self._root, name), str(temporary))

        write_file(path, download)
        if file_digest(path) != digest:
            path.unlink()
            raise DataError(
                f"{join(self._url, name)}: the shard is damaged: its content must have the digest "
                f"{digest}: delete {self._url} and run again"
            )


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{url}: a shard is missing ({error}): run again to make it") from error
    except (ValueError, ImportError) as error:
        raise DataError(_unusable(url, error)) from error
    except read_errors(remote=True) as error:
        if is_disk_full(error):
            raise
        raise DataUnreachable(_unusable(url, error)) from error


def _unusable(url: str, error: BaseException) -> str:
    return (
        f"{url}: the shards' place cannot be used ({error}): check data.shards_dir, the "
        "credentials, and that the fsspec package for this protocol is installed"
    )


def _parsed(content: bytes) -> Any | None:
    try:
        return json.loads(content)
    except ValueError:
        return None

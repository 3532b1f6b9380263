"""Plain copies of files that cannot be entered in the middle, made once per machine.

In: a file, its fingerprint, and what writes the copy. Out: the copy's path in the user's cache
(ORCHESTRATOR_CACHE), where it stays for the next run. Copies that nobody used for a week are
deleted when another one is made.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from filelock import FileLock

from orchestrator.data.streams import (
    CHUNK_BYTES,
    check_unchanged,
    is_remote,
    open_decompressed,
    path_part,
    reading,
)
from orchestrator.files import cache_dir, record_digest, write_file

KEPT_S = 7 * 24 * 3600
NAME_DIGITS = 24

Rewrite = Callable[[str, Path], None]
"""Writes a file's plain copy to the path it is given."""


def spooled(file: str, fingerprint: str, rewrite: Rewrite) -> str:
    """The path of the plain copy.

    Raises:
        DataError: the file cannot be read, is damaged, or changed while it was being copied.
    """
    path = _spool_path(file, fingerprint, rewrite)
    if not _mark_used(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # the actors of a machine make one together
            if not _mark_used(path):
                _delete_unused(path.parent)
                write_file(path, lambda temporary: _fill(file, fingerprint, rewrite, temporary))
    return str(path)


def decompress(file: str, temporary: Path) -> None:
    """The file's content, decompressed if its name says that it is compressed."""
    with open_decompressed(file) as stream, temporary.open("wb") as copy:
        shutil.copyfileobj(stream, copy, CHUNK_BYTES)


def _fill(file: str, fingerprint: str, rewrite: Rewrite, temporary: Path) -> None:
    check_unchanged(file, fingerprint)
    rewrite(file, temporary)
    check_unchanged(file, fingerprint)


def _spool_path(file: str, fingerprint: str, rewrite: Rewrite) -> Path:
    key = [file, fingerprint, rewrite.__name__, _local_stamp(file)]
    digest = record_digest(key)[:NAME_DIGITS]
    return cache_dir() / "spool" / f"{digest}-{PurePosixPath(path_part(file)).name}"


def _local_stamp(file: str) -> list[int]:
    """Changes also where another file of equal size and time takes its place. No part of the
    fingerprint, since other machines see other values; empty for a store's file."""
    path = file.rpartition("::")[2] if is_remote(file) else file
    if is_remote(path):
        return []
    with reading(path):
        found = Path(path).stat()
    return [found.st_ino, found.st_ctime_ns]


def _mark_used(path: Path) -> bool:
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _delete_unused(folder: Path) -> None:
    now = time.time()
    for path in folder.iterdir():
        try:
            if now - path.stat().st_mtime > KEPT_S:
                path.unlink()
        except FileNotFoundError:  # another process deleted it
            continue

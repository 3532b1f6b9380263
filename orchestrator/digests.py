"""Digests of files that are remembered between processes, so that a file is read for it once.

In: a path. Out: its SHA-256. A record in the cache says for which size, inode and times it was
taken; damage that changes none of them (a failing disk) is found by the next reading only.
"""

import contextlib
import os
import time
from pathlib import Path

from orchestrator.files import cache_dir, file_digest, read_json, record_digest, write_json

# A file that changes twice within one tick of its file system's clock shows the same time for both:
# what changed only just now is not remembered. FAT counts by 2 s; git calls such files "racy".
SETTLED_S = 2.0


def known_file_digest(path: Path) -> str:
    path = path.absolute()
    kept = cache_dir() / "digests" / f"{record_digest(str(path))[:32]}.json"
    stamp, age_s = _look(path)
    digest = _remembered(kept, stamp)
    if digest is None:
        digest = file_digest(path)
        if age_s > SETTLED_S and _look(path)[0] == stamp:
            # Only time is lost where the cache is read-only or full.
            with contextlib.suppress(OSError):
                write_json(kept, {"path": str(path), "stamp": stamp, "digest": digest})
    return digest


def _look(path: Path) -> tuple[list[int], float]:
    """What a change of content changes too, and the seconds since the last one."""
    found = os.stat(path)
    # A copy can be given the times of the original; st_ctime is the file's own.
    changed_s = max(found.st_mtime, found.st_ctime)
    stamp = [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
    return stamp, time.time() - changed_s


def _remembered(kept: Path, stamp: list[int]) -> str | None:
    try:
        record = read_json(kept)
    except (OSError, ValueError):  # none, or cut off by a power cut
        return None
    return str(record["digest"]) if record["stamp"] == stamp else None

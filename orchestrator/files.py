"""Files that are either whole or absent: temp name, fsync, rename; digests; JSON records.

Everything that the run folder and the caches hold is written through here.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

DIGEST_CHUNK_BYTES = 1 << 20
READ_AND_WRITE = 0o666


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole: a reader or a crash sees the old content or the new, nothing between."""

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(content)

    write_file(path, fill)


def write_file(path: Path, fill: Callable[[Path], None]) -> None:
    """Like `write_bytes`, for content that `fill` writes to the temporary path it is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        with _os_errors(path):
            fill(temporary)
        _permit(temporary, mode)
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, record: Any) -> None:
    write_text(path, json_text(record))


def json_text(record: Any) -> str:
    return json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def append_json_line(path: Path, record: Any, durable: bool = False) -> None:
    """Append one record; a line cut short by a crash is skipped by `read_json_lines`. A `durable`
    one is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, sort_keys=True) + "\n"
    with path.open("ab+") as file:
        if file.tell() and _last_byte(path) != b"\n":
            line = "\n" + line
        file.write(line.encode())
        if durable:
            file.flush()
            os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[Any]:
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the tail that a kill cut off
    return records


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; it takes its final name only if the block ends well."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        mode = temporary.stat().st_mode
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                _permit(path, mode)
            _fsync(path)
        if final.exists():  # another process was first, with the same content
            return
        temporary.rename(final)
        _fsync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(DIGEST_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def record_digest(record: Any) -> str:
    """Digest of a JSON record, independent of its key order."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def cache_dir() -> Path:
    """Where converted base models and shards are kept: ORCHESTRATOR_CACHE, or the user's cache."""
    if configured := os.environ.get("ORCHESTRATOR_CACHE"):
        return Path(configured).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "qlora-orchestrator"


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Give safetensors' "I/O error (os error 28)" its number back: a full disk has a remedy."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _permit(path: Path, mode: int) -> None:
    """safetensors 0.8 writes files that only their owner can read, whatever the umask says."""
    found = stat.S_IMODE(path.stat().st_mode)
    wanted = found | mode & READ_AND_WRITE
    if found != wanted:
        path.chmod(wanted)


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)

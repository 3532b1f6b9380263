"""Find the files of a folder, a glob or a URL.

In: a source. Out: its files of known types, sorted.
"""

import difflib
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from orchestrator.data.readers import DATASET_READERS, is_known_file, reader_of
from orchestrator.data.saved_datasets import saved_files
from orchestrator.data.streams import is_remote, open_store_path, read_errors, shown_error
from orchestrator.data_config import SourceConfig
from orchestrator.errors import DataError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
GLOB = re.compile(r"[*?\[]")
GLOB_URL = re.compile(r"\*")  # a web address may hold the others


def find_files(source: SourceConfig) -> list[str]:
    """Local paths are made absolute. No files: there is nothing at this local path.

    Raises:
        DataError: there are files, but of no known type; there is nothing at this URL; or the
            source asks for a part of what has none.
    """
    path = local_path(source.path)
    with _listing(path):
        file_system, root = open_store_path(path)
        try:
            kind = file_system.info(root)["type"]
        except (FileNotFoundError, NotADirectoryError) as error:
            if magic := (GLOB_URL if is_remote(path) else GLOB).search(root):
                check_all_is_read(source)
                fixed = root[: magic.start()].rpartition("/")[0]
                found = file_system.glob(root) if is_remote(path) else _glob_local(fixed, root)
                return _known_files(path, "match", file_system, fixed, found)
            if is_remote(path):
                raise _nothing_at(path, error.__cause__) from error
            return []
        if kind != "directory":
            check_all_is_read(source)
            reader_of(path)
            return [path]
        saved = saved_files(path, source.split, file_system, root)
        if saved is not None:
            check_all_is_read(source, but_for=["split"])
            return [_full_name(path, file_system, name) for name in saved]
        check_all_is_read(source)
        found = file_system.find(root) if is_remote(path) else list(_walk_local(root))
        return _known_files(path, "hold", file_system, root, found)


def check_all_is_read(source: SourceConfig, but_for: Collection[str] = ()) -> None:
    """Raises DataError where a field is set that chooses from hub datasets only."""
    for name in ("split", "name", "revision"):
        value = getattr(source, name)
        if name not in but_for and value != SourceConfig.model_fields[name].default:
            raise DataError(
                f"{source.path}: {name} chooses from a hub dataset, but this is none, all of it is "
                f"read, and {name} is {value!r}: leave {name} out, or give the path of the files "
                "that you mean"
            )


def local_path(path: str) -> str:
    """Absolute, for other processes work in other folders; URLs of stores stay as they are."""
    path = path.removeprefix("file://")
    return path if is_remote(path) else str(Path(path).expanduser().absolute())


@contextmanager
def _listing(path: str) -> Iterator[None]:
    try:
        yield
    except read_errors(remote=True) as error:
        raise DataError(
            f"{path}: cannot be listed ({shown_error(error)}): check the path or URL, the "
            "credentials, and that the fsspec package for this protocol is installed"
        ) from error


def looks_like_path(path: str) -> bool:
    return path.startswith((".", "/", "~")) or is_known_file(path) or not HUB_ID.fullmatch(path)


def not_found(path: str) -> DataError:
    return DataError(
        f"{path}: file not found{_suggestion(Path(local_path(path)))}: "
        "give the path of a file or folder that exists"
    )


def _nothing_at(url: str, cause: BaseException | None) -> DataError:
    """HTTP calls it not found whatever went wrong, and keeps the reason as the cause."""
    reason = f" ({shown_error(cause)})" if cause else ""
    return DataError(
        f"{url}: file not found{reason}: give the URL of a file, a folder or a glob that exists"
    )


def _known_files(path: str, verb: str, file_system: Any, root: str, found: list[str]) -> list[str]:
    """Neither hidden nor of unknown types. `root`: the part of the names that was asked for."""
    files = [
        _full_name(path, file_system, name)
        for name in sorted(found)
        if is_known_file(name)
        and not any(part.startswith(".") for part in PurePosixPath(name[len(root) :]).parts)
    ]
    if not files:
        known = " ".join(DATASET_READERS)
        raise DataError(
            f"{path}: it must {verb} at least one file of a known type ({known}), but got none: "
            "add one, or give another path"
        )
    return files


def _glob_local(fixed: str, pattern: str) -> list[str]:
    """As fsspec's, but through links to folders too. `fixed`: the folder before the first sign."""
    from fsspec.utils import glob_translate

    levels = None if "**" in pattern else pattern[len(fixed) :].count("/")
    matches = re.compile(glob_translate(pattern)).match
    return [name for name in _walk_local(fixed, levels) if matches(name)]


def _walk_local(root: str, levels: int | None = None) -> Iterator[str]:
    """Also through links to folders, which fsspec passes by; each folder once, so loops end."""
    seen = set()
    top = Path(root or "/")
    # What may not be listed is passed by, as fsspec does: the lost+found of a mounted disk is such.
    for folder, names, files in os.walk(top, followlinks=True):
        depth = len(Path(folder).parts) - len(top.parts)
        real = os.path.realpath(folder)
        is_new = real not in seen
        seen.add(real)
        goes_on = is_new and (levels is None or depth + 1 < levels)
        names[:] = sorted(name for name in names if goes_on and not name.startswith("."))
        yield from (os.path.join(folder, name) for name in files if is_new)


def _full_name(path: str, file_system: Any, name: str) -> str:
    """What the file is called from outside: a chained URL keeps its other parts."""
    if not is_remote(path):
        return name
    head, chained, rest = path.partition("::")
    if not chained:
        return str(file_system.unstrip_protocol(name))
    if is_remote(head):  # zip://*.csv::s3://bucket/archive.zip
        return f"{head.partition('://')[0]}://{name}::{rest}"
    return f"{head}::{rest.partition('://')[0]}://{name}"  # simplecache::s3://bucket/*.csv


def _suggestion(path: Path) -> str:
    names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, sorted(names), n=1)
    return f"; did you mean '{path.with_name(near[0])}'?" if near else ""

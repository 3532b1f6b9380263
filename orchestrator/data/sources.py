"""Find a dataset's files and cut them into slices.

In: a source as the configuration writes it: `stdlib-docs`, a file, a folder, an fsspec URL or a
hub id. Out: files, their digests, and slices to read. `datasets` and fsspec are imported inside
functions; how rows are read from a file is readers.py's business.
"""

import difflib
import platform
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from orchestrator.config import BUILTIN_DATASETS
from orchestrator.data.readers import DATASET_READERS, is_known_file, reader_of
from orchestrator.data.slices import NumberedRow, Slice
from orchestrator.data.stdlib_docs import STDLIB_DOCS_VERSION, write_stdlib_docs
from orchestrator.data.streams import is_remote
from orchestrator.errors import DataError
from orchestrator.files import cache_dir, file_digest, write_file

STDLIB_DOCS = "stdlib-docs"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

# A dry run answers in about a second; counting lines goes at about 500 MB/s.
ESTIMATE_LIMIT_BYTES = 256 << 20


def plan_slices(source: str, rows_per_slice: int) -> list[Slice]:
    """Cut every file of the source into slices of `rows_per_slice` rows; the last may be shorter.

    Raises:
        DataError: the source is missing, empty or unreadable.
    """
    return _plan(source_files(source), rows_per_slice)


def estimate_slices(source: str, rows_per_slice: int) -> list[Slice] | None:
    """Like `plan_slices` if that is cheap, else None: nothing is fetched, written or read long."""
    if source == STDLIB_DOCS:
        path = _stdlib_docs_path()
        files = [str(path)] if path.exists() else []
    else:
        files = [] if is_remote(source) else _local_files(source)
    if not files or sum(Path(file).stat().st_size for file in files) > ESTIMATE_LIMIT_BYTES:
        return None
    return _plan(files, rows_per_slice)


def read_slice(part: Slice) -> Iterator[NumberedRow]:
    """The slice's rows, each with its line or row number counted from 1."""
    return reader_of(part.file).read(part)


def source_files(source: str) -> list[str]:
    """The files that hold the source's rows, in a fixed order; fetches or makes them if need be."""
    if source == STDLIB_DOCS:
        return [str(_materialised_stdlib_docs())]
    if is_remote(source):
        return _remote_files(source)
    return _local_files(source) or [str(_downloaded_from_hub(source))]


def content_digest(file: str) -> str:
    """Changes when the file's content does: a hash of it, or what a remote store says of it."""
    if not is_remote(file):
        return file_digest(Path(file))
    from fsspec.core import url_to_fs

    file_system, path = url_to_fs(file)
    return str(file_system.ukey(path))


def _plan(files: Iterable[str], rows_per_slice: int) -> list[Slice]:
    return [part for file in files for part in reader_of(file).plan(file, rows_per_slice)]


def _materialised_stdlib_docs() -> Path:
    path = _stdlib_docs_path()
    if not path.exists():
        write_stdlib_docs(path)
    return path


def _stdlib_docs_path() -> Path:
    name = f"stdlib-docs-{platform.python_version()}-{STDLIB_DOCS_VERSION}.jsonl"
    return cache_dir() / "datasets" / name


def _local_files(source: str) -> list[str]:
    """Absolute paths; none if the source can only be a hub id."""
    path = Path(source).expanduser().absolute()  # other processes work in other folders
    if path.is_dir():
        return _known_files_below(path)
    if path.exists():
        reader_of(source)
        return [str(path)]
    if _looks_like_path(source):
        raise DataError(
            f"{source}: file not found{_suggestion(path)}: "
            "give the path of a file or folder that exists"
        )
    return []


def _known_files_below(folder: Path) -> list[str]:
    files = [
        str(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and is_known_file(path.name)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise _nothing_there(str(folder))
    return files


def _nothing_there(place: str) -> DataError:
    known = " ".join(DATASET_READERS)
    return DataError(
        f"{place}: a dataset's folder must hold at least one file of a known type ({known}), "
        "but got none: add one, or give another folder"
    )


def _looks_like_path(source: str) -> bool:
    return (
        source.startswith((".", "/", "~")) or is_known_file(source) or not HUB_ID.fullmatch(source)
    )


def _suggestion(path: Path) -> str:
    names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, sorted(names), n=1)
    return f"; did you mean '{path.with_name(near[0])}'?" if near else ""


def _remote_files(url: str) -> list[str]:
    from fsspec.core import url_to_fs

    try:
        file_system, path = url_to_fs(url)
        if "*" in path:
            found = file_system.glob(path)
        elif file_system.isdir(path):
            found = file_system.find(path)
        elif file_system.exists(path):
            reader_of(url)
            return [url]
        else:
            raise DataError(f"{url}: file not found: give the URL of a file, a folder or a glob")
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"{url}: cannot be listed ({error}): check the URL, the credentials, "
            "and that the fsspec package for this protocol is installed"
        ) from error
    files = [file_system.unstrip_protocol(name) for name in sorted(found) if is_known_file(name)]
    if not files:
        raise _nothing_there(url)
    return files


def _downloaded_from_hub(dataset_id: str) -> Path:
    """The dataset's train split as a Parquet file, fetched once; delete it to fetch it again."""
    path = cache_dir() / "datasets" / f"hub-{dataset_id.replace('/', '--')}.parquet"
    if path.exists():
        return path
    import datasets

    try:
        table = datasets.load_dataset(dataset_id, split="train")
    except (OSError, ValueError) as error:
        near = difflib.get_close_matches(dataset_id, BUILTIN_DATASETS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise DataError(
            f"{dataset_id}: there is no such local file or folder, and the hub dataset's train "
            f"split cannot be loaded ({error}){hint}: check the name and the network, "
            "or give a local file"
        ) from error
    write_file(path, lambda temporary: table.to_parquet(str(temporary)))
    return path

"""Fetch a split of a hub dataset, once, as a Parquet file in the user's cache.

In: a source. Out: the file. `datasets` is imported inside a function.
"""

import difflib
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock

from orchestrator.data.streams import read_errors, shown_error
from orchestrator.data_config import BUILTIN_DATASETS, SourceConfig
from orchestrator.errors import DataError, is_disk_full
from orchestrator.files import cache_dir, write_file

ROWS_PER_GROUP = 1000


def downloaded(source: SourceConfig) -> Path:
    """The hub dataset's split as a Parquet file, fetched once; delete it to fetch it again."""
    path = cache_dir() / "datasets" / _file_name(source)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                _download(source, path)
    return path


def _download(source: SourceConfig, path: Path) -> None:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        table = datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision
        )
    except (DatasetsError, RuntimeError, *read_errors(remote=True)) as error:
        if is_disk_full(error):
            raise
        near = difflib.get_close_matches(source.path, BUILTIN_DATASETS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise DataError(
            f"{source.path}: there is no such local file or folder, and the hub dataset's "
            f"{source.split} split cannot be loaded ({shown_error(error)}){hint}: check its name, "
            "split and revision and the network, or give a local file"
        ) from error
    write_file(path, lambda copy: table.to_parquet(str(copy), batch_size=ROWS_PER_GROUP))


def _file_name(source: SourceConfig) -> str:
    """Hub ids have no `--`; signs that join the parts are quoted within them."""
    chosen = {"name": source.name, "split": source.split, "revision": source.revision}
    said = [f"{key}={quote(value, safe='')}" for key, value in chosen.items() if value is not None]
    return f"hub-{source.path.replace('/', '--')}+{'+'.join(said)}.parquet"

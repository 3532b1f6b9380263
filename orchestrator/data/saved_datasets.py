"""Folders that `datasets.save_to_disk` wrote: which of their files hold a split's rows.

In: a folder on any fsspec file system. Out: names of Arrow files. Does not import `datasets`: the
folder tells it in two small JSON files.
"""

import json
from typing import Any

from orchestrator.errors import DataError


def saved_files(path: str, split: str, file_system: Any, root: str) -> list[str] | None:
    """In their order, named as the file system does; None if save_to_disk did not write this.

    `path` is what the user calls the folder. A dataset that was saved without splits has one, which
    goes by any name.

    Raises:
        DataError: the split is not there.
    """
    whole = _read_json(file_system, f"{root}/dataset_dict.json")
    if whole is not None:
        splits = whole["splits"]
        if split not in splits:
            raise DataError(
                f"{path}: the saved dataset has no split {split!r}, only "
                f"{', '.join(map(repr, splits))}: set split to one of these"
            )
        root = f"{root}/{split}"
    state = _read_json(file_system, f"{root}/state.json")
    if state is None or "_data_files" not in state:
        return None
    if state.get("_indices_data_files"):
        raise DataError(
            f"{path}: the saved dataset takes only some rows of its files, as old versions of "
            "`datasets` may write it: load it and save it again"
        )
    return [f"{root}/{item['filename']}" for item in state["_data_files"]]


def _read_json(file_system: Any, name: str) -> Any | None:
    try:
        return json.loads(file_system.cat_file(name))
    except FileNotFoundError:
        return None

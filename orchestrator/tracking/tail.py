"""New records of a JSONL file that another thread or process appends to.

In: a path. Out: each record once, so that following a long curve costs what is new in it. Pure but
for the reading; imports no mlflow.
"""

import json
from pathlib import Path
from typing import Any


class JsonLinesTail:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = 0

    @property
    def has_news(self) -> bool:
        """Cheap: one call to the file system."""
        return self._path.exists() and self._path.stat().st_size > self._read_bytes

    def read(self) -> list[Any]:
        """Records whose line is whole and that no earlier call returned."""
        if not self.has_news:
            return []
        with self._path.open("rb") as file:
            file.seek(self._read_bytes)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        return [record for line in whole.splitlines() for record in _parsed(line)]


def first_record(path: Path) -> Any | None:
    if not path.exists():
        return None
    with path.open("rb") as file:
        return next(iter(_parsed(file.readline())), None)


def _parsed(line: bytes) -> list[Any]:
    try:
        return [json.loads(line)]
    except json.JSONDecodeError:  # a kill cut it off, and the next record ended it
        return []

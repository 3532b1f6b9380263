"""What earlier sweeps on this machine or cluster have measured of their packs' speed.

A file in the cache for each shape of a base. A sweep takes a copy into its run folder when it
starts, so that a resume goes by the same.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.files import cache_dir, read_json, record_digest, write_json
from orchestrator.planning.measured import Factors, Known, Scope, known
from orchestrator.planning.shape import BaseShape
from orchestrator.sweep.run_store import RunStore

SPEEDS = "speeds"


def earlier_speeds(shape: BaseShape) -> dict[Scope, Known]:
    return known(_rows(_file(shape)))


def speeds_to_begin_with(store: RunStore, shape: BaseShape) -> dict[Scope, Known]:
    """As they were when the sweep was started first."""
    rows = store.read(SPEEDS)
    if rows is None:
        rows = _rows(_file(shape))
        store.write(SPEEDS, rows)
    return known(rows)


def keep_speeds(shape: BaseShape, factors: Factors) -> None:
    """For later sweeps. Of two that end in the same moment one may be forgotten."""
    measured = [row for row in factors.to_json() if factors.num_packs(*_scope(row))]
    if measured:
        path = _file(shape)
        rows = {_scope(row): row for row in (*_rows(path), *measured)}
        write_json(path, list(rows.values()))


def _scope(row: Mapping[str, Any]) -> Scope:
    (scope,) = known([row])
    return scope


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_json(path) if path.exists() else []
    return rows


def _file(shape: BaseShape) -> Path:
    return cache_dir() / SPEEDS / f"{record_digest(asdict(shape))[:16]}.json"

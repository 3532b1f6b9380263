"""Prepare a dataset: plan the shards, have them made, write the manifests.

In: DataConfig, a tokenizer's folder, a cache folder, and `run_tasks`, which runs a function over
tasks: here, or on the actors that the cluster package supplies. Out: two manifests, the same bytes
whatever the order or number of workers. The folder is named by the recipe, so all trials of all
sweeps with the same recipe share it.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from orchestrator.config import DataConfig
from orchestrator.data.keys import KeyRange, KeyTask, capped_range, smallest_keys, split_ranges
from orchestrator.data.manifest import (
    ROLES,
    Manifest,
    Recipe,
    Role,
    ShardRecord,
    load_manifest,
    manifest_path,
    save_manifest,
    total_counts,
)
from orchestrator.data.shards import ShardTask, prepare_shard
from orchestrator.data.slices import Slice
from orchestrator.data.sources import content_digest, plan_slices, source_files
from orchestrator.data.tokenizing import tokenizer_digest
from orchestrator.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
FOLDER_DIGITS = 16


class RunTasks(Protocol):
    """Run the function over the tasks, anywhere and in any order; results in task order."""

    def __call__(self, function: Callable[[T], R], tasks: Sequence[T], /) -> list[R]: ...


@dataclass(frozen=True)
class PreparedData:
    train: Manifest
    held_out: Manifest


def run_in_process(function: Callable[[T], R], tasks: Sequence[T], /) -> list[R]:
    return [function(task) for task in tasks]


def prepare(
    config: DataConfig,
    tokenizer_dir: Path,
    cache: Path,
    run_tasks: RunTasks = run_in_process,
    report: Callable[[str], None] = lambda line: None,
) -> PreparedData:
    """Raises DataError for a dataset that is missing, empty, or has a row that cannot be used."""
    recipe = build_recipe(config, tokenizer_dir)
    folder = (cache / "shards" / recipe.digest[:FOLDER_DIGITS]).absolute()
    train, held_out = (_load_whole(manifest_path(folder, role)) for role in ROLES)
    if train and held_out:
        report(f"data: reusing the shards in {folder}")
        return PreparedData(train, held_out)
    tasks = [
        task
        for role in ROLES
        for task in _plan_tasks(config, role, tokenizer_dir, folder, run_tasks)
    ]
    report(f"data: making {len(tasks)} shards in {folder}")
    records = run_tasks(prepare_shard, tasks)
    manifests = []
    for role in ROLES:
        pairs = zip(tasks, records, strict=True)
        shards = tuple(record for task, record in pairs if task.role == role)
        _check_not_empty(config, role, shards)
        manifests.append(Manifest(folder, role, config.block_length, recipe, shards))
    for manifest in manifests:
        save_manifest(manifest)
        report(_summary(manifest))
    return PreparedData(*manifests)


def prepare_examples(config: DataConfig, tokenizer_dir: Path, cache: Path) -> Manifest:
    """The held-out role alone, for an evaluation; in this process.

    Raises:
        DataError: as `prepare`.
    """
    recipe = build_recipe(config, tokenizer_dir)
    folder = (cache / "shards" / recipe.digest[:FOLDER_DIGITS]).absolute()
    if found := _load_whole(manifest_path(folder, "held_out")):
        return found
    tasks = _plan_tasks(config, "held_out", tokenizer_dir, folder, run_in_process)
    shards = tuple(run_in_process(prepare_shard, tasks))
    _check_not_empty(config, "held_out", shards)
    manifest = Manifest(folder, "held_out", config.block_length, recipe, shards)
    save_manifest(manifest)
    return manifest


def build_recipe(config: DataConfig, tokenizer_dir: Path) -> Recipe:
    unused = {"train", "held_out"} | ({"held_out_fraction"} if config.held_out else set())
    held_out_files = source_files(config.held_out) if config.held_out else []
    return Recipe(
        settings=config.model_dump(mode="json", exclude=unused),
        tokenizer=tokenizer_digest(tokenizer_dir),
        train_files=tuple(map(content_digest, source_files(config.train))),
        held_out_files=tuple(map(content_digest, held_out_files)),
    )


def _load_whole(path: Path) -> Manifest | None:
    if not path.exists():
        return None
    manifest = load_manifest(path)
    files = {path.parent / shard.file: shard.num_bytes for shard in manifest.shards}
    whole = all(file.exists() and file.stat().st_size == size for file, size in files.items())
    return manifest if whole else None


def _plan_tasks(
    config: DataConfig, role: Role, tokenizer_dir: Path, folder: Path, run_tasks: RunTasks
) -> list[ShardTask]:
    slices, keys, expected = _choose_rows(config, role, run_tasks)
    if not slices:
        raise _no_rows(config, role)
    return [
        ShardTask(group, keys, role, index, config, str(tokenizer_dir.absolute()), str(folder))
        for index, group in enumerate(_group(slices, expected, config.rows_per_slice))
    ]


def _choose_rows(
    config: DataConfig, role: Role, run_tasks: RunTasks
) -> tuple[list[Slice], KeyRange, list[float]]:
    """The role's slices, the range of its keys, and how many rows each slice is to give."""
    slices = plan_slices(_source(config, role), config.rows_per_slice)
    keys = _range_before_cap(config, role)
    cap = config.max_train_examples if role == "train" else config.max_held_out_examples
    if cap is None:
        share = _expected_share(config, role)
        return slices, keys, [part.num_rows * share for part in slices]
    found = run_tasks(smallest_keys, [KeyTask(part, keys, cap) for part in slices])
    keys = capped_range(keys, found, cap)
    chosen = [bisect_left(slice_keys, keys.end) for slice_keys in found]
    filled = [(part, count) for part, count in zip(slices, chosen, strict=True) if count]
    return [part for part, _ in filled], keys, [float(count) for _, count in filled]


def _source(config: DataConfig, role: Role) -> str:
    return config.held_out if role == "held_out" and config.held_out else config.train


def _range_before_cap(config: DataConfig, role: Role) -> KeyRange:
    if config.held_out:
        return KeyRange()
    train, held_out = split_ranges(config.held_out_fraction)
    return train if role == "train" else held_out


def _expected_share(config: DataConfig, role: Role) -> float:
    if config.held_out:
        return 1.0
    return 1 - config.held_out_fraction if role == "train" else config.held_out_fraction


def _group(
    slices: Sequence[Slice], expected: Sequence[float], rows_per_shard: int
) -> list[tuple[Slice, ...]]:
    """Neighbouring slices that together give at most `rows_per_shard` rows make one shard.

    Few rows pack badly: 256 held-out rows out of a million would be a block of padding each.
    """
    groups: list[list[Slice]] = []
    filled = float(rows_per_shard)
    for part, rows in zip(slices, expected, strict=True):
        if filled + rows > rows_per_shard:
            groups.append([])
            filled = 0.0
        groups[-1].append(part)
        filled += rows
    return [tuple(group) for group in groups]


def _check_not_empty(config: DataConfig, role: Role, shards: Sequence[ShardRecord]) -> None:
    counts = total_counts(shards)
    if not counts.rows:
        raise _no_rows(config, role)
    if not counts.num_blocks:
        raise DataError(
            f"{_source(config, role)}: at least one {role} example is needed, but of {counts.rows} "
            f"rows {counts.dropped} are longer than data.block_length={config.block_length} and "
            f"{counts.without_loss} have no token with loss: raise data.block_length, "
            "or check data.format and data.fields"
        )


def _no_rows(config: DataConfig, role: Role) -> DataError:
    verb, remedy = ("chose", "raise") if role == "held_out" else ("left", "lower")
    return DataError(
        f"{_source(config, role)}: at least one {role} example is needed, but "
        f"data.held_out_fraction={config.held_out_fraction} {verb} no row: {remedy} it, add rows, "
        "or give data.held_out"
    )


def _summary(manifest: Manifest) -> str:
    totals = manifest.totals
    return (
        f"data: {manifest.role}: {totals.num_documents} documents, {totals.num_tokens} tokens "
        f"({totals.num_loss_tokens} with loss) in {totals.num_blocks} blocks, "
        f"{manifest.packing_efficiency:.1%} full; {totals.truncated} truncated, "
        f"{totals.dropped} dropped, {totals.without_loss} without loss"
    )

"""Prepare a dataset: plan the shards, have them made, write the manifests.

In: DataConfig, a tokenizer's folder, the place of the shards, and `run_tasks`, which runs a
function over tasks: here, or on the actors that the cluster package supplies. Out: two manifests,
the same bytes whatever the order or number of workers. The shards' folder is named by the recipe,
so all trials of all sweeps with the same recipe share it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from orchestrator.data.formats import row_format
from orchestrator.data.keys import KeyOrders
from orchestrator.data.manifest import (
    ROLES,
    Manifest,
    Recipe,
    Repeats,
    Role,
    ShardRecord,
    read_manifest,
    save_manifest,
    total_counts,
)
from orchestrator.data.selection import (
    KeyTask,
    Portion,
    WeighedSlice,
    count_repeats,
    needs_orders,
    select_by_range,
    select_held_out,
    select_train,
    slice_orders,
)
from orchestrator.data.shards import MadeShard, ShardTask, document_orders, prepare_shard
from orchestrator.data.slices import Slice
from orchestrator.data.sources import (
    PlanTask,
    content_digest,
    must_be_read,
    no_rows,
    plan_file,
    source_files,
)
from orchestrator.data.store import ShardStore, join, open_store
from orchestrator.data.tokenizing import tokenizer_digest
from orchestrator.data_config import DataConfig, SourceConfig
from orchestrator.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
FOLDER_DIGITS = 16
REPORTS = 10  # lines of progress in a long preparation


class RunTasks(Protocol):
    """Run the function over the tasks, anywhere and in any order; results in task order, each as
    soon as it and those before it are there."""

    def __call__(self, function: Callable[[T], R], tasks: Sequence[T], /) -> Iterator[R]: ...


@dataclass(frozen=True)
class PreparedData:
    place: str
    """Of the shards and manifests: a folder, or an fsspec URL."""
    train: Manifest
    held_out: Manifest

    def to_json(self) -> dict[str, Any]:
        """What a run folder keeps of it."""
        totals = {
            manifest.role: asdict(manifest.totals)
            | {"packing_efficiency": manifest.packing_efficiency, "digest": manifest.digest}
            for manifest in (self.train, self.held_out)
        }
        return {"place": self.place} | totals | {"repeats": asdict(self.train.repeats)}


@dataclass(frozen=True)
class Work:
    """What it takes to prepare one dataset."""

    config: DataConfig
    tokenizer_dir: str
    place: str
    run_tasks: RunTasks
    report: Callable[[str], None]


def run_in_process(function: Callable[[T], R], tasks: Sequence[T], /) -> Iterator[R]:
    return map(function, tasks)


def prepare(
    config: DataConfig,
    tokenizer_dir: Path,
    cache: Path,
    run_tasks: RunTasks = run_in_process,
    report: Callable[[str], None] = lambda line: None,
) -> PreparedData:
    """Raises DataError for a dataset that is missing, empty, or has a row that cannot be used."""
    recipe = build_recipe(config, tokenizer_dir)
    place = place_of(config, recipe, cache)
    if found := find_prepared(place):
        report(f"data: reusing the shards in {place}")
        return found
    store = open_store(place)
    work = Work(config, str(tokenizer_dir.absolute()), place, run_tasks, report)
    portions, repeats = _choose(work)
    tasks = [task for role in ROLES for task in _shard_tasks(work, role, portions[role])]
    report(f"data: making {len(tasks)} shards in {place}")
    made = list(_with_progress(run_tasks(prepare_shard, tasks), len(tasks), report))
    for line in _describe_ways(made):
        report(line)
    records = [shard.record for shard in made]
    _check_visible(store, place, records)
    if repeats is None:
        repeats = _count_repeats(work, tasks)
    manifests = []
    for role in ROLES:
        pairs = zip(tasks, records, strict=True)
        shards = tuple(record for task, record in pairs if task.role == role)
        _check_not_empty(config, role, shards)
        manifests.append(Manifest(store.folder, role, config.block_length, recipe, shards, repeats))
    if build_recipe(config, tokenizer_dir) != recipe:
        raise DataError(
            f"{_named(config, 'train')}: the files changed while they were prepared: run again"
        )
    for manifest in manifests:
        save_manifest(store, manifest)
    for line in describe(*manifests):
        report(line)
    return PreparedData(place, *manifests)


def place_of(config: DataConfig, recipe: Recipe, cache: Path) -> str:
    root = config.shards_dir or str((cache / "shards").absolute())
    return join(root, recipe.digest[:FOLDER_DIGITS])


def find_prepared(place: str) -> PreparedData | None:
    """What an earlier preparation has left there, if it is whole."""
    store = open_store(place)
    train, held_out = (_read_whole(store, role) for role in ROLES)
    return PreparedData(place, train, held_out) if train and held_out else None


def prepare_examples(config: DataConfig, tokenizer_dir: Path, cache: Path) -> Manifest:
    """The held-out role alone, for an evaluation; in this process.

    Raises:
        DataError: as `prepare`.
    """
    recipe = build_recipe(config, tokenizer_dir)
    place = place_of(config, recipe, cache)
    store = open_store(place)
    if found := _read_whole(store, "held_out"):
        return found
    work = Work(config, str(tokenizer_dir.absolute()), place, run_in_process, lambda line: None)
    portions = _choose_held_out(work, _weighed_slices(work, config.held_out_sources))[0]
    tasks = _shard_tasks(work, "held_out", portions)
    shards = tuple(made.record for made in run_in_process(prepare_shard, tasks))
    _check_not_empty(config, "held_out", shards)
    manifest = Manifest(
        store.folder, "held_out", config.block_length, recipe, shards, Repeats(0, 0)
    )
    save_manifest(store, manifest)
    return manifest


def find_examples(cache: Path, digest: str) -> str | None:
    """The place of the held-out examples of this digest, where this cache still has them."""
    for path in sorted(cache.glob("shards/*/held_out.json")):
        place = str(path.parent)
        manifest = read_manifest(open_store(place), "held_out")
        if manifest is not None and manifest.digest == digest:
            return place
    return None


def build_recipe(config: DataConfig, tokenizer_dir: Path) -> Recipe:
    unused = {"train", "held_out", "shards_dir"}
    if config.held_out is not None:
        unused.add("held_out_fraction")
    settings = config.model_dump(mode="json", exclude=unused)
    settings["sources"] = {
        role: [
            source.model_dump(mode="json", include={"weight", "format", "template", "fields"})
            for source in _sources(config, role)
        ]
        for role in ROLES
    }
    return Recipe(
        settings=settings,
        tokenizer=tokenizer_digest(tokenizer_dir),
        train_files=_digests(config.train_sources),
        held_out_files=_digests(config.held_out_sources),
        versions={"tokenizers": version("tokenizers")},
    )


def describe(train: Manifest, held_out: Manifest) -> Iterator[str]:
    """A line for each manifest, and one for what a user should look at."""
    for manifest in (train, held_out):
        totals = manifest.totals
        left = {
            "truncated": totals.truncated,
            "split": totals.split,
            "dropped": totals.dropped,
            "without loss": totals.without_loss,
            "bad rows skipped": totals.bad_rows,
        }
        notes = ", ".join(f"{count:,} {what}" for what, count in left.items() if count)
        yield (
            f"data: {manifest.role}: {totals.num_documents:,} documents, {totals.num_tokens:,} "
            f"tokens ({totals.num_loss_tokens:,} with loss) in {totals.num_blocks:,} blocks, "
            f"{manifest.packing_efficiency:.1%} full" + (f"; {notes}" if notes else "")
        )
    repeats, settings = train.repeats, train.recipe.settings
    for count, what, field in (
        (repeats.duplicates, "equal to an earlier one", "deduplicate"),
        (repeats.contaminated, "equal to a held-out one", "decontaminate"),
    ):
        if count:
            state = "left out" if settings[field] else f"data.{field}: true leaves them out"
            yield f"data: {count:,} training examples are {what}; {state}"


def _sources(config: DataConfig, role: Role) -> tuple[SourceConfig, ...]:
    return config.train_sources if role == "train" else config.held_out_sources


def _digests(sources: Sequence[SourceConfig]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(map(content_digest, source_files(source))) for source in sources)


def _read_whole(store: ShardStore, role: Role) -> Manifest | None:
    manifest = read_manifest(store, role)
    if manifest is None:
        return None
    whole = all(store.holds(shard.file, shard.num_bytes, shard.digest) for shard in manifest.shards)
    return manifest if whole else None


def _choose(work: Work) -> tuple[dict[Role, list[Portion]], Repeats | None]:
    """The portions of each role, and the repeats if choosing has counted them."""
    config = work.config
    train = _weighed_slices(work, config.train_sources)
    is_apart = config.held_out is not None
    held_out = (
        _weighed_slices(work, config.held_out_sources)
        if is_apart
        else [replace(item, weight=1.0) for item in train]
    )
    held_out_portions, held_out_orders, chosen = _choose_held_out(work, held_out)
    portions: dict[Role, list[Portion]] = {"held_out": held_out_portions}
    if not needs_orders(config, "train"):
        return portions | {"train": select_by_range(config, "train", train)}, None
    orders = _orders(work, train) if is_apart else held_out_orders
    train_portions, repeats = select_train(config, train, orders, chosen)
    return portions | {"train": train_portions}, repeats


def _choose_held_out(
    work: Work, slices: Sequence[WeighedSlice]
) -> tuple[list[Portion], list[KeyOrders], KeyOrders]:
    """The portions; the orders of all examples and of those chosen, where choosing needs them."""
    if not needs_orders(work.config, "held_out"):
        return select_by_range(work.config, "held_out", slices), [], np.empty(0, np.uint64)
    orders = _orders(work, slices)
    portions, chosen = select_held_out(work.config, slices, orders)
    return portions, orders, chosen


def _weighed_slices(work: Work, sources: Sequence[SourceConfig]) -> list[WeighedSlice]:
    weighed = []
    for source in sources:
        form = row_format(work.config, source)
        tasks = [PlanTask(file, work.config.slice_bytes) for file in source_files(source)]
        slices = [part for planned in _planned(work, tasks) for part in planned]
        if not slices:
            raise no_rows(source.path)
        weighed += [WeighedSlice(part, form, source.weight) for part in slices]
    return weighed


def _planned(work: Work, tasks: Sequence[PlanTask]) -> list[list[Slice]]:
    """Files that must be read to be cut are planned by whoever makes the shards."""
    read = iter(work.run_tasks(plan_file, [task for task in tasks if must_be_read(task.file)]))
    return [next(read) if must_be_read(task.file) else plan_file(task) for task in tasks]


def _orders(work: Work, slices: Sequence[WeighedSlice]) -> list[KeyOrders]:
    tasks = [KeyTask(item.part, item.form, work.config) for item in slices]
    return list(work.run_tasks(slice_orders, tasks))


def _shard_tasks(work: Work, role: Role, portions: Sequence[Portion]) -> list[ShardTask]:
    """Neighbouring portions that together hold at most a slice's bytes make one shard; none holds
    both examples that come for the first time and such that come again.

    Little text packs badly: 256 held-out examples out of a million would be a block of padding
    each.
    """
    if not portions:
        raise _no_rows(work.config, role)
    groups: list[list[Portion]] = []
    filled = 0.0
    for portion in portions:
        is_full = filled + portion.expected_bytes > work.config.slice_bytes
        if not groups or is_full or portion.again != groups[-1][-1].again:
            groups.append([])
            filled = 0.0
        groups[-1].append(portion)
        filled += portion.expected_bytes
    return [
        ShardTask(tuple(group), role, index, work.config, work.tokenizer_dir, work.place)
        for index, group in enumerate(groups)
    ]


def _with_progress(
    shards: Iterable[MadeShard], total: int, report: Callable[[str], None]
) -> Iterator[MadeShard]:
    num_tokens = 0
    for number, shard in enumerate(shards, start=1):
        num_tokens += shard.record.num_tokens
        if number * REPORTS // total > (number - 1) * REPORTS // total and total > REPORTS:
            report(f"data: {number} of {total} shards, {num_tokens:,} tokens")
        yield shard


def _describe_ways(shards: Sequence[MadeShard]) -> Iterator[str]:
    ways = Counter(shard.way for shard in shards if shard.way)
    for way, count in ways.items():
        which = "" if len(ways) == 1 else f" in {count:,} shards"
        yield f"data: token ids{which}: {way}"


def _check_visible(store: ShardStore, place: str, records: Sequence[ShardRecord]) -> None:
    for record in records:
        if not store.holds(record.file, record.num_bytes, record.digest):
            raise DataError(
                f"{join(place, record.file)}: a shard that another machine has made is not seen "
                "here: set data.shards_dir to a folder that all machines share, or to an fsspec URL"
            )


def _count_repeats(work: Work, tasks: Sequence[ShardTask]) -> Repeats:
    first = [task for task in tasks if not task.portions[0].again]
    orders = list(work.run_tasks(document_orders, first))
    by_role = {
        role: [found for task, found in zip(first, orders, strict=True) if task.role == role]
        for role in ROLES
    }
    return count_repeats(by_role["train"], by_role["held_out"])


def _check_not_empty(config: DataConfig, role: Role, shards: Sequence[ShardRecord]) -> None:
    counts = total_counts(shards)
    if not counts.rows:
        raise _no_rows(config, role)
    if not counts.num_blocks:
        raise DataError(
            f"{_named(config, role)}: at least one {role} example is needed, but of {counts.rows} "
            f"rows {counts.dropped} are longer than data.block_length={config.block_length} and "
            f"{counts.without_loss} have no token with loss: raise data.block_length, "
            "or check data.format and data.fields"
        )


def _no_rows(config: DataConfig, role: Role) -> DataError:
    if config.held_out is not None:
        return DataError(
            f"{_named(config, role)}: at least one {role} example is needed, but there is none: "
            "add rows, or take decontaminate and on_bad_row: skip out of data"
        )
    verb, remedy = ("chose", "raise") if role == "held_out" else ("left", "lower")
    return DataError(
        f"{_named(config, role)}: at least one {role} example is needed, but "
        f"data.held_out_fraction={config.held_out_fraction} {verb} no row: {remedy} it, add rows, "
        "or give data.held_out"
    )


def _named(config: DataConfig, role: Role) -> str:
    sources = _sources(config, role) or config.train_sources
    return ", ".join(source.path for source in sources)

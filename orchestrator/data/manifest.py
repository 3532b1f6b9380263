"""The records of prepared data: recipe, shards, manifest, and their JSON files.

In and out: plain values. The manifest is the file that means "complete", so it is written last.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from orchestrator.data.store import ShardStore, join, open_store
from orchestrator.errors import DataError
from orchestrator.files import record_digest

FORMAT_VERSION = 3  # raise it when the same recipe would give other bytes

Role = Literal["train", "held_out"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the shards' bytes, and nothing else: paths do not, but for files of a
    store that tells no hash of their content."""

    settings: dict[str, Any]
    tokenizer: str
    """Digest of its files; they hold the chat template too."""
    train_files: tuple[tuple[str, ...], ...]
    """Digests of each source's files, in order."""
    held_out_files: tuple[tuple[str, ...], ...]
    versions: dict[str, str] = field(default_factory=dict)
    """Of the libraries that cut text into tokens."""
    format_version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        return record_digest(asdict(self))

    def templates(self, role: str) -> set[str]:
        """How the examples of a role are written: by each source's own setting, else the data's."""
        settings = self.settings
        sources = settings["sources"][role] or settings["sources"]["train"]

        def template(source: dict[str, Any]) -> str:
            is_chat = (source["format"] or settings["format"]) == "chat"
            return "chat" if is_chat else source["template"] or settings["template"]

        return set(map(template, sources))

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Recipe":
        files = {
            name: tuple(tuple(digests) for digests in record[name])
            for name in ("train_files", "held_out_files")
        }
        return cls(**(record | files))


@dataclass(frozen=True, kw_only=True)
class Counts:
    num_blocks: int
    num_documents: int
    num_tokens: int
    num_loss_tokens: int
    rows: int
    """Rows chosen for the role, among them those that became no document."""
    truncated: int
    split: int
    """Examples of which several documents were made."""
    dropped: int
    without_loss: int
    bad_rows: int
    """Rows skipped because they cannot be used. Not among `rows`."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord(Counts):
    file: str
    max_documents: int
    """Most documents in one of its blocks, padding counted as one."""
    num_bytes: int
    digest: str


@dataclass(frozen=True)
class Repeats:
    """Examples equal to another one but for white space, whether they were left out or not."""

    duplicates: int
    """Training examples equal to an earlier one."""
    contaminated: int
    """Training examples equal to a held-out one."""


@dataclass(frozen=True)
class Manifest:
    folder: Path
    """Where this machine has the shards, or will have them once fetched."""
    role: Role
    block_length: int
    recipe: Recipe
    shards: tuple[ShardRecord, ...]
    repeats: Repeats

    @property
    def digest(self) -> str:
        """Names the data: equal digests are equal bytes."""
        shards = [shard.digest for shard in self.shards]
        return record_digest(
            {"role": self.role, "block_length": self.block_length, "shards": shards}
        )

    @property
    def totals(self) -> Counts:
        return total_counts(self.shards)

    @property
    def packing_efficiency(self) -> float:
        """Part of all positions that hold a token."""
        return self.totals.num_tokens / (self.totals.num_blocks * self.block_length)


def total_counts(records: Sequence[Counts]) -> Counts:
    names = [item.name for item in fields(Counts)]
    return Counts(**{name: sum(getattr(record, name) for record in records) for name in names})


def manifest_name(role: Role) -> str:
    return f"{role}.json"


def save_manifest(store: ShardStore, manifest: Manifest) -> None:
    record = {
        "digest": manifest.digest,
        "role": manifest.role,
        "block_length": manifest.block_length,
        "recipe": asdict(manifest.recipe),
        "totals": asdict(manifest.totals) | {"packing_efficiency": manifest.packing_efficiency},
        "repeats": asdict(manifest.repeats),
        "shards": [asdict(shard) for shard in manifest.shards],
    }
    store.write_record(manifest_name(manifest.role), record)


def load_manifest(place: str, role: Role) -> Manifest:
    """The manifest of a role from the place of its shards, a folder or an fsspec URL.

    Raises:
        DataError: there is none.
    """
    store = open_store(place)
    manifest = read_manifest(store, role)
    if manifest is None:
        raise DataError(
            f"{join(place, manifest_name(role))}: there are no prepared data: run the preparation "
            "again"
        )
    return manifest


def fetch_manifest(place: str, role: Role) -> Manifest:
    """Like `load_manifest`, with all its shards on this machine."""
    manifest = load_manifest(place, role)
    open_store(place).fetch([(shard.file, shard.digest) for shard in manifest.shards])
    return manifest


def read_manifest(store: ShardStore, role: Role) -> Manifest | None:
    record = store.read_record(manifest_name(role))
    if record is None or record["recipe"]["format_version"] != FORMAT_VERSION:
        return None
    return Manifest(
        folder=store.folder,
        role=record["role"],
        block_length=record["block_length"],
        recipe=Recipe.from_record(record["recipe"]),
        shards=tuple(ShardRecord(**shard) for shard in record["shards"]),
        repeats=Repeats(**record["repeats"]),
    )

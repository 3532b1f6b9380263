"""The records of prepared data: recipe, shards, manifest, and their JSON files.

In and out: plain values. The manifest is the file that means "complete", so it is written last.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from orchestrator.files import read_json, record_digest, write_json

FORMAT_VERSION = 1  # raise it when the same recipe would give other bytes

Role = Literal["train", "held_out"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the shards' bytes, and nothing else: paths do not."""

    settings: dict[str, Any]
    tokenizer: str
    train_files: tuple[str, ...]
    """Digests of the source's files, in order."""
    held_out_files: tuple[str, ...]
    format_version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        return record_digest(asdict(self))

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Recipe":
        lists = {name: tuple(record[name]) for name in ("train_files", "held_out_files")}
        return cls(**(record | lists))


@dataclass(frozen=True, kw_only=True)
class Counts:
    num_blocks: int
    num_documents: int
    num_tokens: int
    num_loss_tokens: int
    rows: int
    """Rows chosen for the role, among them those that became no document."""
    truncated: int
    dropped: int
    without_loss: int


@dataclass(frozen=True, kw_only=True)
class ShardRecord(Counts):
    file: str
    num_bytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    folder: Path
    role: Role
    block_length: int
    recipe: Recipe
    shards: tuple[ShardRecord, ...]

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
    names = [field.name for field in fields(Counts)]
    return Counts(**{name: sum(getattr(record, name) for record in records) for name in names})


def manifest_path(folder: Path, role: Role) -> Path:
    return folder / f"{role}.json"


def save_manifest(manifest: Manifest) -> None:
    record = {
        "digest": manifest.digest,
        "role": manifest.role,
        "block_length": manifest.block_length,
        "recipe": asdict(manifest.recipe),
        "totals": asdict(manifest.totals) | {"packing_efficiency": manifest.packing_efficiency},
        "shards": [asdict(shard) for shard in manifest.shards],
    }
    write_json(manifest_path(manifest.folder, manifest.role), record)


def load_manifest(path: Path) -> Manifest:
    record = read_json(path)
    return Manifest(
        folder=path.parent,
        role=record["role"],
        block_length=record["block_length"],
        recipe=Recipe.from_record(record["recipe"]),
        shards=tuple(ShardRecord(**shard) for shard in record["shards"]),
    )

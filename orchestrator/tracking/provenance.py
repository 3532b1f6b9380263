"""What a sweep was made of, as MLflow shows it: base, data, code, and a key for each trial.

In: a RunStore. Out: tags and dataset records. Pure but for reading the run folder; no mlflow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.data.manifest import ROLES
from orchestrator.files import record_digest
from orchestrator.records import TrialSpec
from orchestrator.sweep.run_store import RunStore

CONTEXTS = {"train": "training", "held_out": "evaluation"}
KEY_CHARS = 16
BASE_TAG, TRAIN_TAG = "orchestrator.base_digest", "orchestrator.train_digest"


@dataclass(frozen=True)
class DatasetRecord:
    name: str
    context: str
    """training | evaluation."""
    digest: str
    """Of the manifest: of all tokens, and so of rows, template and tokenizer."""
    source: str
    profile: Mapping[str, Any]


@dataclass(frozen=True)
class Provenance:
    tags: dict[str, str]
    """Of the sweep's run and of each trial's."""
    datasets: tuple[DatasetRecord, ...]

    def trial_key(self, trial: TrialSpec) -> str:
        """Equal for two trials, of any sweeps, that train the same thing on the same data."""
        config = trial.config.model_dump(mode="json")
        origin = {name: self.tags.get(name) for name in (BASE_TAG, TRAIN_TAG)}
        return record_digest(config | origin)[:KEY_CHARS]


def read_provenance(store: RunStore) -> Provenance:
    config = store.sweep.config
    tags: dict[str, str] = {}
    datasets = []
    data = store.read("data") or {}
    for role in (role for role in ROLES if role in data):
        facts = data[role]
        sources = (config.data.held_out_sources if role == "held_out" else ()) or (
            config.data.train_sources
        )
        source = ", ".join(source.path for source in sources)
        files = ", ".join(item.path.rstrip("/").rpartition("/")[2] for item in sources)
        name = f"{files} ({role.replace('_', '-')})"
        profile = {key: value for key, value in facts.items() if key != "digest"}
        datasets.append(DatasetRecord(name, CONTEXTS[role], facts["digest"], source, profile))
        tags[f"orchestrator.{role}_digest"] = facts["digest"]
    if base := store.read("base_model"):
        tags[BASE_TAG] = base["digest"]
    if commit := (store.read("environment") or {}).get("git_commit"):
        tags["mlflow.source.git.commit"] = commit
    return Provenance(tags, tuple(datasets))

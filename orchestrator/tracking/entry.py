"""What is to be registered of a finished sweep: the winner's adapter and all that is known of it.

In: a RunStore with a winner. Out: an Entry; its adapter is verified. Imports no mlflow.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import RegistryError
from orchestrator.files import file_digest, read_json
from orchestrator.records import TrialResult, TrialSpec
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.example_losses import with_rival_answers, with_rivals
from orchestrator.tracking.gate import RULES_TAG
from orchestrator.tracking.model_files import (
    ADAPTER_RECORD,
    ADAPTER_WEIGHTS,
    ANSWERS,
    EVALUATION,
)
from orchestrator.tracking.runs import RUN_ID_TAG

FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


@dataclass(frozen=True)
class Entry:
    sweep_id: str
    model_name: str
    trial: TrialSpec
    result: TrialResult
    folder: Path
    record: dict[str, Any]
    """The adapter's orchestrator.json."""
    evaluation: dict[str, Any] | None
    """evaluation.json with answers and the sweep's other trials; None where the trial has none."""
    rules: str
    """GateConfig as JSON."""

    @property
    def tags(self) -> dict[str, str]:
        base, result = self.record["base_model"], self.result
        tags = {
            RUN_ID_TAG: self.sweep_id,
            "trial": str(self.trial.number),
            "rank": str(self.trial.config.adapter.rank),
            "bit_width": str(self.trial.config.quant.mean_bits),
            "quant": json.dumps(self.record["quant"], sort_keys=True),
            "eval_loss": str(result.eval_loss),
            "baseline_eval_loss": str(result.baseline_eval_loss),
            "task_score": "" if result.task_score is None else str(result.task_score),
            "train_digest": self.record["train_manifest"],
            "held_out_digest": self.record["held_out_manifest"],
            "base_model": base["source"],
            "base_revision": base["revision"] or "",
            "base_digest": base["digest"],
            "base_license": find_license(Path(base["folder"])),
            "adapter_digest": result.adapter_digest,
            "record_digest": file_digest(self.folder / ADAPTER_RECORD),
            "adapter_bytes": str(result.adapter_bytes),
            "peak_memory_bytes": str(result.peak_memory_bytes),
            RULES_TAG: self.rules,
        }
        return {name: value for name, value in tags.items() if value}

    @property
    def description(self) -> str:
        tags = self.tags
        return (
            f"QLoRA adapter of rank {tags['rank']} for {tags['base_model']} at "
            f"{tags['bit_width']} bits: trial {self.trial.number} of sweep {self.sweep_id}. "
            f"Held-out loss {self.result.eval_loss:.4f}, untrained base "
            f"{self.result.baseline_eval_loss:.4f}. Base model's licence: "
            f"{tags.get('base_license', 'not known')}."
        )


def read_entry(store: RunStore) -> Entry:
    """Raises RegistryError if there is no winner, or its adapter is damaged."""
    winner = store.read("winner")
    if winner is None:
        raise RegistryError(f"{store.folder} has no winner: no trial finished with a finite loss")
    results = {result.number: result for result in store.results}
    result = results[winner["trial"]]
    folder = store.folder / result.adapter_dir
    _verify(folder / ADAPTER_WEIGHTS, result)
    sweep = store.sweep
    return Entry(
        sweep.run_id,
        sweep.config.registered_model_name,
        next(trial for trial in store.trials if trial.number == result.number),
        result,
        folder,
        read_json(folder / ADAPTER_RECORD),
        _evaluation(store, result, list(results.values())),
        sweep.config.registry.gate.model_dump_json(),
    )


def find_license(folder: Path) -> str:
    """As the model card says it, else the first line of its licence file; empty if not known."""
    card = folder / "README.md"
    if card.is_file() and (match := FRONT_MATTER.search(card.read_text(errors="replace"))):
        try:
            facts = yaml.safe_load(match[1]) or {}
        except yaml.YAMLError:
            facts = {}
        named = facts.get("license_name") or facts.get("license") if isinstance(facts, dict) else ""
        if named:
            return str(named)
    for name in LICENSE_FILES:
        if (folder / name).is_file():
            lines = (folder / name).read_text(errors="replace").split("\n")
            return next((line.strip() for line in lines if line.strip()), "")
    return ""


def _evaluation(
    store: RunStore, winner: TrialResult, results: list[TrialResult]
) -> dict[str, Any] | None:
    """Of the winner's last evaluation, which came before its adapter was saved."""
    found = _of_attempts(store, results, EVALUATION)
    if winner.number not in found:
        return None
    own = with_rivals(found.pop(winner.number), found.items())
    answers, task = _of_attempts(store, results, ANSWERS), store.sweep.config.evaluation.task
    if winner.number in answers and task is not None:
        answered = answers.pop(winner.number)
        own["answers"] = with_rival_answers(answered, answers.items(), task)
    return own


def _of_attempts(
    store: RunStore, results: list[TrialResult], name: str
) -> dict[int, dict[str, Any]]:
    """What finished trials have written under this name, by trial number."""
    return {
        result.number: read_json(path)
        for result in results
        if result.state == "finished"
        and (path := (store.folder / result.adapter_dir).with_name(name)).is_file()
    }


def _verify(weights: Path, result: TrialResult) -> None:
    found = file_digest(weights) if weights.exists() else "nothing"
    if found != result.adapter_digest:
        raise RegistryError(
            f"{weights} is damaged (digest {found[:12]}, but trial {result.number} wrote "
            f"{result.adapter_digest[:12]}): restore the file, or run the sweep again"
        )

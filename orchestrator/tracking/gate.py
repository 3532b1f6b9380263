"""The gate at work: find both standings, decide, and move the aliases, one process at a time.

In: a registered model's version. Out: a Promotion, carried out and recorded: on the version as
tags, on the model as a line of history, and, last of all, as the alias. What takes long, such as
measuring the champion anew, happens before the lease is taken; under it, the champion is looked up
again, and if another process was faster, all is decided anew.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from orchestrator.config import GateConfig, GateMetric, TaskConfig
from orchestrator.data.manifest import fetch_manifest
from orchestrator.data.prepare import find_examples
from orchestrator.errors import OrchestratorError, RegistryError, RegistryUnreachable
from orchestrator.files import cache_dir
from orchestrator.tracking.alias_history import (
    Action,
    AliasEvent,
    carried_out,
    earlier_champions,
    event_tag,
    read_events,
)
from orchestrator.tracking.example_losses import ExampleAnswers, ExampleLosses
from orchestrator.tracking.lease import Lease, Timing, lease
from orchestrator.tracking.model_files import download_adapter, read_evaluation
from orchestrator.tracking.promotion import (
    Promotion,
    Standing,
    decide_promotion,
    why_not_comparable,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE, CHAMPION = "candidate", "champion"
PROMOTION_TAG = "promotion"
"""The reason in words."""
GATE_TAG = "gate"
"""The whole Promotion as JSON; written after the other tags."""
RULES_TAG = "gate.rules"
MAX_ROUNDS = 10

Evaluate = Callable[[Path, str, TaskConfig | None], tuple[dict[str, Any], dict[str, Any]]]
"""Adapter's folder, place of prepared data, and a task whose questions it is to answer, if any ->
evaluations of the adapter and of its base alone, on the held-out examples."""


class Gate:
    def __init__(
        self,
        api: "MlflowClient",
        uri: str,
        evaluate: Evaluate | None = None,
        timing: Timing | None = None,
    ) -> None:
        self._api = api
        self._uri = uri
        self._timing = timing or Timing()
        self._evaluate = evaluate or _evaluate_adapter

    def promote(
        self, name: str, number: int, rules: GateConfig, data_place: str | None = None
    ) -> Promotion:
        """Decide about a version and carry it out. `data_place`: of its examples, where the
        caller knows it. Safe to repeat."""
        for _ in range(MAX_ROUNDS):
            holder = self.champion(name)
            promotion = self.judge(name, number, holder, rules, data_place)
            with lease(self._api, name, self._timing) as held:
                if self.champion(name) == holder:
                    self._carry_out(held, number, holder, promotion)
                    return promotion
        raise RegistryError(
            f"the champion of {name} changed {MAX_ROUNDS} times meanwhile: run again later"
        )

    def force(self, name: str, number: int, reason: str) -> Promotion:
        """Make a version champion whatever the gate would say."""
        with lease(self._api, name, self._timing) as held:
            holder = self.champion(name)
            promotion = Promotion(True, "forced", f"forced: {reason}")
            self._carry_out(held, number, holder, promotion)
        return promotion

    def roll_back(self, name: str, reason: str) -> tuple[int, int]:
        """Give the alias back to the champion before. Returns the versions: from, to.

        Raises:
            RegistryError: there is no earlier champion that still exists.
        """
        with lease(self._api, name, self._timing) as held:
            holder = self.champion(name)
            events = [event for _, event in self._events(name)]
            known = {int(v.version) for v in self._api.search_model_versions(f"name = '{name}'")}
            earlier = [number for number in earlier_champions(events, holder) if number in known]
            if holder is None or not earlier:
                raise RegistryError(
                    f"{name} has no earlier champion to go back to: choose a version with "
                    "`orchestrator registry promote`"
                )
            self._move(held, AliasEvent("rollback", holder, earlier[-1], time.time(), reason))
        return holder, earlier[-1]

    def judge(
        self,
        name: str,
        number: int,
        champion: int | None,
        rules: GateConfig,
        data_place: str | None = None,
    ) -> Promotion:
        """Decide, and change nothing. `champion`: the version to compare with."""
        candidate = self._standing(name, number)
        rival = self._standing(name, champion) if champion not in (None, number) else None
        if rival is not None and rules.other_examples == "reevaluate":
            rival = self._on_same_examples(name, candidate, rival, rules.metric, data_place)
        return decide_promotion(candidate, rival, rules)

    def champion(self, name: str) -> int | None:
        found = self._api.get_registered_model(name).aliases.get(CHAMPION)
        return int(found) if found is not None else None

    def decided(self, version: "ModelVersion") -> Promotion | None:
        """What an earlier try decided and carried out; None if it did not come so far."""
        if GATE_TAG not in version.tags:
            return None
        promotion = Promotion.from_json(json.loads(version.tags[GATE_TAG]))
        events = [event for _, event in self._events(version.name)]
        moved = carried_out(events, self.champion(version.name))
        was_champion = int(version.version) in [event.after for event in moved]
        return promotion if was_champion or not promotion.promote else None

    def _events(self, name: str) -> list[tuple[int, AliasEvent]]:
        return read_events(self._api.get_registered_model(name).tags)

    def _standing(self, name: str, number: int) -> Standing:
        """By its tags and evaluation; a version that someone else registered may have none."""
        version = self._api.get_model_version(name, str(number))
        tags = version.tags
        losses, why_no_losses = None, ""
        try:
            losses = ExampleLosses.from_json(read_evaluation(self._uri, version))
        except RegistryUnreachable:  # what it does not give now may be there
            raise
        except RegistryError as error:
            why_no_losses = str(error)
        sizes = {
            field: int(tags[field]) if tags.get(field) else None
            for field in ("adapter_bytes", "peak_memory_bytes")
        }
        return Standing(
            number,
            float(tags.get("eval_loss", "nan")),
            float(tags.get("baseline_eval_loss", "nan")),
            losses,
            why_no_losses=why_no_losses,
            **sizes,
        )

    def _on_same_examples(
        self,
        name: str,
        candidate: Standing,
        champion: Standing,
        metric: GateMetric,
        data_place: str | None,
    ) -> Standing:
        """The champion with losses on the candidate's examples, or answers to its questions, or
        with why there are none."""
        ours = candidate.losses
        if ours is None or not why_not_comparable(candidate, champion, metric):
            return champion
        asked = ours.answers if metric == "task_error" else None
        if metric == "task_error" and asked is None:
            return champion
        version = self._api.get_model_version(name, str(candidate.version))
        try:
            task = _task(asked) if asked is not None else None
            place = data_place or _cached_examples(read_evaluation(self._uri, version))
            with TemporaryDirectory() as scratch:
                uri = f"models:/{name}/{champion.version}"
                folder = download_adapter(self._uri, uri, Path(scratch) / "adapter")
                evaluation, _ = self._evaluate(folder, place, task)
        except RegistryUnreachable:
            raise
        except OrchestratorError as error:
            why = f"version {champion.version} could not be measured on the same examples ({error})"
            return replace(champion, losses=None, why_no_losses=why)
        return replace(champion, losses=ExampleLosses.from_json(evaluation))

    def _carry_out(
        self, held: Lease, number: int, holder: int | None, promotion: Promotion
    ) -> None:
        name = held.model_name
        newest = self._api.get_registered_model(name).aliases.get(CANDIDATE)
        if newest is None or int(newest) < number:
            self._api.set_registered_model_alias(name, CANDIDATE, str(number))
        for key, value in _decision_tags(promotion).items():
            self._api.set_model_version_tag(name, str(number), key, value)
        if promotion.promote and holder != number:
            action: Action = "force" if promotion.rule == "forced" else "promote"
            event = AliasEvent(action, holder, number, time.time(), promotion.reason)
            self._move(held, event)

    def _move(self, held: Lease, event: AliasEvent) -> None:
        """History first, the alias last: a crash between them is made good by the next try."""
        numbered = self._events(held.model_name)
        last = numbered[-1] if numbered else (0, None)
        undone = (
            last[1] is not None
            and (last[1].action, last[1].before, last[1].after)
            == (event.action, event.before, event.after)
            and event.before == self.champion(held.model_name)
        )
        if not undone:
            key, value = event_tag(last[0] + 1, event)
            self._api.set_registered_model_tag(held.model_name, key, value)
        held.check()
        self._api.set_registered_model_alias(held.model_name, CHAMPION, str(event.after))


def _decision_tags(promotion: Promotion) -> dict[str, str]:
    """Short ones to read and search by, then the whole record."""
    tags = {PROMOTION_TAG: promotion.reason, "gate.rule": promotion.rule}
    if numbers := promotion.comparison:
        tags |= {
            "gate.difference": f"{numbers.difference:.6f}",
            "gate.interval": f"[{numbers.low:.6f}, {numbers.high:.6f}]",
            "gate.confidence": str(numbers.confidence),
            "gate.num_pairs": str(numbers.num_pairs),
            "gate.champion": str(numbers.champion),
            "gate.examples_digest": numbers.examples_digest,
        }
    return tags | {GATE_TAG: json.dumps(promotion.to_json(), sort_keys=True)}


def _cached_examples(evaluation: dict[str, Any]) -> str:
    if place := find_examples(cache_dir(), evaluation["manifest"]):
        return place
    raise RegistryError(
        "the candidate's held-out examples are not in this machine's cache: name the cache that "
        "has them in ORCHESTRATOR_CACHE"
    )


def _task(answers: ExampleAnswers) -> TaskConfig:
    try:
        return TaskConfig.model_validate(answers.task)
    except ValidationError as error:
        raise RegistryError(
            f"the candidate's evaluation.task is not one of this version's: {error}"
        ) from error


def _evaluate_adapter(
    adapter_dir: Path, data_place: str, task: TaskConfig | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    from orchestrator.training.adapter_evaluation import evaluate_adapter

    return evaluate_adapter(adapter_dir, fetch_manifest(data_place, "held_out"), task=task)

"""Each held-out example's own loss, or answer, as it was recorded: what the gate compares.

In: evaluation.json of a trial, or of a registered version. Out: arrays, ordered by example, in
which equal rows are one example. Imports no mlflow and no torch.

evaluation.json of a version also holds its answers to the task's questions (`answers`), and its
sweep's other trials on the same examples and questions (`rivals`): the winner was chosen on them,
and a fair comparison has to know from how many and how alike.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.config import TaskConfig
from orchestrator.files import record_digest

Floats = NDArray[np.float64]
Record = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class ExampleAnswers:
    digest: str
    """Of the examples that are asked, and of how their answers are generated and compared, whatever
    the template and the tokenizer: equal digests can be compared pair by pair."""
    wrong: Floats
    """1 for each wrong answer. [n]"""
    rivals: Floats
    """Of the sweep's other trials. [n, K-1]"""
    task: Record
    """TaskConfig as it was."""

    @classmethod
    def from_json(cls, record: Record) -> "ExampleAnswers":
        keys, first = np.unique(np.array(record["examples"]), return_index=True)

        def wrong(right: Sequence[int]) -> Floats:
            return 1.0 - np.array(right, dtype=np.float64)[first]

        task = record["task"]
        return cls(
            digest=record_digest([keys.tolist(), task["answer_pattern"], task["max_new_tokens"]]),
            wrong=wrong(record["right"]),
            rivals=_columns(map(wrong, record.get("rivals", {}).values()), len(keys)),
            task=task,
        )


@dataclass(frozen=True, eq=False)
class ExampleLosses:
    digest: str
    """Of the examples as tokens and labels: equal digests can be compared pair by pair."""
    nll: Floats
    """Sum over each example's labels, in nats. [n]"""
    labels: Floats
    rivals: Floats
    """nll of the sweep's other trials. [n, K-1]"""
    answers: ExampleAnswers | None = None
    """None where no task was set."""

    @classmethod
    def from_json(cls, record: Record) -> "ExampleLosses":
        keys, place = np.unique(np.array(record["examples"]), return_inverse=True)

        def by_key(values: Sequence[float]) -> Floats:
            sums = np.bincount(place, np.array(values, dtype=np.float64), len(keys))
            return sums.astype(np.float64)

        answers = record.get("answers")
        return cls(
            # Earlier evaluations named their shards only; equal shards are equal examples.
            digest=record.get("examples_digest") or record["manifest"],
            nll=by_key(record["nll"]),
            labels=by_key(record["labels"]),
            rivals=_columns(map(by_key, record.get("rivals", {}).values()), len(keys)),
            answers=ExampleAnswers.from_json(answers) if answers else None,
        )


def with_rivals(record: Record, others: Iterable[tuple[int, Record]]) -> dict[str, Any]:
    """The winner's evaluation, and those of other trials on the same examples by trial number."""
    return {**record, "rivals": _alike(record, others, ("manifest", "examples"), "nll")}


def with_rival_answers(
    record: Record, others: Iterable[tuple[int, Record]], task: TaskConfig
) -> dict[str, Any]:
    """The same of answers.json: the winner's, and other trials', to the questions of one task."""
    rivals = _alike(record, others, ("examples",), "right")
    return {**record, "rivals": rivals, "task": task.model_dump()}


def _alike(
    record: Record, others: Iterable[tuple[int, Record]], same: Sequence[str], column: str
) -> dict[str, Any]:
    """A column of those that have the `same` as the record, by trial number."""
    return {
        str(trial): other[column]
        for trial, other in others
        if all(other[name] == record[name] for name in same)
    }


def _columns(parts: Iterable[Floats], length: int) -> Floats:
    """[length, k], also of none."""
    return np.column_stack([np.empty((length, 0)), *parts])

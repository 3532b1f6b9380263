"""Each held-out example's own loss, as an evaluation recorded it: what the gate compares.

In: evaluation.json of a trial, or of a registered version. Out: arrays, ordered by example, in
which equal rows are one example. Imports no mlflow and no torch.

evaluation.json of a version also holds its sweep's other trials on the same examples (`rivals`):
the winner was chosen on them, and a fair comparison has to know from how many and how alike.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Record = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class ExampleLosses:
    digest: str
    """Of the examples as tokens and labels: equal digests can be compared pair by pair."""
    nll: Floats
    """Sum over each example's labels, in nats. [n]"""
    labels: Floats
    rivals: Floats
    """nll of the sweep's other trials. [n, K-1]"""

    @property
    def num_examples(self) -> int:
        return len(self.nll)

    @classmethod
    def from_json(cls, record: Record) -> "ExampleLosses":
        keys, place = np.unique(np.array(record["examples"]), return_inverse=True)

        def by_key(values: Sequence[float]) -> Floats:
            sums = np.bincount(place, np.array(values, dtype=np.float64), len(keys))
            return sums.astype(np.float64)

        rivals = [by_key(nll) for nll in record.get("rivals", {}).values()]
        return cls(
            # Earlier evaluations named their shards only; equal shards are equal examples.
            digest=record.get("examples_digest") or record["manifest"],
            nll=by_key(record["nll"]),
            labels=by_key(record["labels"]),
            rivals=np.column_stack(rivals) if rivals else np.empty((len(keys), 0)),
        )


def with_rivals(record: Record, others: Iterable[tuple[int, Record]]) -> dict[str, Any]:
    """The winner's evaluation, and those of other trials on the same examples by trial number."""
    rivals = {
        str(trial): other["nll"]
        for trial, other in others
        if other["manifest"] == record["manifest"] and other["examples"] == record["examples"]
    }
    return {**record, "rivals": rivals}

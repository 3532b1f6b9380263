"""Whether a candidate becomes the champion: a pure function of two standings and the gate's rules.

In: what is known of candidate and champion. Out: a Promotion, with its rule, its numbers and its
reason in words. Imports no mlflow.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from orchestrator.config import GateConfig, GateMetric
from orchestrator.tracking.bootstrap import paired_interval
from orchestrator.tracking.example_losses import ExampleLosses, Floats

Rule = Literal[
    "first",
    "better",
    "forced",
    "not_compared",
    "not_finite",
    "constraint",
    "not_below_base",
    "not_comparable",
    "too_few_pairs",
    "not_better",
    "worse",
]


@dataclass(frozen=True)
class Standing:
    """How good a registered adapter is, and on what that was measured."""

    version: int
    eval_loss: float
    baseline_eval_loss: float
    """The untrained base's loss on the same examples. NaN where it is not known."""
    losses: ExampleLosses | None = None
    adapter_bytes: int | None = None
    peak_memory_bytes: int | None = None
    why_no_losses: str = ""
    """On the examples that it is to be compared on."""


@dataclass(frozen=True)
class Comparison:
    """A candidate's metric less the champion's: below zero the candidate is better."""

    champion: int
    metric: GateMetric
    difference: float
    low: float
    high: float
    confidence: float
    level: float
    """Of the interval: more than `confidence` where the candidate was selected among trials."""
    num_pairs: int
    num_trials: int
    """Of the candidate's sweep that it was selected from, with it."""
    resamples: int
    method: str
    seed: int
    margin: float
    examples_digest: str

    def __str__(self) -> str:
        return (
            f"{self.metric} differs by {self.difference:+.4f}, {self.confidence:.4g} interval "
            f"[{self.low:+.4f}, {self.high:+.4f}] over {self.num_pairs} {self.pairs}"
        )

    @property
    def pairs(self) -> str:
        return "questions" if self.metric == "task_error" else "held-out examples"


@dataclass(frozen=True)
class Promotion:
    promote: bool
    rule: Rule
    reason: str
    comparison: Comparison | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Promotion":
        numbers = record["comparison"]
        return cls(**{**record, "comparison": Comparison(**numbers) if numbers else None})


def decide_promotion(candidate: Standing, champion: Standing | None, gate: GateConfig) -> Promotion:
    """The candidate must keep the constraints, beat the untrained base, and beat the champion."""
    if refused := _refused_alone(candidate, gate):
        return refused
    gain = _gain(candidate)
    if champion is None:
        return Promotion(True, "first", f"{gain}; it is the first champion")
    name = f"version {champion.version}"
    if why_not := why_not_comparable(candidate, champion, gate.metric):
        if gate.other_examples == "promote":
            words = f"not compared with {name}, as other_examples: promote has it: {why_not}"
            return Promotion(True, "not_compared", f"{gain}; {words}")
        return Promotion(
            False,
            "not_comparable",
            f"it cannot be compared with {name}: {why_not}: measure both on the same examples, or "
            f"`orchestrator registry promote --force`",
        )
    comparison, asked = compare(candidate, champion, gate), gate.metric == "task_error"
    if comparison.num_pairs < gate.min_pairs:
        return Promotion(
            False,
            "too_few_pairs",
            f"{comparison.num_pairs} {comparison.pairs} are too few to compare it with {name}: at "
            f"least {gate.min_pairs} are needed (registry.gate.min_pairs): hold out more"
            + (" and ask more (evaluation.task.max_examples)" if asked else ""),
            comparison,
        )
    if comparison.high < -gate.margin:
        return Promotion(True, "better", f"better than {name}: {comparison}", comparison)
    if comparison.low > 0:
        return Promotion(False, "worse", f"worse than {name}: {comparison}", comparison)
    goal = f"below {-gate.margin:.4g}" if gate.margin else "below zero"
    return Promotion(
        False,
        "not_better",
        f"not surely better than {name}: {comparison}; it would have to lie {goal}",
        comparison,
    )


def compare(candidate: Standing, champion: Standing, gate: GateConfig) -> Comparison:
    """They must be comparable."""
    ours, theirs = candidate.losses, champion.losses
    assert ours is not None
    assert theirs is not None
    columns, weights, digest = _paired(ours, theirs, gate.metric)
    interval = paired_interval(
        columns, weights, gate.confidence, gate.resamples, gate.method, gate.seed
    )
    return Comparison(
        champion=champion.version,
        metric=gate.metric,
        difference=interval.difference,
        low=interval.low,
        high=interval.high,
        confidence=gate.confidence,
        level=interval.level,
        num_pairs=len(weights),
        num_trials=columns.shape[1],
        resamples=gate.resamples,
        method=gate.method,
        seed=gate.seed,
        margin=gate.margin,
        examples_digest=digest,
    )


def _paired(
    ours: ExampleLosses, theirs: ExampleLosses, metric: GateMetric
) -> tuple[Floats, Floats, str]:
    """Differences of the candidate, then of its sweep's other trials, [n, K], weights [n], and what
    the pairs are known by."""
    if metric == "task_error":
        assert ours.answers is not None
        assert theirs.answers is not None
        wrong = np.column_stack([ours.answers.wrong, ours.answers.rivals])
        columns = wrong - theirs.answers.wrong[:, None]
        return columns, np.ones(len(columns)), ours.answers.digest
    columns = np.column_stack([ours.nll, ours.rivals]) - theirs.nll[:, None]
    if metric == "token_loss":
        return columns, ours.labels, ours.digest
    return *_per_example(columns, ours.labels), ours.digest


def _refused_alone(candidate: Standing, gate: GateConfig) -> Promotion | None:
    loss, baseline = candidate.eval_loss, candidate.baseline_eval_loss
    if not math.isfinite(loss):
        return Promotion(False, "not_finite", f"its held-out loss is {loss}")
    limits = {
        "adapter_bytes": gate.max_adapter_bytes,
        "peak_memory_bytes": gate.max_peak_memory_bytes,
    }
    for name, limit in limits.items():
        value: int | None = getattr(candidate, name)
        if limit is not None and (value is None or value > limit):
            known = "are not known" if value is None else f"are {value:,}"
            return Promotion(
                False,
                "constraint",
                f"its {name} {known}, and registry.gate.max_{name} is {limit:,}",
            )
    if loss >= baseline:
        return Promotion(
            False,
            "not_below_base",
            f"its held-out loss {loss:.4f} is not below the untrained base's {baseline:.4f}",
        )
    return None


def _gain(candidate: Standing) -> str:
    baseline = candidate.baseline_eval_loss
    known = f" (untrained base {baseline:.4f})" if math.isfinite(baseline) else ""
    return f"held-out loss {candidate.eval_loss:.4f}{known}"


def why_not_comparable(candidate: Standing, champion: Standing, metric: GateMetric) -> str:
    """Empty where they are."""
    digests = set()
    for standing in (candidate, champion):
        losses = standing.losses
        if losses is None:
            return standing.why_no_losses or f"version {standing.version} has no losses by example"
        if metric != "task_error":
            digests.add(losses.digest)
        elif losses.answers is not None:
            digests.add(losses.answers.digest)
        else:
            return f"version {standing.version} has answered no questions (evaluation.task)"
    if len(digests) == 1:
        return ""
    if metric == "task_error":
        return "they answered other questions"
    return "they were measured on other held-out examples"


def _per_example(columns: Floats, labels: Floats) -> tuple[Floats, Floats]:
    """Each example's own mean loss, all with the same weight."""
    counts = np.maximum(labels, 1.0)
    return columns / counts[:, None], np.ones_like(labels)

"""How sure a difference of two mean losses is: a paired bootstrap over held-out examples.

In: each example's difference and weight. Out: the difference of the means and an interval around
it. Pure numpy, seeded: the same input gives the same interval.

The statistic is a ratio of sums, sum(difference) / sum(weight), and whole examples are resampled:
the tokens of one example are not independent of each other. Intervals are percentile or BCa ones
(Efron 1987), both expanded for small samples (Hesterberg, arXiv:1411.5279, section 4.3). With heavy
tails BCa's are too narrow, with skewed differences percentile ones are: so the wider end of both is
taken, unless told otherwise (benchmarks/registry_gate.py).

n examples, K compared adapters, R resamples.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Method = Literal["widest", "percentile", "bca"]
Floats = NDArray[np.float64]

# Counts of one part of the resamples, 8 bytes each.
MAX_PART_COUNTS = 4 << 20
NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    difference: float
    low: float
    high: float
    level: float
    """Of this one interval: more than was asked for where it makes up for a selection."""


def paired_interval(
    differences: Floats,
    weights: Floats,
    confidence: float,
    resamples: int,
    method: Method = "widest",
    seed: int = 0,
    max_counts: int = MAX_PART_COUNTS,
) -> Interval:
    """Two-sided interval of the first column's mean difference.

    differences [n, K]; weights [n]. The other columns are what the first one was selected from, as
    the least: then both tails are made smaller, so that with all K at no difference the chance that
    the selected one's interval ends below zero is still (1 - confidence) / 2. It is Westfall and
    Young's min-p: what the columns have in common costs nothing.
    """
    totals = differences.sum(axis=0) / weights.sum()
    drawn = _resampled(differences, weights, resamples, seed, max_counts)  # [R, K]
    tail = _selection_tail(drawn, (1 - confidence) / 2)
    level = 1 - 2 * tail
    low, high = (_expanded(side, len(weights)) for side in (tail, 1 - tail))
    corrections = []
    if method in ("widest", "percentile"):
        corrections.append((0.0, 0.0))
    if method in ("widest", "bca"):
        bias = _bias(drawn[:, 0], totals[0])
        corrections.append((bias, _acceleration(differences[:, 0], weights)))
    return Interval(
        float(totals[0]),
        min(_quantile(drawn[:, 0], low, *correction) for correction in corrections),
        max(_quantile(drawn[:, 0], high, *correction) for correction in corrections),
        level,
    )


def _resampled(
    differences: Floats, weights: Floats, resamples: int, seed: int, max_counts: int
) -> Floats:
    columns = np.column_stack([weights, differences])
    parts = _counts(len(weights), resamples, seed, max_counts)
    sums = np.concatenate([counts @ columns for counts in parts])
    means: Floats = sums[:, 1:] / sums[:, :1]
    return means


def _counts(num_examples: int, resamples: int, seed: int, max_counts: int) -> Iterator[Floats]:
    """How often each example is drawn, in parts of [resamples, n]."""
    generator = np.random.default_rng(seed)
    size = max(1, max_counts // num_examples)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = generator.integers(num_examples, size=(rows, num_examples))
        drawn += np.arange(rows)[:, None] * num_examples
        counts = np.bincount(drawn.ravel(), minlength=rows * num_examples)
        yield counts.reshape(rows, num_examples).astype(np.float64)


def _selection_tail(drawn: Floats, tail: float) -> float:
    """The tail of each column such that any of them falls below it as often as `tail` says."""
    from scipy.stats import rankdata

    resamples, columns = drawn.shape
    if columns == 1:
        return tail
    # Means of right and wrong answers are often equal: such have one rank.
    ranks = (rankdata(drawn, axis=0) - 0.5) / resamples
    least = np.quantile(ranks.min(axis=1), tail, method="lower")
    return float(np.clip(least, tail / columns, tail))


def _bias(drawn: Floats, observed: float) -> float:
    """BCa's z0: where the observed value stands among the resampled ones."""
    below = np.count_nonzero(drawn < observed) + 0.5 * np.count_nonzero(drawn == observed)
    fraction = below / len(drawn)
    return NORMAL.inv_cdf(min(max(fraction, 1 / len(drawn)), 1 - 1 / len(drawn)))


def _acceleration(differences: Floats, weights: Floats) -> float:
    """BCa's a, from the values with one example left out each."""
    without = (differences.sum() - differences) / np.maximum(weights.sum() - weights, 1e-300)
    spread = without.mean() - without
    squares = float((spread**2).sum())
    return float((spread**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0


def _expanded(side: float, num_examples: int) -> float:
    """The normal quantile that gives n examples' interval the width that a t interval would have:
    resampling takes the sample's spread, which is sqrt((n-1)/n) too small, for the true one."""
    from scipy.stats import t

    degrees = max(1, num_examples - 1)
    return float(t.ppf(side, degrees)) * math.sqrt((degrees + 1) / degrees)


def _quantile(drawn: Floats, normal: float, place: float, acceleration: float) -> float:
    shifted = place + normal
    scale = 1 - acceleration * shifted
    # Beyond this pole BCa says nothing; the outermost resample is the safe answer.
    corrected = place + shifted / scale if scale > 0 else math.copysign(math.inf, shifted)
    return float(
        np.quantile(
            drawn, NORMAL.cdf(corrected) if math.isfinite(corrected) else float(corrected > 0)
        )
    )

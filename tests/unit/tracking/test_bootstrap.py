"""The interval that the gate trusts. How often it errs: benchmarks/registry_gate.py."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.tracking.bootstrap import Method, paired_interval

METHODS: tuple[Method, ...] = ("widest", "percentile", "bca")
rng = np.random.default_rng(0)
WEIGHTS = rng.integers(5, 60, 80).astype(float)
DIFFERENCES = (rng.normal(-0.05, 0.2, 80) * WEIGHTS)[:, None]


@pytest.mark.parametrize("method", METHODS)
def test_the_interval_is_near_the_normal_one_where_that_is_right(method: Method) -> None:
    found = paired_interval(DIFFERENCES, WEIGHTS, 0.95, 20_000, method)
    mean = DIFFERENCES.sum() / WEIGHTS.sum()
    errors = DIFFERENCES[:, 0] - mean * WEIGHTS
    deviation = np.sqrt((errors**2).sum()) / WEIGHTS.sum()
    assert found.difference == pytest.approx(mean)
    assert found.low == pytest.approx(mean - 2.0 * deviation, abs=0.15 * deviation)
    assert found.high == pytest.approx(mean + 2.0 * deviation, abs=0.15 * deviation)
    assert found.level == 0.95


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15)
@given(shift=st.floats(-5, 5), scale=st.floats(0.01, 100))
def test_the_interval_moves_and_scales_with_the_losses(
    method: Method, shift: float, scale: float
) -> None:
    plain = paired_interval(DIFFERENCES, WEIGHTS, 0.9, 1000, method)
    moved = paired_interval(
        scale * (DIFFERENCES + shift * WEIGHTS[:, None]), WEIGHTS, 0.9, 1000, method
    )
    assert moved.low == pytest.approx(scale * (plain.low + shift), rel=1e-6, abs=1e-6 * scale)
    assert moved.high == pytest.approx(scale * (plain.high + shift), rel=1e-6, abs=1e-6 * scale)


@pytest.mark.parametrize("method", METHODS)
def test_no_difference_at_all_is_an_interval_of_zero_width(method: Method) -> None:
    found = paired_interval(np.zeros((30, 1)), np.ones(30), 0.95, 1000, method)
    assert (found.difference, found.low, found.high) == (0, 0, 0)


def test_resamples_in_parts_are_those_of_one_part() -> None:
    whole = paired_interval(DIFFERENCES, WEIGHTS, 0.95, 1000)
    parts = paired_interval(DIFFERENCES, WEIGHTS, 0.95, 1000, max_counts=80 * 33)
    assert parts.low == pytest.approx(whole.low)
    assert parts.high == pytest.approx(whole.high)


def test_trials_that_are_all_alike_cost_nothing_and_unlike_ones_cost_at_most_bonferronis() -> None:
    alike = np.repeat(DIFFERENCES, 10, axis=1)
    unlike = rng.normal(0, 0.2, (80, 10)) * WEIGHTS[:, None]
    assert paired_interval(alike, WEIGHTS, 0.95, 4000).level == pytest.approx(0.95, abs=0.001)
    level = paired_interval(unlike, WEIGHTS, 0.95, 4000).level
    assert 0.98 < level <= 0.995 + 1e-9


def test_trials_that_answer_as_the_champion_does_cost_nothing() -> None:
    answers = np.random.default_rng(1).integers(-1, 2, 200).astype(float)[:, None]
    weights = np.ones(200)
    alone = paired_interval(answers, weights, 0.95, 5000)
    among = paired_interval(np.hstack([answers, np.zeros((200, 5))]), weights, 0.95, 5000)
    assert among.level == pytest.approx(alone.level, abs=0.01)


def test_a_trial_with_the_same_answers_costs_nothing() -> None:
    answers = np.random.default_rng(1).integers(-1, 2, 200).astype(float)[:, None]
    weights = np.ones(200)
    twins = paired_interval(np.hstack([answers] * 4), weights, 0.95, 5000)
    assert twins.level == pytest.approx(0.95, abs=0.01)

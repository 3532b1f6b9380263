"""The gate between a candidate and the champion alias."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from orchestrator.config import GateConfig, TaskConfig
from orchestrator.tracking.example_losses import ExampleAnswers, ExampleLosses, with_rivals
from orchestrator.tracking.promotion import Promotion, Standing, decide_promotion

GATE = GateConfig(resamples=2000)
LABELS = 5.0 + 7 * np.arange(60) % 50


def standing(
    loss: float,
    *,
    version: int = 1,
    base: float = 3.0,
    examples: str = "a",
    count: int = 60,
    spread: float = 0.05,
    rivals: int = 0,
) -> Standing:
    """Whose examples' losses are `loss` on the average, each a little off it in its own way."""
    generator = np.random.default_rng([version, rivals])
    noise = generator.normal(0, spread, (count, 1 + rivals))
    noise -= (noise * LABELS[:count, None]).sum(axis=0) / LABELS[:count].sum()
    nll = (loss + noise) * LABELS[:count, None]
    losses = ExampleLosses(examples, nll[:, 0], LABELS[:count], nll[:, 1:])
    return Standing(version, loss, base, losses, adapter_bytes=1000, peak_memory_bytes=10**9)


def answering(right: int, *, questions: str = "a", rivals: int = 0, **fields: Any) -> Standing:
    """So many of 100 questions, the first ones; its sweep's other trials a few more or less."""
    record = {
        "examples": [f"{questions}{index}" for index in range(100)],
        "right": [int(index < right) for index in range(100)],
        "task": TaskConfig().model_dump(),
        "rivals": {
            str(trial): [int((index + 3 * trial) % 100 < right) for index in range(100)]
            for trial in range(rivals)
        },
    }
    found = standing(**fields)
    assert found.losses is not None
    answers = ExampleAnswers.from_json(record)
    return replace(found, losses=replace(found.losses, answers=answers))


BY_ANSWERS = GATE.model_copy(update={"metric": "task_error"})
UNKNOWN = Standing(7, 2.0, 3.0, why_no_losses="models:/x/7 was registered without losses")


@pytest.mark.parametrize(
    ("candidate", "champion", "rule", "words"),
    [
        (standing(2.0), None, "first", "first champion"),
        (standing(3.0), None, "not_below_base", "3.0000 is not below the untrained base's 3.0000"),
        (standing(3.5), standing(3.9), "not_below_base", "untrained base"),
        (standing(float("nan")), None, "not_finite", "nan"),
        (standing(float("inf")), None, "not_finite", "inf"),
        (standing(2.0, base=float("nan")), None, "first", "first champion"),
        (standing(2.0), standing(2.1, version=7), "better", "differs by -0.1000"),
        (standing(2.1), standing(2.0, version=7), "worse", "differs by +0.1000"),
        (standing(2.099), standing(2.1, version=7), "not_better", "not surely better"),
        (standing(2.1), standing(2.1), "not_better", "differs by +0.0000"),
        (standing(2.0), standing(2.1, examples="b"), "not_comparable", "other held-out examples"),
        (standing(2.0), UNKNOWN, "not_comparable", "without losses: measure both"),
        (
            standing(2.0, count=19),
            standing(2.1, version=7, count=19),
            "too_few_pairs",
            "19 held-out examples are too few to compare it with version 7: at least 20",
        ),
    ],
)
def test_decide_promotion(
    candidate: Standing, champion: Standing | None, rule: str, words: str
) -> None:
    promotion = decide_promotion(candidate, champion, GATE)
    assert promotion.rule == rule
    assert promotion.promote == (rule in ("first", "better"))
    assert words in promotion.reason


@pytest.mark.parametrize(
    ("right", "rule", "words"),
    [
        (70, "better", "task_error differs by -0.2000"),
        (51, "not_better", "over 100 questions"),
        (30, "worse", "task_error differs by +0.2000"),
    ],
)
def test_answers_may_decide_whatever_the_losses_are(right: int, rule: str, words: str) -> None:
    candidate, champion = answering(right, loss=2.1), answering(50, loss=2.0, version=7)
    promotion = decide_promotion(candidate, champion, BY_ANSWERS)
    assert promotion.rule == rule
    assert words in promotion.reason
    assert decide_promotion(candidate, champion, GATE).rule == "worse"


def test_the_best_of_many_has_to_answer_more() -> None:
    champion = answering(50, loss=2.0, version=7)
    alone, chosen = (answering(60, loss=2.0, rivals=rivals) for rivals in (0, 30))
    levels = []
    for candidate in (alone, chosen):
        comparison = decide_promotion(candidate, champion, BY_ANSWERS).comparison
        assert comparison is not None
        levels.append(comparison.level)
    assert levels[0] == pytest.approx(0.95)
    assert levels[1] > 0.98


def test_a_question_that_is_asked_twice_counts_once() -> None:
    def wrong(times: int) -> list[float]:
        record = {"examples": ["a", "b", "c"] * times, "right": [1, 0, 0] * times}
        record |= {"rivals": {"3": [0, 1, 0] * times}}
        answers = ExampleAnswers.from_json(record | {"task": TaskConfig().model_dump()})
        return [answers.digest, answers.wrong.tolist(), answers.rivals.ravel().tolist()]

    assert wrong(1) == wrong(2)
    assert wrong(2)[1:] == [[0, 1, 1], [1, 0, 1]]


@pytest.mark.parametrize(
    ("champion", "words"),
    [
        (standing(2.1, version=7), "version 7 has answered no questions (evaluation.task)"),
        (answering(50, questions="b", loss=2.1, version=7), "they answered other questions"),
    ],
)
def test_without_answers_to_the_same_questions_they_decide_nothing(
    champion: Standing, words: str
) -> None:
    promotion = decide_promotion(answering(90, loss=2.0), champion, BY_ANSWERS)
    assert promotion.rule == "not_comparable"
    assert words in promotion.reason


def test_the_better_one_must_be_better_by_the_margin() -> None:
    candidate, champion = standing(2.0), standing(2.1, version=7)
    strict = GATE.model_copy(update={"margin": 0.09})
    assert decide_promotion(candidate, champion, GATE).promote
    refused = decide_promotion(candidate, champion, strict)
    assert not refused.promote
    assert "below -0.09" in refused.reason


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"max_adapter_bytes": 999}, "adapter_bytes are 1,000, and registry.gate.max_adapter"),
        ({"max_peak_memory_bytes": 10}, "peak_memory_bytes are 1,000,000,000"),
    ],
)
def test_a_candidate_over_a_limit_is_refused_also_as_the_first(
    limit: dict[str, int], words: str
) -> None:
    gate = GATE.model_copy(update=limit)
    promotion = decide_promotion(standing(2.0), None, gate)
    assert promotion.rule == "constraint"
    assert words in promotion.reason
    unknown = decide_promotion(UNKNOWN, None, gate)
    assert "are not known" in unknown.reason


def test_a_champion_that_cannot_be_compared_gives_way_only_if_told_so() -> None:
    told = GATE.model_copy(update={"other_examples": "promote"})
    promotion = decide_promotion(standing(2.0), standing(2.1, examples="b"), told)
    assert (promotion.promote, promotion.rule) == (True, "not_compared")
    assert "not compared with version 1" in promotion.reason


def test_the_decision_is_the_same_each_time_and_survives_json() -> None:
    one = decide_promotion(standing(2.09), standing(2.1, version=7), GATE)
    two = decide_promotion(standing(2.09), standing(2.1, version=7), GATE)
    assert one == two == Promotion.from_json(json.loads(json.dumps(one.to_json())))
    assert one.comparison is not None
    assert (one.comparison.num_pairs, one.comparison.resamples) == (60, 2000)
    assert one.comparison.examples_digest == "a"


def test_the_best_of_many_trials_has_to_be_better_by_more() -> None:
    champion = standing(2.1, version=7)
    alone = decide_promotion(standing(2.08), champion, GATE).comparison
    chosen = decide_promotion(standing(2.08, rivals=30), champion, GATE).comparison
    assert alone is not None
    assert chosen is not None
    assert alone.level == pytest.approx(0.95)
    assert chosen.level > 0.99
    assert chosen.num_trials == 31
    assert chosen.high - chosen.low > alone.high - alone.low


def test_long_examples_count_more_unless_each_counts_the_same() -> None:
    """Better on the long half by 0.2, worse on the short half by 0.1."""
    labels = np.array([10.0] * 30 + [90.0] * 30)
    better = np.where(labels > 50, -0.2, 0.25)
    zero = np.empty((60, 0))
    noise = np.random.default_rng(0).normal(0, 0.01, 60)
    candidate = ExampleLosses("a", (2 + better + noise) * labels, labels, zero)
    champion = ExampleLosses("a", 2 * labels, labels, zero)
    standings = Standing(2, 2.0, 3.0, candidate), Standing(1, 2.0, 3.0, champion)
    by_token = decide_promotion(*standings, GATE)
    by_example = decide_promotion(*standings, GATE.model_copy(update={"metric": "example_loss"}))
    assert by_token.comparison is not None
    assert by_example.comparison is not None
    assert by_token.comparison.difference == pytest.approx(-0.155, abs=0.01)
    assert by_example.comparison.difference == pytest.approx(0.025, abs=0.01)


def test_equal_rows_are_one_example_and_order_does_not_matter() -> None:
    record = {"manifest": "m", "examples": ["b", "a", "b"], "nll": [1, 2, 3], "labels": [1, 1, 2]}
    rivals = with_rivals(
        record, [(4, record | {"nll": [5, 6, 7]}), (5, record | {"manifest": "x"})]
    )
    losses = ExampleLosses.from_json(rivals)
    assert losses.nll.tolist() == [2, 4]
    assert losses.labels.tolist() == [1, 3]
    assert losses.rivals.tolist() == [[6], [12]]
    assert losses.digest == "m"

"""Names, params and metrics as MLflow shows them."""

import math
from dataclasses import replace

import pytest

from orchestrator.config import TrialConfig
from orchestrator.loading import trial_fields
from orchestrator.records import TrialResult
from orchestrator.tracking.translation import (
    final_evaluation,
    point_metrics,
    result_metrics,
    short_name,
    trial_name,
    trial_params,
)


def test_no_two_fields_share_a_short_name() -> None:
    names = [short_name(field) for field in trial_fields()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({}, "trial 003"),
        ({"adapter.rank": 16, "quant.bit_width": 4}, "trial 003 · 4-bit · rank 16"),
        ({"optimizer.learning_rate": 0.000234567}, "trial 003 · lr 0.000235"),
        ({"optimizer.name": "adamw", "quant.double_quant": True},
         "trial 003 · optimizer adamw · double_quant true"),
    ],
)  # fmt: skip
def test_a_trial_is_named_by_what_was_searched(params: dict[str, object], name: str) -> None:
    assert trial_name(3, params) == name


def test_params_leave_out_what_has_no_meaning_for_the_trial() -> None:
    four = trial_params(TrialConfig(), "bfloat16")
    assert (four["bit_width"], four["quant_type"], four["compute_dtype"]) == (
        "4", "nf4", "bfloat16",
    )  # fmt: skip
    assert four["learning_rate"] == "0.0002"
    assert "offload_optimizer" not in four
    sixteen = trial_params(
        TrialConfig.model_validate({"quant": {"bit_width": 16}, "strategy": {"kind": "zero"}}),
        "float32",
    )
    assert "quant_type" not in sixteen
    assert sixteen["offload_optimizer"] == "none"


def test_an_overflowing_perplexity_is_nan() -> None:
    row = {"kind": "evaluated", "step": 1, "tokens": 100, "time": 9.0, "eval_loss": 2000.0}
    (_, _, metrics), _ = point_metrics(row)
    assert metrics["eval_loss"] == 2000.0
    assert math.isnan(metrics["perplexity"])


def test_losses_are_shown_by_step_and_by_tokens() -> None:
    row = {"kind": "evaluated", "step": 1, "tokens": 100, "time": 9.0, "eval_loss": 2.0}
    (_, step, by_step), (_, tokens, by_tokens) = point_metrics(row)
    assert (step, by_step["eval_loss"]) == (1, 2.0)
    assert (tokens, by_tokens) == (100, {"by_tokens/eval_loss": 2.0})


def test_the_final_evaluation_is_a_point_of_the_curve() -> None:
    result = TrialResult(0, "finished", 1, 9.0, eval_loss=2.0, steps=10, tokens=70)
    row = final_evaluation(result)
    assert row is not None
    assert (row["kind"], row["step"], row["tokens"], row["eval_loss"]) == ("evaluated", 10, 70, 2.0)
    assert final_evaluation(TrialResult(0, "failed", 1, 9.0)) is None


def test_a_task_score_is_a_metric_where_there_is_one() -> None:
    result = TrialResult(0, "finished", 1, 9.0, eval_loss=2.0, task_score=0.25)
    assert result_metrics(result)["task_score"] == 0.25
    assert "task_score" not in result_metrics(replace(result, task_score=None))


def test_a_failed_trial_has_no_final_metrics() -> None:
    assert result_metrics(TrialResult(0, "failed", 1, 9.0, "raised", "x")) == {}

import math
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.memory import GIB
from orchestrator.records import TrialResult, TrialSpec
from orchestrator.search.objectives import OBJECTIVES, overshoots, pareto_front, violations
from orchestrator.search.space import ask
from orchestrator.search_config import SearchConfig
from orchestrator.sweep.expectations import refusal, within
from orchestrator.sweep.selection import select_winner
from tests.sweeps import LLAMA_8B, NO_BASE, premises, sweep_config


def result(number: int, loss: float, size: int = 10**6, **changes: Any) -> TrialResult:
    finished = TrialResult(
        number, "finished", 1, 0.0, eval_loss=loss, baseline_eval_loss=4.0, adapter_bytes=size,
        task_score=0.5,
    )  # fmt: skip
    return replace(finished, **changes)


def trials(count: int) -> list[TrialSpec]:
    return [TrialSpec(number, {}, sweep_config().trial) for number in range(count)]


def search(**changes: Any) -> SearchConfig:
    return SearchConfig.model_validate(changes)


def test_the_front_holds_what_no_other_trial_beats_in_everything() -> None:
    results = [
        result(0, 1.0, 40),
        result(1, 1.1, 20),
        result(2, 1.2, 30),  # trial 1 is better and smaller
        result(3, 1.5, 10),
        result(4, math.nan, 1),
        result(5, 1.1, 20),  # as good as trial 1: neither beats the other
        result(6, 0.5, 5, state="pruned"),
    ]
    found = pareto_front(search(objectives=["eval_loss", "adapter_bytes"]), results)
    assert [one.number for one in found] == [0, 1, 3, 5]


def test_more_tokens_per_second_are_better() -> None:
    results = [result(0, 1.0, tokens_per_s=10.0), result(1, 1.1, tokens_per_s=20.0)]
    speed = search(objectives=["tokens_per_s", "eval_loss"])
    assert len(pareto_front(speed, results)) == 2
    winner = select_winner(trials(2), results, speed)
    assert winner is not None
    assert winner.trial == 1
    assert winner.reason == (
        "trial 1 has the most tokens per second, 20 (held-out loss 1.1000), of 2 finished trials; "
        "next is trial 0 with 10; no trial beats any of trials 0, 1 in all of "
        "tokens_per_s, eval_loss"
    )


def test_the_most_right_answers_win_whatever_the_loss() -> None:
    results = [
        result(0, 1.0, task_score=0.5),
        result(1, 1.4, task_score=0.8125),
        result(2, 0.9, task_score=None),  # nobody asked it
        result(3, 1.2, task_score=0.5),
    ]
    score = search(objectives=["task_score", "eval_loss"])
    winner = select_winner(trials(4), results, score)
    assert winner is not None
    assert winner.reason == (
        "trial 1 has the most right answers, 81.2% (held-out loss 1.4000), of 4 finished trials, 3 "
        "of which keep to the constraints; next is trial 0 with 50.0%; no trial beats any of "
        "trials 0, 1 in all of task_score, eval_loss"
    )


def test_as_many_right_answers_leave_it_to_the_next_objective_and_then_to_the_size() -> None:
    small, large = result(0, 1.2, task_score=0.5), result(1, 1.1, task_score=0.5)
    score = search(objectives=["task_score", "eval_loss"])
    specs = [replace(trial, number=n) for n, trial in enumerate(trials(2))]
    winner = select_winner(specs, [small, large], score)
    assert winner is not None
    assert winner.trial == 1
    assert winner.reason.endswith(
        "; tied with trial 0, it has the better held-out loss, 1.1000 to 1.2000; no trial beats "
        "trial 1 in all of task_score, eval_loss"
    )
    winner = select_winner(specs, [small, replace(large, eval_loss=1.2)], score)
    assert winner is not None
    assert winner.trial == 0
    assert "tied with trial 1, it is the smaller or the earlier one" in winner.reason


def test_a_sampler_seeks_the_most_right_answers() -> None:
    """After forty trials, in which smaller learning rates answer better and lose more."""
    config = sweep_config(
        search={
            "sampler": "tpe",
            "num_trials": 60,
            "objectives": ["task_score"],
            "space": {"optimizer.learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}},
        },
        evaluation__task={},
    )
    known: list[TrialSpec] = []
    results: list[TrialResult] = []
    for _ in range(50):
        known.append(ask(config, known, results))
        badness = 5 + math.log10(known[-1].config.optimizer.learning_rate)  # 0 to 4
        results.append(result(known[-1].number, -badness, task_score=1 - badness / 4))
    drawn = [trial.config.optimizer.learning_rate for trial in known[40:]]
    assert sum(rate < 1e-4 for rate in drawn) >= 8


def test_the_winner_keeps_to_the_constraints() -> None:
    results = [result(0, 1.0, 60 * 10**6), result(1, 1.1, 40 * 10**6)]
    limited = search(constraints={"adapter_mb": 50})
    winner = select_winner(trials(2), results, limited)
    assert winner is not None
    assert winner.trial == 1
    assert "of 2 finished trials, 1 of which keep to the constraints" in winner.reason
    assert violations(limited.constraints, results[0]) == [
        "adapter_mb is 60, and search.constraints.adapter_mb allows 50"
    ]
    assert overshoots(limited.constraints, results[0]) == {"adapter_mb": pytest.approx(0.2)}
    assert select_winner(trials(1), results[:1], limited) is None


def test_a_better_loss_of_a_pruned_trial_is_told_but_does_not_win() -> None:
    results = [result(0, 1.0), result(1, 0.9, state="pruned")]
    winner = select_winner(trials(2), results)
    assert winner is not None
    assert winner.trial == 0
    assert winner.reason.endswith("; 1 trial was stopped early, among them trial 1 with 0.9000")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_of_the_schema_can_be_sought(name: str) -> None:
    assert select_winner(trials(1), [result(0, 1.0)], search(objectives=[name])) is not None


def on_a_card(**changes: Any) -> tuple[TrialSpec, Any]:
    config = sweep_config(**{"search__space": {}} | changes)
    given = premises(config, "cuda", LLAMA_8B, 141 * GIB)
    return TrialSpec(0, {}, config.trial), given


def test_a_trial_whose_adapter_would_be_too_large_is_refused_before_it_is_trained() -> None:
    trial, given = on_a_card(trial__adapter__rank=64)
    limits = search(constraints={"adapter_mb": 50}).constraints
    refused = refusal(trial, limits, given, now=1.0)
    assert refused is not None
    assert (refused.state, refused.reason) == ("failed", "constraint")
    # Llama 3 8B with all linear layers: 64 x 2,621,440 weights of 4 bytes
    assert refused.adapter_bytes == 64 * 2_621_440 * 4
    assert refused.message == (
        "expected: adapter_mb is 671, and search.constraints.adapter_mb allows 50"
    )
    small, given = on_a_card(trial__adapter__rank=4)
    assert refusal(small, limits, given, now=1.0) is None


def test_what_an_adapter_takes_follows_from_each_layers_own_rank() -> None:
    limits = search(constraints={"adapter_mb": 50, "peak_memory_gib": 14}).constraints
    layers = {r".*_proj": 4}
    small, given = on_a_card(
        trial__adapter__rank=64, trial__adapter__rank_pattern=layers, data__block_length=256
    )
    assert refusal(small, limits, given, now=1.0) is None
    wide, given = on_a_card(
        trial__adapter__rank=4, trial__adapter__rank_pattern={"down_proj": 1024}
    )
    refused = refusal(wide, limits, given, now=1.0)
    assert refused is not None
    assert "adapter_mb is" in refused.message
    assert "peak_memory_gib is" in refused.message


def test_a_trial_that_needs_more_memory_than_allowed_even_alone_is_refused() -> None:
    limits = search(constraints={"peak_memory_gib": 14}).constraints
    wide, given = on_a_card(trial__quant__bit_width=16)
    refused = refusal(wide, limits, given, now=1.0)
    assert refused is not None
    assert "peak_memory_gib is" in refused.message
    narrow, given = on_a_card(trial__quant__bit_width=4, data__block_length=256)
    assert refusal(narrow, limits, given, now=1.0) is None


def test_a_limit_is_held_against_the_estimate_itself() -> None:
    wide, given = on_a_card(trial__quant__bit_width=16)
    low = refusal(wide, search(constraints={"peak_memory_gib": 10}).constraints, given, now=1.0)
    assert low is not None
    least_gib = low.peak_memory_bytes / GIB
    for limit, refused in ((least_gib - 0.01, True), (least_gib + 0.01, False)):
        limits = search(constraints={"peak_memory_gib": limit}).constraints
        assert (refusal(wide, limits, given, now=1.0) is not None) == refused


def test_a_trial_under_zero_is_refused_by_what_a_worker_of_its_pack_needs_least() -> None:
    kinds = (WorkerKind("H200", 4, 141 * GIB),)
    limits = search(constraints={"peak_memory_gib": 2}).constraints
    peaks = []
    for workers in (1, 2, 4, None):
        wide, given = on_a_card(
            trial__strategy={"kind": "zero", "stage": 2},
            trial__adapter__rank=64,
            resources__workers_per_pack=workers,
        )
        refused = refusal(wide, limits, given, now=1.0, kinds=kinds)
        assert refused is not None
        peaks.append(refused.peak_memory_bytes)
    one, two, four, free = peaks
    assert one > two > four
    assert free == four


def test_where_the_base_is_not_known_nothing_is_refused_beforehand() -> None:
    config = sweep_config()
    limits = search(constraints={"peak_memory_gib": 0.001, "adapter_mb": 0.001}).constraints
    given = premises(config, "cuda", NO_BASE, 141 * GIB)
    assert refusal(TrialSpec(0, {}, config.trial), limits, given, now=1.0) is None


def test_packs_are_planned_within_the_memory_that_is_allowed() -> None:
    limits = search(constraints={"peak_memory_gib": 24}).constraints
    _, given = on_a_card()
    assert within(limits, given).worker_memory_bytes == 24 * GIB
    assert within(search().constraints, given) == given
    config = sweep_config(search__constraints={"peak_memory_gib": 24})
    assert premises(config, "cuda", LLAMA_8B, 16 * GIB).worker_memory_bytes == 16 * GIB


def test_the_reason_counts_one_trial_as_one() -> None:
    winner = select_winner(trials(1), [result(0, 1.0)])
    assert winner is not None
    assert "of 1 finished trial" in winner.reason
    assert "1 trials" not in winner.reason

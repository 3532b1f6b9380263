"""The memory benchmark's cases, bars and fit."""

from dataclasses import asdict

import pytest

from benchmarks.memory_cases import MAX_PAGED_BYTES, Case, draw_cases, expected
from benchmarks.models import SHAPES
from benchmarks.planner_memory import bars, fit, with_errors
from benchmarks.recording import Row
from orchestrator.planning.compatibility import problems
from orchestrator.planning.memory import GIB, HOPPER
from tests.sweeps import sweep_config

NAMES = ("0.5b", "1.5b", "3b", "8b")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return draw_cases({name: SHAPES[name] for name in NAMES}, 48, 0, 110 * GIB, "cuda")


def test_cases_are_drawn_evenly_over_what_the_planner_must_know(cases: list[Case]) -> None:
    assert len(set(cases)) == 48
    assert {case.shape for case in cases} == set(NAMES)
    assert {case.bit_width for case in cases} == {4, 8, 16}
    assert {case.recomputation for case in cases} == {True, False}
    assert {case.program for case in cases} == {"eager", "compiled", "graph"}
    assert {case.zero_stage for case in cases} >= {None, 1, 2, 3}
    again = draw_cases({name: SHAPES[name] for name in NAMES}, 48, 0, 110 * GIB, "cuda")
    assert again == cases


def test_no_case_is_drawn_that_a_sweep_would_refuse_or_the_card_cannot_hold(
    cases: list[Case],
) -> None:
    for case in cases:
        config = sweep_config(
            trial__quant__bit_width=case.bit_width, trial__strategy=case.strategy.model_dump()
        )
        assert problems(config.trial) == []
        plan = expected(case, SHAPES[case.shape], "cuda")
        assert plan.total_bytes <= 110 * GIB
        assert not case.paged or plan.optimizer_bytes <= MAX_PAGED_BYTES
        alone = case.bit_width == 8 or case.zero_stage is not None
        assert not alone or (case.slots, case.program) == (1, "eager")


def rows(cases: list[Case], error: float, outside: int | None) -> list[Row]:
    """As if everything were `error` times the estimate above it."""
    found = []
    for case in cases:
        plan = expected(case, SHAPES[case.shape], "cuda")
        measured = round(plan.total_bytes / (1 + error))
        found.append(
            asdict(case)
            | {
                "expected": asdict(plan),
                "expected_bytes": plan.total_bytes,
                "torch_bytes": measured - GIB // 2,
                "managed_bytes": 0,
                "outside_bytes": outside,
                "pool_bytes": round(plan.graph_bytes * 1.02),
                "out_of_memory": False,
                "ran": case.program,
            }
        )
    return found


def test_the_bars_compare_what_was_expected_with_all_that_was_used(cases: list[Case]) -> None:
    unknown = rows(cases[1:2], -0.04, None)  # the driver did not say: as in the other rows
    found = bars(with_errors([*rows(cases[:1], 0.02, GIB // 2), *unknown]))
    assert found["median error, at most"].value == pytest.approx(0.03, abs=1e-4)
    assert found["worst under-estimate, at most"].value == pytest.approx(0.04, abs=1e-4)
    assert found["worst under-estimate, at most"].holds
    assert not found["configurations"].holds
    assert found["out of memory in a plan said to fit"].holds


def test_the_fit_says_which_constants_the_rows_ask_for(cases: list[Case]) -> None:
    found = fit(rows(cases, 0.1, GIB))
    assert found["context_bytes"].startswith("1.000 GiB")
    pool = (1 + HOPPER.pool_fraction) * 1.02 - 1
    assert found["pool_fraction"].startswith(f"{pool:.4f}")
    assert "error, 8 bits" in found
    assert "error, ZeRO 3" in found

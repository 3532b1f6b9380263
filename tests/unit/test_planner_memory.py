"""The memory benchmark's cases, bars and fit."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.blocks import prepare_blocks
from benchmarks.host_memory import host_peak
from benchmarks.memory_cases import MAX_PAGED_BYTES, Case, case_of, draw_cases, expected
from benchmarks.models import SHAPES, save_tokenizer
from benchmarks.planner_memory import BARS, bars, fit, host_summary, merged, with_errors
from benchmarks.recording import RESULTS, Row
from orchestrator.data.manifest import load_manifest
from orchestrator.data.reader import BlockReader
from orchestrator.planning.compatibility import problems
from orchestrator.planning.memory import GIB, HOPPER, MIB, context_bytes
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


def test_with_two_gpus_every_pack_has_two_workers_and_most_are_under_zero() -> None:
    shapes = {name: SHAPES[name] for name in NAMES[:3]}  # not 8B, whose base takes long to load
    drawn = draw_cases(shapes, 48, 0, 110 * GIB, "cuda", world_size=2)
    assert {case.world_size for case in drawn} == {2}
    zero = [case for case in drawn if case.zero_stage is not None]
    assert 24 < len(zero) < 48
    assert {(case.zero_stage, case.offload_optimizer) for case in zero} == {
        (stage, place) for stage in (1, 2, 3) for place in ("none", "cpu")
    }
    assert {case.documents for case in zero} == {1, 4}
    assert {case.program for case in drawn} == {"eager", "compiled", "graph"}


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


def test_the_fit_says_what_several_workers_take_beyond_one(cases: list[Case]) -> None:
    pairs = [replace(case, world_size=2) for case in cases]
    found: dict[str, str] = {}
    for case, row in zip(pairs, rows(pairs, 0.0, None), strict=True):
        planned = context_bytes(case.strategy, case.bit_width == 8, 2)
        planned -= HOPPER.partners_context_bytes
        row["outside_bytes"] = planned + 100 * MIB
        found |= fit([row])
    for group in ("replicated", "zero", "reducing"):
        assert found[f"partners_context_bytes, {group}"].startswith("0.098 GiB")
    assert "context_bytes" not in found


def test_a_packs_row_is_of_the_worker_that_holds_more_and_keeps_both(cases: list[Case]) -> None:
    pair = [replace(cases[0], world_size=2)] * 2
    workers = rows(pair, 0.0, GIB)
    for number, row in enumerate(workers):
        row["torch_bytes"] += number
        row["host_bytes"] = 5 - number
        row["environment"] = {"hardware": "1 x NVIDIA H200"}
    found = merged(workers, out_of_memory=True)
    assert found["torch_bytes"] == workers[1]["torch_bytes"]
    assert found["host_bytes"] == 5
    assert [worker["host_bytes"] for worker in found["workers"]] == [5, 4]
    assert found["out_of_memory"]
    assert found["environment"]["hardware"] == "2 x NVIDIA H200"


def test_host_memory_is_summed_up_by_what_is_offloaded_to_it(cases: list[Case]) -> None:
    zero = [case for case in cases if case.zero_stage is not None]
    measured = rows(zero, 0.0, GIB)
    for row in measured:
        row["host_bytes"] = row["expected"]["host_bytes"] * 2
    summary = host_summary(with_errors(measured))
    assert sum(found["rows"] for found in summary.values()) == len(zero)
    assert {found["worst under-estimate"] for found in summary.values()} == {0.5}


@pytest.mark.parametrize(
    ("record", "stages", "count"),
    [
        ("planner_memory", (None, 1, 2, 3), 54),
        ("planner_memory_earlier", (None, 1, 2), 160),  # at stage 3 bases were loaded whole
    ],
)
def test_the_model_still_expects_what_recorded_workers_used(
    record: str, stages: tuple[int | None, ...], count: int
) -> None:
    content = json.loads((RESULTS / f"{record}.json").read_text())["rows"]
    known = [row for row in content if row["zero_stage"] in stages]
    errors = []
    for row in known:
        plan = expected(case_of(row), SHAPES[row["shape"]], "cuda")
        errors.append(plan.total_bytes / row["measured_bytes"] - 1)
    assert len(errors) >= count
    assert statistics.median(map(abs, errors)) < BARS["median error"]
    assert -min(errors) < BARS["worst under-estimate"]


@pytest.mark.parametrize(
    ("record", "count"), [("planner_memory", 64), ("planner_memory_workers", 11)]
)
def test_the_model_expects_the_host_memory_that_recorded_workers_used(
    record: str, count: int
) -> None:
    """Under ZeRO, as each of those had a process of its own."""
    content = json.loads((RESULTS / f"{record}.json").read_text())["rows"]
    errors = [
        expected(case_of(row), SHAPES[row["shape"]], "cuda").host_bytes / row["host_bytes"] - 1
        for row in content
        if row["zero_stage"] is not None
    ]
    assert len(errors) >= count
    assert -min(errors) < BARS["worst under-estimate"]
    assert max(errors) < 0.1


@pytest.mark.parametrize("documents", [1, 4])
def test_blocks_have_as_many_documents_as_are_asked_for(documents: int, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "model")
    shards = prepare_blocks(tmp_path, tmp_path / "model", 64, documents=documents)
    reader = BlockReader(load_manifest(str(shards), "train"))
    positions = reader.blocks(range(reader.num_blocks)).position_ids
    starts = (positions == 0).sum(axis=1)
    assert abs(starts - documents).max() <= 1  # padding counts as one


def test_a_peak_on_the_host_stays_once_its_pages_are_gone() -> None:
    with host_peak() as peak:
        wait_for(lambda: peak.num_bytes > 0)
        before = peak.private_bytes
        pages = bytearray(b"x") * (200 * MIB)
        wait_for(lambda: peak.private_bytes > before + 150 * MIB)
        del pages
    assert peak.private_bytes > before + 150 * MIB


def wait_for(over: Callable[[], bool]) -> None:
    ends = time.monotonic() + 10
    while not over() and time.monotonic() < ends:
        time.sleep(0.01)

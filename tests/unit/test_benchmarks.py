"""The benchmarks' own arithmetic; what they measure needs their hardware."""

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import choices
from benchmarks.children import Part, end, measure, run_ranks, start
from benchmarks.flops import flops_per_token
from benchmarks.forwarding import bars as forwarding_bars
from benchmarks.frozen import layer_sizes
from benchmarks.frozen import measure as measure_frozen
from benchmarks.models import SHAPES
from benchmarks.pack_bars import bars, with_ratios
from benchmarks.packs_equality import bars as equality_bars
from benchmarks.recording import Bar, Row, append_row, read_rows, record
from benchmarks.search_quality import bars as search_bars
from benchmarks.search_quality import point_key, quality_points

RATES = ("tokens_per_s", "predicted_tokens_per_s")


def row(who: str, adapters: int, rate: float, **changes: object) -> Row:
    facts = {"shape": "8b", "bit_width": 4, "tokens_per_adapter": 1024, "optimizer": "adamw"}
    return facts | {"who": who, "adapters": adapters, "tokens_per_s": rate} | changes


ROWS = [
    {"who": "matmul", "tflops": 800.0},
    row("stock", 1, 2000.0),
    row("pack", 1, 10_000.0, program="graph"),
    row("pack", 1, 12_500.0, program="compiled"),
    row("pack", 8, 16_000.0, program="graph"),
    row("pack", 8, 99_000.0, bit_width=16),
    row("stock", 1, 1600.0, optimizer="paged_adamw_8bit"),
    row("pack", 8, 15_000.0, optimizer="paged_adamw_8bit"),
    row("stock, sharing the card", 4, 3000.0),
]


def test_llama_3_8b_takes_four_operations_per_linear_weight_and_token() -> None:
    shape = SHAPES["8b"]
    assert shape.num_linear_params == 6_979_321_856
    attention = 6 * 32 * 4096 * 1024
    head = 4 * 4096 * 128_256
    assert flops_per_token(shape, 1024) == 4 * 6_979_321_856 + head + attention


def test_frozen_products_are_those_of_every_linear_layer_and_of_the_head() -> None:
    shape = SHAPES["8b"]
    weights = sum(outputs * inputs for outputs, inputs in layer_sizes(shape))
    assert weights == shape.num_linear_params + shape.vocab * shape.hidden
    assert measure_frozen("tiny", 8, 1, lambda: None).tokens_per_s > 0


def test_a_pack_is_held_against_stock_and_the_best_single_of_its_own_kind() -> None:
    found = bars(ROWS)
    assert found["8B at 1,024, K=8, against stock"].value == 8.0
    assert found["8B at 1,024, K=8, against own best single"].value == 1.28
    assert len(found) == 2
    assert all(bar.holds for bar in found.values())


def test_a_choice_is_held_against_the_plain_pack_as_the_speed_model_has_it() -> None:
    rates = {
        ("plain", "adamw"): (100.0, 120.0),
        ("recomputation in all layers", "adamw"): (50.0, 54.0),
        ("paged_adamw_8bit", "paged_adamw_8bit"): (80.0, 100.0),
    }
    found = choices.with_ratios(
        [
            {"choice": choice, "optimizer": optimizer} | dict(zip(RATES, rate, strict=True))
            for (choice, optimizer), rate in rates.items()
        ]
    )
    assert [row["times_as_long"] for row in found] == [1.0, 2.0, 1.25]
    assert [row["predicted_times_as_long"] for row in found] == [1.0, 2.222, 1.2]
    of_planner, of_user = choices.bars(found).values()
    assert (of_planner.value, of_planner.holds) == (0.111, False)
    assert (of_user.value, of_user.holds) == (0.04, True)


def test_each_row_gets_its_ratios_and_its_share_of_the_card() -> None:
    found = with_ratios(ROWS)
    matmul, pack, shared = found[0], found[4], found[-1]
    assert pack["ratio_to_stock"] == 8.0
    assert pack["matmul_share_fraction"] == pytest.approx(16_000 * 30.82e9 / 800e12, rel=1e-2)
    assert shared["ratio_to_stock"] == 1.5
    assert matmul == ROWS[0]


def test_sides_with_different_optimizers_are_not_compared() -> None:
    pack = with_ratios(ROWS)[7]
    assert pack["ratio_to_stock"] == pytest.approx(15_000 / 1600, abs=0.01)
    assert "ratio_to_own_best_single" not in pack


def test_a_bar_may_be_a_limit() -> None:
    assert Bar(2.9, 3.0, at_most=True).holds
    assert not Bar(3.1, 3.0, at_most=True).holds
    assert Bar(3.1, 3.0).to_json() == {"value": 3.1, "goal": 3.0, "holds": True}


def test_a_pack_may_differ_by_a_few_times_the_noise_which_is_never_taken_for_nothing() -> None:
    exact = {"largest_difference": 0.0005, "largest_noise": 0.0}
    noisy = {"largest_difference": 0.08, "largest_noise": 0.02}
    (bar,) = equality_bars([exact]).values()
    assert (bar.value, bar.holds) == (0.5, True)
    (bar,) = equality_bars([exact, noisy]).values()
    assert (bar.value, bar.holds) == (4.0, False)


def measured(versions: dict[str, str], date: str = "2026-11-22") -> Row:
    place = {"date": date, "hardware": "1 x H200", "versions": versions}
    return {"who": "stock", "command": "python -m it", "environment": place}


def test_rows_of_several_calls_on_one_day_are_recorded_together(tmp_path: Path) -> None:
    """Between the calls, MLflow was installed on the machine."""
    calls = [measured({"torch": "2.11"}), measured({"torch": "2.11", "mlflow": "3.17"})]
    content = json.loads(record("it", calls, {}, tmp_path).read_text())
    assert content["versions"] == {"torch": "2.11", "mlflow": "3.17"}
    assert content["command"] == "python -m it"
    assert content["rows"] == [{"who": "stock"}] * 2
    for other in (measured({"torch": "2.10"}), measured({"torch": "2.11"}, "2026-11-23")):
        with pytest.raises(SystemExit, match="record each apart"):
            record("it", [*calls, other], {}, tmp_path)


def test_rows_are_there_as_soon_as_they_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, {"who": "stock", "environment": {}})
    append_row(path, {"who": "pack", "environment": {}})
    assert [row["who"] for row in read_rows([path])] == ["stock", "pack"]


def test_ending_a_measurement_ends_what_it_started(tmp_path: Path) -> None:
    sign = tmp_path / "alive"
    code = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"
    )
    inner = (
        "import sys, time, pathlib\nwhile True: pathlib.Path(sys.argv[1]).touch(); time.sleep(.01)"
    )
    child = start([sys.executable, "-c", code, inner, str(sign)])
    try:
        while not sign.exists():
            time.sleep(0.01)
    finally:
        end(child)
    time.sleep(0.1)
    sign.unlink()
    time.sleep(0.1)
    assert not sign.exists()


def test_a_part_that_fails_takes_nothing_from_the_others() -> None:
    wrong, right = Part(["pack", "--steps=none"]), Part(["matmul"], processes=2)
    first, second = measure([wrong, right], timeout_s=100)
    assert first == []
    assert [part["tflops"] > 0 for part in second] == [True, True]


def test_the_forwarding_bars_compare_medians_with_the_undisturbed_runs() -> None:
    measured = {
        "undisturbed": [(10.0, 0.01), (10.2, 0.011), (30.0, 0.05)],
        "down": [(10.0, 0.02), (10.1, 0.04), (10.3, 0.05)],
    }
    rows: list[Row] = [
        {"what": "disturb", "regime": regime, "lost": 0, "doubled": 0}
        | {"train_s": seconds, "beside_fraction": beside}
        for regime, runs in measured.items()
        for seconds, beside in runs
    ]
    rows.append({"what": "rate", "trials": 10, "points": 100, "raw_s": 2.0, "ours_s": 5.0})
    found = forwarding_bars(rows)
    by_clock = found["slowdown by the clock, down, at most"]
    assert by_clock.value == pytest.approx(10.1 / 10.2 - 1, abs=1e-4)
    by_threads = found["slowdown by other threads, down, at most"]
    assert by_threads.value == pytest.approx(0.029)
    assert (by_clock.holds, by_threads.holds) == (True, False)
    assert found["points lost or doubled after sync, at most"].holds
    assert not found["10 trials x 100 points, times raw log_batch, at most"].holds


def test_search_quality_is_held_against_the_grid_by_its_worst_seed() -> None:
    rows: list[Row] = [
        {"part": "grid"},
        {"part": "packs", "seed": 0, "loss_ratio": 1.0, "tokens_fraction": 0.2}
        | {"best_eval_loss": 2.0},
        {"part": "packs", "seed": 1, "loss_ratio": 1.02, "tokens_fraction": 0.3}
        | {"best_eval_loss": 2.04},
        {"part": "tune", "seed": 0, "factor": 4, "best_eval_loss_at_budget": 2.2},
        {"part": "tune", "seed": 1, "factor": 4, "best_eval_loss_at_budget": None},
        {"part": "tune", "seed": 0, "factor": 8, "best_eval_loss_at_budget": 1.9},
        {"part": "tune", "seed": 1, "factor": 8, "best_eval_loss_at_budget": 2.04},
    ]
    found = search_bars(rows)
    assert found["loss over the grid's best, worst seed"].value == 1.02
    assert not found["loss over the grid's best, worst seed"].holds
    assert not found["part of the grid's tokens, worst seed"].holds
    assert found["part of the grid's tokens, median"].holds
    leads = {name: bar for name, bar in found.items() if "Tune's ASHA" in name}
    assert [bar.value for bar in leads.values()] == [1.1, 0.975]
    assert [name.endswith(f"of {count} seeds") for name, count in zip(leads, (1, 2), strict=True)]


def test_a_seed_of_search_quality_is_another_order_of_the_same_points() -> None:
    first, second = (quality_points(seed) for seed in (0, 1))
    assert first != second
    assert sorted(map(point_key, first)) == sorted(map(point_key, second))
    assert len(first) == 48


RANK = """
import pathlib, sys, time
rank = sys.argv[2].rpartition("=")[2]
print("in", sys.argv[3].partition("=")[2], "as", rank, flush=True)
spoken = pathlib.Path(sys.argv[1])
(spoken / rank).touch()
while len(list(spoken.iterdir())) < 2:
    time.sleep(0.01)
time.sleep(60 if rank == WAITS else 0)
sys.exit(3 if rank == "0" and FAILS else 0)
"""


@pytest.mark.parametrize(
    ("waits", "fails", "timeout_s", "codes", "words"),
    [
        ("nobody", False, 60, [0, 0], []),
        ("1", True, 60, [3, None], ["in tcp://127.0.0.1:", "as 0", "as 1"]),
        ("1", False, 5, [0, None], []),  # over its time
    ],
)
def test_ranks_run_until_all_have_ended_or_one_has_failed(
    waits: str,
    fails: bool,
    timeout_s: float,
    codes: list[int | None],
    words: list[str],
    tmp_path: Path,
) -> None:
    code = RANK.replace("WAITS", repr(waits)).replace("FAILS", str(fails))
    found, last = run_ranks([sys.executable, "-c", code, str(tmp_path)], 2, timeout_s)
    assert found == codes
    assert all(word in last for word in words)
    assert bool(last) == fails

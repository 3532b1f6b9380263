"""The benchmarks' own arithmetic; what they measure needs their hardware."""

import sys
import time
from pathlib import Path

import pytest

from benchmarks.children import end, start
from benchmarks.flops import flops_per_token
from benchmarks.models import SHAPES
from benchmarks.pack_bars import bars, with_ratios
from benchmarks.recording import Row, append_row, read_rows


def row(who: str, adapters: int, rate: float, **changes: object) -> Row:
    facts = {"shape": "8b", "bit_width": 4, "tokens_per_adapter": 1024, "who": who}
    return facts | {"adapters": adapters, "tokens_per_s": rate} | changes


ROWS = [
    {"who": "matmul", "tflops": 800.0},
    row("stock", 1, 2000.0),
    row("pack", 1, 10_000.0, program="graph"),
    row("pack", 1, 12_500.0, program="compiled"),
    row("pack", 8, 16_000.0, program="graph"),
    row("pack", 8, 99_000.0, bit_width=16),
    row("stock, sharing the card", 4, 3000.0),
]


def test_llama_3_8b_takes_four_operations_per_linear_weight_and_token() -> None:
    shape = SHAPES["8b"]
    assert shape.num_linear_params == 6_979_321_856
    attention = 6 * 32 * 4096 * 1024
    head = 4 * 4096 * 128_256
    assert flops_per_token(shape, 1024) == 4 * 6_979_321_856 + head + attention


def test_a_pack_is_held_against_stock_and_the_best_single_of_its_own_kind() -> None:
    found = bars(ROWS)
    assert found["8B at 1,024, K=8, against stock"].value == 8.0
    assert found["8B at 1,024, K=8, against own best single"].value == 1.28
    assert len(found) == 2
    assert all(bar.holds for bar in found.values())


def test_each_row_gets_its_ratios_and_its_share_of_the_card() -> None:
    rows = {(row["who"], row.get("adapters")): row for row in with_ratios(ROWS[:5] + ROWS[6:])}
    pack = rows["pack", 8]
    assert pack["ratio_to_stock"] == 8.0
    assert pack["matmul_share_fraction"] == pytest.approx(16_000 * 30.82e9 / 800e12, rel=1e-2)
    assert rows["stock, sharing the card", 4]["ratio_to_stock"] == 1.5
    assert rows["matmul", None] == ROWS[0]


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

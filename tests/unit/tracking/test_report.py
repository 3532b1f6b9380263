"""The report, its plots and the Markdown description, of every kind of sweep."""

import ast
import math
from pathlib import Path
from typing import Any

import pytest

from orchestrator.records import Progress
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking import adapter_model
from orchestrator.tracking.description import describe_sweep
from orchestrator.tracking.parallel_plot import parallel_fields
from orchestrator.tracking.plots import (
    learning_curves,
    loss_by_trial,
    quality_by_memory,
    rank_by_bit_width,
)
from orchestrator.tracking.report import write_report
from orchestrator.tracking.summary import summary_rows
from orchestrator.tracking.translation import MAX_TAG_CHARS
from tests.runs import BEGAN, GRID, make_config, make_run

THREE_FIELDS = tuple(
    {"adapter.rank": rank, "optimizer.learning_rate": rate, "optimizer.name": "adamw"}
    for rank in (4, 16)
    for rate in (1e-4, 1e-2)
)
SWEEPS: dict[str, dict[str, Any]] = {
    "empty": {"params": ()},
    "one trial": {"params": GRID[:1]},
    "unfinished": {"unfinished": (0, 1, 2, 3), "winner": False},
    "one failed": {"failed": (2,)},
    "all failed": {"failed": (0, 1, 2, 3)},
    "nothing searched": {"params": ({},)},
    "three fields": {"params": THREE_FIELDS},
}


@pytest.fixture(params=SWEEPS, ids=lambda name: name)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    return make_run(tmp_path / "run", **SWEEPS[request.param])


def test_a_report_and_a_description_are_made_of_any_sweep(store: RunStore) -> None:
    text = write_report(store).read_text()
    assert text.startswith("<!doctype html>")
    assert "https://cdn" not in text.split("<body>")[0]
    assert text.count("plotly.js v") <= 1
    assert len(describe_sweep(store)) <= MAX_TAG_CHARS


def test_every_figure_is_made_of_any_sweep(store: RunStore) -> None:
    rows = summary_rows(store)
    curves = {row["trial"]: store.points(row["trial"]) for row in rows}
    for figure in (
        rank_by_bit_width(rows),
        loss_by_trial(rows),
        quality_by_memory(rows),
        learning_curves(rows, curves),
    ):
        figure.to_json()


def test_rows_come_best_first_and_failed_ones_last(tmp_path: Path) -> None:
    rows = summary_rows(make_run(tmp_path / "run", failed=(2,)))
    assert [row["trial"] for row in rows] == [3, 1, 0, 2]
    assert [row["winner"] for row in rows] == [True, False, False, False]
    assert rows[0]["params"] == {"bit_width": 16, "rank": 16}
    assert rows[-1]["reason"].startswith("loss_not_finite")
    assert rows[-1]["eval_loss"] is None


def test_the_heat_map_marks_a_failed_trial(tmp_path: Path) -> None:
    (heat,) = rank_by_bit_width(summary_rows(make_run(tmp_path / "run", failed=(2,)))).data
    assert list(heat.x) == ["4", "16"]
    assert list(heat.y) == ["16-bit", "4-bit"]
    assert heat.text[0][0] == "failed"
    assert heat.z[0][0] is None


def test_bars_replace_the_heat_map_when_one_field_is_searched(tmp_path: Path) -> None:
    params = ({"adapter.rank": 4}, {"adapter.rank": 8})
    figure = rank_by_bit_width(summary_rows(make_run(tmp_path / "run", params=params)))
    assert figure.data[0].type == "bar"


def test_parallel_coordinates_need_three_fields(tmp_path: Path) -> None:
    assert parallel_fields(summary_rows(make_run(tmp_path / "two"))) is None
    figure = parallel_fields(summary_rows(make_run(tmp_path / "three", params=THREE_FIELDS)))
    assert figure is not None
    rank, rate, name, _ = figure.data[0].dimensions
    assert list(rank.ticktext) == ["4", "16"]
    assert sorted(rate["values"]) == [-4.0, -4.0, -2.0, -2.0]
    assert list(name.ticktext) == ["adamw"]


def test_the_pareto_line_joins_the_best_trade_offs(tmp_path: Path) -> None:
    line = quality_by_memory(summary_rows(make_run(tmp_path / "run"))).data[0]
    assert line.name == "best trade-offs"
    assert list(line.x) == sorted(line.x)
    assert list(line.y) == sorted(line.y, reverse=True)


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", params=GRID[:1], unfinished=(0,))
    store.add_point(Progress(0, 1, BEGAN, 30, 1, math.nan, 1e-4, 1.0, 1.0))
    write_report(store)
    figure = learning_curves(summary_rows(store), {0: store.points(0)})
    assert figure.data[0].y[-1] is None


def test_what_users_write_is_escaped(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    config = make_config(data={"train": attack}, base_model={"source": attack})
    store = make_run(tmp_path / "run", config=config)
    store.write("registration", {
        "model_name": attack, "version": 1, "champion": True, "reason": attack,
    })  # fmt: skip
    assert attack not in write_report(store).read_text()


def test_the_description_names_winner_version_and_next_command(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run")
    assert f"orchestrator resume {store.folder}" in describe_sweep(store)
    store.write("registration", {
        "model_name": "demo", "version": 3, "champion": False, "reason": "it is worse",
    })  # fmt: skip
    text = describe_sweep(store)
    assert "**Winner: trial 003 · 16-bit · rank 16.**" in text
    assert "`demo` version 3. it is worse." in text
    assert 'orchestrator generate --model "models:/demo@candidate"' in text
    assert "| 3 🏆 | 16 | 16 |" in text


def test_the_stored_model_code_needs_nothing_of_this_project() -> None:
    tree = ast.parse(Path(str(adapter_model.__file__)).read_text())
    modules = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert {module.partition(".")[0] for module in modules} <= {
        "json", "os", "collections", "pathlib", "typing", "mlflow", "pandas",
    }  # fmt: skip
    assert "orchestrator." not in ast.unparse(tree).replace("orchestrator.json", "")

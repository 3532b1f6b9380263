"""The report, its plots and the Markdown description, of every kind of sweep."""

import ast
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.records import PackEvent, Progress, TrialResult
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking import adapter_model
from orchestrator.tracking.bit_map import bit_maps
from orchestrator.tracking.description import describe_sweep
from orchestrator.tracking.figures import report_figures, write_pngs
from orchestrator.tracking.pack_plots import memory_by_pack, pack_gantt
from orchestrator.tracking.parallel_plot import parallel_fields
from orchestrator.tracking.plots import (
    learning_curves,
    loss_by_trial,
    rank_by_bit_width,
)
from orchestrator.tracking.report import write_report
from orchestrator.tracking.summary import summary_rows
from orchestrator.tracking.timeline import pack_times
from orchestrator.tracking.trade_off_plot import MEASURES, pareto_front, quality_against
from orchestrator.tracking.translation import MAX_TAG_CHARS, state_tags
from tests.runs import BEGAN, GRID, make_config, make_run

THREE_FIELDS = tuple(
    {"adapter.rank": rank, "optimizer.learning_rate": rate, "optimizer.name": "adamw"}
    for rank in (4, 16)
    for rate in (1e-4, 1e-2)
)
CONDITIONAL: tuple[dict[str, Any], ...] = (
    {"quant.bit_width": 4, "adapter.rank": 4, "quant.quant_type": "nf4"},
    {"quant.bit_width": 4, "adapter.rank": 8, "quant.quant_type": "fp4"},
    {"quant.bit_width": 16, "adapter.rank": 4, "optimizer.learning_rate": 1e-4},
    {"quant.bit_width": 16, "adapter.rank": 16, "optimizer.learning_rate": 2e-4},
)
SWEEPS: dict[str, dict[str, Any]] = {
    "empty": {"params": ()},
    "one trial": {"params": GRID[:1]},
    "unfinished": {"unfinished": (0, 1, 2, 3), "winner": False},
    "one failed": {"failed": (2,)},
    "all failed": {"failed": (0, 1, 2, 3)},
    "nothing searched": {"params": ({},)},
    "three fields": {"params": THREE_FIELDS},
    "fields of some trials only": {"params": CONDITIONAL},
}


@pytest.fixture(params=SWEEPS, ids=lambda name: name)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    return make_run(tmp_path / "run", **SWEEPS[request.param])


def test_a_report_and_a_description_are_made_of_any_sweep(store: RunStore) -> None:
    text = write_report(store).read_text()
    assert text.startswith("<!doctype html>")
    assert "https://cdn" not in text.split("<body>")[0]
    assert text.count("plotly.js v") <= 1
    assert len(describe_sweep(store, "run-id")) <= MAX_TAG_CHARS


def test_every_figure_is_made_of_any_sweep(store: RunStore) -> None:
    rows = summary_rows(store)
    curves = {row["trial"]: store.points(row["trial"]) for row in rows}
    for figure in (
        rank_by_bit_width(rows),
        loss_by_trial(rows),
        *(quality_against(rows, measure) for measure in MEASURES.values()),
        learning_curves(rows, curves),
    ):
        figure.to_json()
    for one in report_figures(store, rows, pack_times(store.pack_events)):
        one.figure.to_json()


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


def test_what_a_condition_leaves_out_has_a_tick_of_its_own_below_the_others(
    tmp_path: Path,
) -> None:
    rows = summary_rows(make_run(tmp_path / "run", params=CONDITIONAL))
    figure = parallel_fields(rows)
    assert figure is not None
    axes = {axis["label"]: axis for axis in figure.data[0].dimensions}
    place = {row["trial"]: number for number, row in enumerate(rows)}
    kinds, rates = axes["quant_type"], axes["learning_rate"]
    assert list(kinds.ticktext) == ["–", "fp4", "nf4"]
    assert list(rates.ticktext) == ["–", "0.0001", "0.0002"]
    for axis, left_out in ((kinds, (2, 3)), (rates, (0, 1))):
        values = [axis["values"][place[trial]] for trial in left_out]
        assert values == [axis.tickvals[0]] * 2
        assert axis.tickvals[0] < min(axis.tickvals[1:])


def test_a_field_that_the_first_row_lacks_has_a_column_all_the_same(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", params=CONDITIONAL)
    assert "quant_type" not in summary_rows(store)[0]["params"]
    text = write_report(store).read_text()
    assert "<th>quant_type</th>" in text
    assert "<td>fp4</td>" in text
    description = describe_sweep(store, "run-id")
    assert "| trial | bit_width | rank | quant_type | learning_rate | eval loss |" in description
    assert "| 3 🏆 | 16 | 16 | – | 0.0002 |" in description


def test_the_pareto_line_joins_the_best_trade_offs(tmp_path: Path) -> None:
    rows = summary_rows(make_run(tmp_path / "run"))
    line = quality_against(rows, MEASURES["adapter_size"]).data[0]
    assert line.name == "best trade-offs"
    assert list(line.x) == sorted(line.x)
    assert list(line.y) == sorted(line.y, reverse=True)
    fast = [row | {"tokens_per_s": 100.0 * row["trial"] + 1} for row in rows]
    front = pareto_front(fast, MEASURES["speed"])
    assert [row["trial"] for row in front] == [3]  # the best one is the fastest, too


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
    assert f"orchestrator resume {store.folder}" in describe_sweep(store, "run-id")
    store.write("registration", {
        "model_name": "demo", "version": 3, "champion": False, "reason": "it is worse",
    })  # fmt: skip
    text = describe_sweep(store, "run-id")
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
        "collections", "copy", "hashlib", "json", "mlflow", "os", "pandas", "pathlib", "re",
        "typing",
    }  # fmt: skip
    assert "orchestrator." not in ast.unparse(tree).replace("orchestrator.json", "")


def test_the_gantt_chart_has_a_row_for_each_slot_and_says_how_much_it_was_used(
    tmp_path: Path,
) -> None:
    packs = pack_times(make_run(tmp_path / "run").pack_events)
    assert [(pack.num_slots, len(pack.slots), pack.node) for pack in packs] == [
        (2, 2, "node-a"), (2, 2, "node-b"),
    ]  # fmt: skip
    figure = pack_gantt(packs)
    assert figure is not None
    rows = {row for bar in figure.data for row in bar.y}
    assert len(rows) == 4
    assert packs[0].used_fraction == pytest.approx(2 * 90 / (2 * 101), abs=0.02)
    assert all(f"{packs[0].used_fraction:.0%} used" in row for row in rows if "pack 0" in row)


def test_a_killed_sweeps_packs_end_with_its_last_event(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", unfinished=(0,))
    killed = pack_times(store.pack_events)
    resumed = 10_000.0 + max(event["time"] for event in store.pack_events)
    store.add_pack_event(PackEvent(resumed, "start", 0, "4-bit", 1, 1))
    store.add_pack_event(PackEvent(resumed + 60, "ended", 0))
    packs = pack_times(store.pack_events)
    assert [pack.pack for pack in packs] == [0, 1, 2]
    assert [pack.ended for pack in packs[:2]] == [pack.ended for pack in killed]
    assert packs[2].ended == resumed + 60


def test_memory_is_shown_as_planned_and_as_measured(tmp_path: Path) -> None:
    figure = memory_by_pack(pack_times(make_run(tmp_path / "run").pack_events))
    assert figure is not None
    planned, measured = figure.data
    assert list(planned.y) == [0.25, 1.0]  # 64 MiB for each bit
    assert measured.y[0] == pytest.approx((4 * 60 + 16 * 4) / 1024)


def test_the_cost_of_all_trials_is_the_workers_time(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run")
    hours = sum(pack.worker_hours for pack in pack_times(store.pack_events))
    text = write_report(store, cost_per_hour=100.0).read_text()
    assert f'<td>all</td><td class="n">{hours:.3f}</td><td class="n">{100 * hours:.2f}</td>' in text
    assert "cost at" not in write_report(store).read_text()


def test_the_gates_decision_is_in_the_report(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run")
    store.write("registration", {
        "model_name": "demo", "version": 3, "champion": False, "reason": "it is not better",
        "gate": {"reason": "it is not better", "num_pairs": 40, "upper": 0.0123},
    })  # fmt: skip
    text = write_report(store).read_text()
    assert "demo version 3 is a candidate</b>: it is not better" in text
    assert "<td>num pairs</td><td>40</td>" in text


@pytest.mark.slow  # a browser draws for 20 s
def test_the_plots_are_written_as_png(tmp_path: Path) -> None:
    if not any(map(shutil.which, ("chromium", "google-chrome", "chrome", "chromium-browser"))):
        pytest.skip("no Chrome or Chromium is installed")
    paths = write_pngs(make_run(tmp_path / "run"))
    assert {"packs.png", "learning-curves.png"} <= {path.name for path in paths}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    description = describe_sweep(RunStore.open(tmp_path / "run"), "abc")
    assert "![packs](get-artifact?path=plots/packs.png&run_uuid=abc)" in description


def test_a_pruned_trial_is_shown_with_its_reason(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", unfinished=(3,))
    reason = "held-out loss 3.1000 at step 10 is the 4th of 4 so far"
    pruned = TrialResult(3, "pruned", 1, BEGAN, "asha", reason, eval_loss=3.1, steps=10)
    store.finish_trial(pruned)
    assert "3 finished, 1 pruned" in write_report(store).read_text()
    assert reason in write_report(store).read_text()
    assert "(3 finished, 1 pruned, 0 failed)" in describe_sweep(store, "run-id")
    tags = state_tags(store.trial(3), 1, pruned)
    assert tags["orchestrator.state"] == "pruned"
    assert tags["orchestrator.reason"] == "asha"
    assert tags["orchestrator.message"] == reason


def test_a_sweep_of_several_objectives_shows_its_pareto_front(tmp_path: Path) -> None:
    objectives = ["eval_loss", "adapter_bytes"]
    search = {"objectives": objectives, "constraints": {"adapter_mb": 6}}
    config = make_config(search=search)
    store = make_run(tmp_path / "run", config=config)
    text = write_report(store).read_text()
    assert "Outside the constraints" in text
    assert "search.constraints.adapter_mb allows 6" in text
    names = [one.name for one in report_figures(store, summary_rows(store), [])]
    assert "pareto-front" in names
    assert "Pareto front" not in write_report(make_run(tmp_path / "other")).read_text()


def test_right_answers_are_shown_where_trials_gave_some(tmp_path: Path) -> None:
    store = make_run(tmp_path / "run", config=make_config(evaluation={"task": {}}), unfinished=(3,))
    for text in (write_report(store).read_text(), describe_sweep(store, "run-id")):
        assert "right answers" not in text
    scored = replace(store.results[0], number=3, task_score=0.8125)
    store.finish_trial(scored)
    for text in (write_report(store).read_text(), describe_sweep(store, "run-id")):
        assert "right answers" in text
        assert "81.2%" in text


def test_the_map_of_bits_that_was_chosen_is_in_the_report() -> None:
    layers = {f"model.layers.{n}.mlp.down_proj": 8 if n in (0, 1, 2, 5) else 4 for n in range(7)}
    pattern = layers | {"model.layers.0.self_attn.q_proj": 16, "lm_head": 16}
    shown = bit_maps({"one": {"reason": "5 bits <on average>", "bit_width_pattern": pattern}})
    assert "5 bits &lt;on average&gt;" in shown
    assert "<td>mlp.down_proj</td><td>3–4, 6</td><td>0–2, 5</td><td></td>" in shown
    assert "<td>self_attn.q_proj</td><td></td><td></td><td>0</td>" in shown
    assert bit_maps({}) == ""

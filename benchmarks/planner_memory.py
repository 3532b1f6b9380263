"""The planner's memory model against what pack workers use, over random configurations.

    python -m benchmarks.planner_memory run --rows FILE --seconds 500
    python -m benchmarks.planner_memory record --rows FILE
    python -m benchmarks.planner_memory fit --rows FILE

What is compared with what is said in benchmarks/memory_part.py. `fit` prints the constants of
orchestrator/planning/memory.py that the rows ask for.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import children
from benchmarks.memory_cases import Case, draw_cases
from benchmarks.models import SHAPES
from benchmarks.recording import Bar, Row, add_record_action, command, read_rows, record
from orchestrator.planning.memory import GIB, HOPPER
from orchestrator.records import Device

# A base of 8B is written and read in parts of 5 GB.
SHAPE_NAMES = ("0.5b", "1.5b", "3b", "8b")
# Between the processes of two shapes, as the first rows are worth most.
MIN_SECONDS = 20
BARS = {"configurations": 40, "median error": 0.03, "worst under-estimate": 0.05}


def main() -> None:
    options = _options()
    if options.action == "record":
        rows = with_errors(read_rows(options.rows))
        print(record(options.name, rows, bars(rows)))
    elif options.action == "fit":
        for name, value in fit(read_rows(options.rows)).items():
            print(f"{name}: {value}")
    else:
        _run(options)


def with_errors(rows: Sequence[Row]) -> list[Row]:
    """With the whole of what was measured, and how far from it the estimate was."""
    complete = []
    for row in rows:
        there = (
            _outside(rows, _group(row)) if row["outside_bytes"] is None else row["outside_bytes"]
        )
        measured = row["torch_bytes"] + row["managed_bytes"] + there
        error = round(row["expected_bytes"] / measured - 1, 4)
        complete.append(row | {"measured_bytes": measured, "error_fraction": error})
    return complete


def bars(rows: Sequence[Row]) -> dict[str, Bar]:
    errors = [row["error_fraction"] for row in rows]
    lost = sum(row["out_of_memory"] for row in rows)
    return {
        "configurations": Bar(len(rows), BARS["configurations"]),
        "median error, at most": Bar(
            round(statistics.median(map(abs, errors)), 4), BARS["median error"], at_most=True
        ),
        "worst under-estimate, at most": Bar(
            max(0.0, -min(errors)), BARS["worst under-estimate"], at_most=True
        ),
        "out of memory in a plan said to fit": Bar(lost, 0, at_most=True),
    }


def fit(rows: Sequence[Row]) -> dict[str, Any]:
    """The constants of planning.memory.Measured, and what they leave in error by kind of worker."""
    graphs = [row for row in rows if row["pool_bytes"]]
    without = 1 + HOPPER.pool_fraction
    pools = [row["pool_bytes"] * without / row["expected"]["graph_bytes"] - 1 for row in graphs]
    left: dict[str, list[float]] = {}
    for row in with_errors(rows):
        for kind in _kinds(row):
            left.setdefault(kind, []).append(row["error_fraction"])
    found: dict[str, Any] = {
        "context_bytes": f"{_outside(rows, 'replicated') / GIB:.3f} GiB "
        f"({HOPPER.context_bytes / GIB:.3f} now)"
    }
    if pools:
        found["pool_fraction"] = f"{statistics.median(pools):.4f} ({HOPPER.pool_fraction} now)"
        found["pool_fraction, spread"] = f"{min(pools):.4f} to {max(pools):.4f}"
    for kind, errors in sorted(left.items()):
        median, least, most = statistics.median(errors), min(errors), max(errors)
        words = f"{median:+.1%} ({least:+.1%} to {most:+.1%}, {len(errors)} rows)"
        found[f"error, {kind}"] = words
    return found


def _kinds(row: Row) -> list[str]:
    kinds = [row["shape"], f"{row['bit_width']} bits", row["ran"], row["optimizer"]]
    kinds += [name for name in ("recomputation", "dropout", "dequantise_once") if row[name]]
    kinds += [f"ZeRO {row['zero_stage']}"] if row["zero_stage"] else []
    return kinds


def _group(row: Row) -> str:
    """What decides how much is outside torch's allocator: see planning.memory.context_bytes."""
    if row["zero_stage"] is None:
        return "replicated"
    return "gathering" if (row["zero_stage"], row["offload_params"]) == (3, "none") else "zero"


def _outside(rows: Sequence[Row], group: str) -> int:
    """The median of the group, or of the nearest one that the driver told something of."""
    known: dict[str, list[int]] = {}
    for row in rows:
        if row["outside_bytes"] is not None:
            known.setdefault(_group(row), []).append(row["outside_bytes"])
    found = next((known[name] for name in (group, "zero", "replicated") if name in known), [0])
    return round(statistics.median(found))


def _run(options: argparse.Namespace) -> None:
    ends = time.monotonic() + options.seconds
    children.end_on_sigterm()
    shapes = {name: SHAPES[name] for name in options.shapes}
    device: Device = options.device
    cases = draw_cases(shapes, options.count, options.seed, round(options.most_gib * GIB), device)
    for name in options.shapes:
        model = options.folder / name
        children.call("benchmarks.models", name, str(model))
        left_s = ends - time.monotonic()
        if left_s < MIN_SECONDS:
            print(f"out of time before {name}", flush=True)
            return
        # The shapes that follow get their part of the time.
        seconds = left_s / (len(options.shapes) - options.shapes.index(name))
        mine = [case for case in cases if case.shape == name]
        _measure(model, mine, options.rows[0], seconds)


def _measure(model: Path, cases: Sequence[Case], rows: Path, seconds: float) -> None:
    """Under ZeRO each in a process of its own, as a worker is: DeepSpeed leaves memory behind."""
    ends = time.monotonic() + seconds
    parts = [[case] for case in cases if case.zero_stage is not None]
    for part in [*parts, [case for case in cases if case.zero_stage is None]]:
        if (left_s := ends - time.monotonic()) > 0:
            _measure_in_one(model, part, rows, left_s)


def _measure_in_one(model: Path, cases: Sequence[Case], rows: Path, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.json"
        path.write_text(json.dumps([asdict(case) for case in cases]))
        words = [sys.executable, "-m", "benchmarks.memory_part", f"--cases={path}"]
        words += [f"--model={model}", f"--rows={rows}", f"--seconds={seconds}"]
        child = children.start([*words, f"--command={command()}"])
        try:
            child.wait()
        finally:
            children.end(child)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run")
    run.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPE_NAMES)
    run.add_argument("--count", type=int, default=48, help="configurations, of all shapes")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--most-gib", type=float, default=110, help="that a configuration may expect")
    run.add_argument("--seconds", type=float, default=500, help="after which none is begun")
    run.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    run.add_argument(
        "--folder", type=Path, default=Path("/tmp/planner_memory"), help="models, data"
    )
    run.add_argument("--rows", type=Path, nargs=1, required=True)
    add_record_action(actions, "planner_memory")
    fitted = actions.add_parser("fit")
    fitted.add_argument("--rows", type=Path, nargs="+", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()

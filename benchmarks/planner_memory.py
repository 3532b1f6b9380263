"""The planner's memory model against what pack workers use, over random configurations.

    python -m benchmarks.planner_memory run --rows FILE --seconds 500 [--gpus 2]
    python -m benchmarks.planner_memory record --rows FILE
    python -m benchmarks.planner_memory fit --rows FILE

What is compared with what is said in benchmarks/memory_part.py. With --gpus 2 every pack has two
workers, and its row is of the one that holds more. `fit` prints the constants of
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
from benchmarks.memory_cases import (
    OUT_OF_MEMORY_EXIT,
    Case,
    case_of,
    draw_cases,
    expected,
    worker_rows,
)
from benchmarks.models import SHAPES
from benchmarks.recording import (
    Bar,
    Row,
    add_record_action,
    append_row,
    command,
    parser_of_actions,
    read_rows,
    record,
)
from orchestrator.planning.memory import GIB, HOPPER, context_bytes
from orchestrator.records import Device

# A base of 8B is written and read in parts of 5 GB.
SHAPE_NAMES = ("0.5b", "1.5b", "3b", "8b")
# Between the processes of two shapes, as the first rows are worth most.
MIN_SECONDS = 20
# Of a pack of several workers: one may wait for a partner for ever.
PACK_TIMEOUT_S = 240
BARS = {"configurations": 40, "median error": 0.03, "worst under-estimate": 0.05}


def main() -> None:
    options = _options()
    if options.action == "record":
        rows = with_errors(read_rows(options.rows))
        print(record(options.name, rows, bars(rows), summary=host_summary(rows)))
    elif options.action == "fit":
        for name, value in fit(read_rows(options.rows)).items():
            print(f"{name}: {value}")
    else:
        _run(options)


def with_errors(rows: Sequence[Row]) -> list[Row]:
    """With the whole of what was measured, and how far from it the estimate was; of several
    workers, of the one that holds most."""
    complete = []
    for row in rows:
        there = (
            _outside(rows, _group(row)) if row["outside_bytes"] is None else row["outside_bytes"]
        )
        measured = row["torch_bytes"] + row["managed_bytes"] + there
        error = round(row["expected_bytes"] / measured - 1, 4)
        errors = {"measured_bytes": measured, "error_fraction": error}
        planned = row["expected"]["host_bytes"]  # 0 for a worker on a CPU
        if planned and (host := row.get("host_bytes")):
            errors["host_error_fraction"] = round(planned / host - 1, 4)
        complete.append(row | errors)
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


def host_summary(rows: Sequence[Row]) -> Row:
    """Of host memory, for which no bar is set; where something is offloaded to it, apart."""
    summary: Row = {}
    for name, chosen in _by_host(rows).items():
        errors = [row["host_error_fraction"] for row in chosen]
        summary[f"host memory, {name}"] = {
            "rows": len(errors),
            "median error": round(statistics.median(map(abs, errors)), 4),
            "worst under-estimate": max(0.0, -min(errors)),
        }
    return summary


def fit(rows: Sequence[Row]) -> dict[str, Any]:
    """The constants of planning.memory.Measured, and what the model, as it is now, leaves in error
    by kind of worker."""
    rows = [row | _expected_now(row) for row in rows]
    graphs = [row for row in rows if row["pool_bytes"]]
    without = 1 + HOPPER.pool_fraction
    pools = [row["pool_bytes"] * without / row["expected"]["graph_bytes"] - 1 for row in graphs]
    complete = with_errors(rows)
    left: dict[str, list[float]] = {}
    for row in complete:
        for kind in _kinds(row):
            left.setdefault(kind, []).append(row["error_fraction"])
    found: dict[str, Any] = _contexts(rows)
    if pools:
        found["pool_fraction"] = f"{statistics.median(pools):.4f} ({HOPPER.pool_fraction} now)"
        found["pool_fraction, spread"] = f"{min(pools):.4f} to {max(pools):.4f}"
    for kind, errors in sorted(left.items()):
        found[f"error, {kind}"] = _spread(errors)
    for kind, chosen in _by_host(complete).items():
        found[f"error, host, {kind}"] = _spread([row["host_error_fraction"] for row in chosen])
    return found


def _expected_now(row: Row) -> Row:
    case = case_of(row)
    device: Device = "cuda" if row["expected"]["host_bytes"] else "cpu"
    plan = expected(case, SHAPES[case.shape], device)
    return {"expected_bytes": plan.total_bytes, "expected": asdict(plan)}


def _contexts(rows: Sequence[Row]) -> dict[str, str]:
    """What is outside torch's allocator beyond what the constants before each say."""
    planned = {
        "context_bytes": ("replicated", HOPPER.context_bytes),
        "group_context_bytes": ("zero", HOPPER.group_context_bytes),
        "dividing_context_bytes": ("dividing", HOPPER.dividing_context_bytes),
    }
    found, rest = {}, 0
    for name, (group, now) in planned.items():
        if known := _known(rows, group):
            value = statistics.median(known) - rest
            found[name] = f"{value / GIB:.3f} GiB ({now / GIB:.3f} now)"
        rest += now
    now = HOPPER.partners_context_bytes
    for group in ("replicated", "zero", "reducing", "dividing"):
        if known := _known(rows, f"{group}, shared"):
            row = next(row for row in rows if _group(row) == f"{group}, shared")
            case = case_of(row)
            others = context_bytes(case.strategy, case.bit_width == 8, case.world_size) - now
            value = statistics.median(known) - others
            words = f"{value / GIB:.3f} GiB ({now / GIB:.3f} now)"
            found[f"partners_context_bytes, {group}"] = words
    return found


def _spread(errors: Sequence[float]) -> str:
    median, least, most = statistics.median(errors), min(errors), max(errors)
    return f"{median:+.1%} ({least:+.1%} to {most:+.1%}, {len(errors)} rows)"


def _kinds(row: Row) -> list[str]:
    kinds = [row["shape"], f"{row['bit_width']} bits", row["ran"], row["optimizer"]]
    kinds += [name for name in ("recomputation", "dropout", "dequantise_once") if row[name]]
    kinds += [f"ZeRO {row['zero_stage']}"] if row["zero_stage"] else []
    workers = row.get("world_size", 1)  # older rows have neither
    kinds += [f"{workers} workers, {_offloading(row)}"] if workers > 1 else []
    kinds += ["several documents in a block"] if row.get("documents", 1) > 1 else []
    return kinds


def _offloading(row: Row) -> str:
    if row["zero_stage"] is None:
        return "replicated"
    offloads = [part for part in ("optimizer", "params") if row[f"offload_{part}"] != "none"]
    return f"ZeRO {row['zero_stage']}" + (f", {' and '.join(offloads)} offloaded" * bool(offloads))


def _by_host(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Those whose process measured them alone, as under ZeRO and of several workers."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        alone = row["zero_stage"] is not None or row.get("world_size", 1) > 1
        if alone and "host_error_fraction" in row:
            found.setdefault(_offloading(row), []).append(row)
    return dict(sorted(found.items()))


def _group(row: Row) -> str:
    """What decides how much is outside torch's allocator: see planning.memory.context_bytes."""
    shared = ", shared" if row.get("world_size", 1) > 1 else ""
    if row["zero_stage"] is None:
        return f"replicated{shared}"
    if (row["zero_stage"], row["bit_width"]) == (3, 8):
        return f"dividing{shared}"
    return ("reducing" if shared and row["zero_stage"] < 3 else "zero") + shared


def _outside(rows: Sequence[Row], group: str) -> int:
    """The median of the group, or of the nearest one that the driver told something of."""
    shared = ", shared" if group.endswith(", shared") else ""
    near = (
        group,
        f"zero{shared}",
        f"reducing{shared}",
        f"replicated{shared}",
        "zero",
        "replicated",
    )
    found = next((known for name in near if (known := _known(rows, name))), [0])
    return round(statistics.median(found))


def _known(rows: Sequence[Row], group: str) -> list[int]:
    known = (row["outside_bytes"] for row in rows if _group(row) == group)
    return [num_bytes for num_bytes in known if num_bytes is not None]


def _run(options: argparse.Namespace) -> None:
    ends = time.monotonic() + options.seconds
    children.end_on_sigterm()
    shapes = {name: SHAPES[name] for name in options.shapes}
    device: Device = options.device
    most_bytes = round(options.most_gib * GIB)
    cases = draw_cases(shapes, options.count, options.seed, most_bytes, device, options.gpus)
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
    """Under ZeRO each in a process of its own, as a worker is: DeepSpeed leaves memory behind. So
    are those of several workers. ZeRO's come first."""
    ends = time.monotonic() + seconds
    zero = [[case] for case in cases if case.zero_stage is not None]
    rest = [case for case in cases if case.zero_stage is None]
    together = [[case] for case in rest if case.world_size > 1]
    for part in [*zero, *together, [case for case in rest if case.world_size == 1]]:
        left_s = ends - time.monotonic()
        if left_s <= 0 or not part:
            continue
        if part[0].world_size > 1:
            _measure_together(model, part[0], rows, min(left_s, PACK_TIMEOUT_S))
        else:
            _measure_in_one(model, part, rows, left_s)


def _measure_together(model: Path, case: Case, rows: Path, seconds: float) -> None:
    """By a process for each worker; on the whole cards once one has run out of memory."""
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "rows"
        words = _part(Path(folder), model, [case], own, seconds)
        codes, last = children.run_ranks(words, case.world_size, seconds, ranks=case.world_size)
        if lost := OUT_OF_MEMORY_EXIT in codes:
            print(f"out of memory: {last}", flush=True)
            words.append("--uncapped")
            _, last = children.run_ranks(words, case.world_size, seconds, ranks=case.world_size)
        found = [worker_rows(own, rank) for rank in range(case.world_size)]
        if not all(path.exists() for path in found):
            print(f"failed, or over its time: {case}: {last}", flush=True)
            return
        append_row(rows, merged(read_rows(found), lost))


def merged(workers: Sequence[Row], out_of_memory: bool) -> Row:
    """A pack's row: of the worker that holds more, with what each has measured."""
    most = max(workers, key=lambda row: row["torch_bytes"] + row["managed_bytes"])
    names = [name for name in most if name.endswith("_bytes") and name != "expected_bytes"]
    each = [{name: row[name] for name in names} for row in workers]
    hardware = most["environment"]["hardware"].replace("1 x", f"{len(workers)} x")
    return most | {
        "workers": each,
        "host_bytes": max(row["host_bytes"] for row in workers),
        "out_of_memory": out_of_memory,
        "environment": most["environment"] | {"hardware": hardware},
    }


def _measure_in_one(model: Path, cases: Sequence[Case], rows: Path, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        child = children.start(_part(Path(folder), model, cases, rows, seconds))
        try:
            child.wait()
        finally:
            children.end(child)


def _part(
    folder: Path, model: Path, cases: Sequence[Case], rows: Path, seconds: float
) -> list[str]:
    """The command that measures these."""
    path = folder / "cases.json"
    path.write_text(json.dumps([asdict(case) for case in cases]))
    words = [sys.executable, "-m", "benchmarks.memory_part", f"--cases={path}"]
    words += [f"--model={model}", f"--rows={rows}", f"--seconds={seconds}"]
    return [*words, f"--command={command()}"]


def _options() -> argparse.Namespace:
    parser, actions = parser_of_actions(__doc__)
    run = actions.add_parser("run")
    run.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPE_NAMES)
    run.add_argument("--count", type=int, default=48, help="configurations, of all shapes")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--most-gib", type=float, default=110, help="that a configuration may expect")
    run.add_argument("--seconds", type=float, default=500, help="after which none is begun")
    run.add_argument("--gpus", type=int, choices=(1, 2), default=1, help="workers of a pack")
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

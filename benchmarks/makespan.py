"""Wall time of a whole sweep, from the command to the registered champion, three ways.

    python -m benchmarks.makespan run --rows FILE --shape 0.5b --steps 40
    python -m benchmarks.makespan record --rows FILE

The sides train the same trials (ranks x rates x bit-widths) on the same base, rows, number of steps
and tokens, each with caches of its own, so that none profits from what another compiled or sharded:

    packs          orchestrator sweep
    packs of one   the same with one slot per pack: one trial after another on each GPU
    tune           Ray Tune + HF Trainer, one trial per GPU (benchmarks.tune_baseline)
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import children
from benchmarks.recording import (
    Bar,
    Row,
    add_record_action,
    append_row,
    environment,
    parser_of_actions,
    read_rows,
    record,
)

SWEEP = [sys.executable, "-c", "from jobs.cli import main; main()", "sweep"]
ALONE = ["--set", "resources.slots_per_pack=1"]
SIDES = ("packs", "packs of one", "tune")
HELD_OUT_BLOCKS = 8
TAIL_LINES = 15


def main() -> None:
    options = _options()
    if options.action == "record":
        rows = read_rows(options.rows)
        print(record(options.name, rows, _bars(rows)))
        return
    children.end_on_sigterm()
    options.folder = options.folder.resolve()  # Tune's trials run in folders of their own
    base = options.folder / options.shape
    children.call("benchmarks.models", options.shape, str(base))
    for side in options.sides:
        folder = options.folder / side.replace(" ", "-")
        if folder.exists():
            raise SystemExit(f"{folder} is there: a side must start with nothing")
        config = _write_config(options, base, folder)
        append_row(options.rows[0], _facts(options) | _run(side, config, folder, options.timeout))


def _write_config(options: argparse.Namespace, base: Path, folder: Path) -> Path:
    """JSON is YAML, too."""
    from benchmarks.blocks import data_config

    blocks = options.steps * options.batch  # every block once
    data = data_config(folder / "rows", options.tokens, blocks, HELD_OUT_BLOCKS)
    content = {
        "name": "makespan",
        "base_model": {"source": str(base)},
        "data": data.model_dump(mode="json"),
        "trial": {
            "steps": options.steps,
            "batch_size": options.batch,
            "optimizer": {"name": "paged_adamw_8bit"},
        },
        "search": {
            "space": {
                "quant.bit_width": options.bits,
                "adapter.rank": options.ranks,
                "optimizer.learning_rate": options.rates,
            }
        },
        "checkpoint_every_steps": options.steps,
        "runs_dir": str(folder / "runs"),
    }
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(content, indent=2))
    return path


def _facts(options: argparse.Namespace) -> Row:
    return {
        "shape": options.shape,
        "trials": math.prod(map(len, (options.ranks, options.rates, options.bits))),
        "steps": options.steps,
        "blocks_per_step": options.batch,
        "block_length": options.tokens,
    }


def _run(side: str, config: Path, folder: Path, timeout_s: float) -> Row:
    log = folder / "log.txt"
    with log.open("wb") as file:
        started = time.monotonic()
        child = children.start(
            _command(side, config, folder),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=_own_caches(folder / "cache"),
        )
        code = None
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            print(f"{side}: over {timeout_s:.0f} s")
        finally:
            wall_s = time.monotonic() - started
            children.end(child)
    text = log.read_text(errors="replace")
    whole = code == 0 and "@champion" in text
    if not whole:
        print("\n".join(text.splitlines()[-TAIL_LINES:]), flush=True)
    row: Row = {"who": side, "champion": whole, "makespan_s": round(wall_s, 1)}
    return row | {"trials_done": text.count(DONE[side]), "environment": environment()}


# What each side's log says of a trial that is over.
DONE = {"packs": ": finished at step", "packs of one": ": finished at step"}
DONE |= {"tune": "trial done: "}


def _command(side: str, config: Path, folder: Path) -> list[str]:
    if side == "tune":
        return [sys.executable, "-m", "benchmarks.tune_baseline", str(config), str(folder / "tune")]
    extra = ALONE if side == "packs of one" else []
    return [*SWEEP, str(config), "--run-dir", str(folder / "run"), *extra]


def _own_caches(folder: Path) -> dict[str, str]:
    caches = {
        "ORCHESTRATOR_CACHE": folder / "orchestrator",
        "TORCHINDUCTOR_CACHE_DIR": folder / "inductor",
        "TRITON_CACHE_DIR": folder / "triton",
    }
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Wide enough that no line of the log is folded.
    fixed = {"PYTHONPATH": path, "COLUMNS": "200", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return os.environ | fixed | {name: str(value) for name, value in caches.items()}


def _bars(rows: list[Row]) -> dict[str, Bar]:
    """Over 1: packs end first."""
    times = {row["who"]: row["makespan_s"] for row in rows if row["champion"]}
    return {
        f"packs, against {other}": Bar(round(times[other] / times["packs"], 2), 1.0)
        for other in SIDES[1:]
        if "packs" in times and other in times
    }


def _options() -> argparse.Namespace:
    parser, actions = parser_of_actions(__doc__)
    run = actions.add_parser("run")
    run.add_argument("--shape", default="0.5b")
    run.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    run.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    run.add_argument("--rates", type=float, nargs="+", default=[2e-4, 1e-3])
    run.add_argument("--bits", type=int, nargs="+", default=[4, 16])
    run.add_argument("--steps", type=int, default=100)
    run.add_argument("--batch", type=int, default=4, help="blocks in a step of one trial")
    run.add_argument("--tokens", type=int, default=1024, help="in a block")
    run.add_argument("--timeout", type=float, default=900, help="seconds for each side")
    run.add_argument("--folder", type=Path, default=Path("/tmp/makespan"))
    run.add_argument("--rows", type=Path, nargs=1, required=True)
    add_record_action(actions, "packs_makespan")
    return parser.parse_args()


if __name__ == "__main__":
    main()

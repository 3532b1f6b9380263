"""A sweep whose process is killed at random points, against the same sweep left alone.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python -m benchmarks.search_resume --kills 20

Real training of a tiny base on the CPU: random search with a pruner, in a process that is ended by
SIGKILL and started again until the sweep is over. Compared are the trials asked for, every verdict
at a rung (trial, rung, keep or stop), how and at which step each trial ended, and the winner; the
losses must be equal up to the rounding of packs that were put together in another way.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import children
from benchmarks.blocks import data_config
from benchmarks.models import build
from benchmarks.recording import Bar, Row, append_row, environment, read_rows, record
from benchmarks.sweeps import conclusion, final_losses, run_or_resume
from orchestrator.config import SweepConfig
from orchestrator.sweep.run_store import RunStore

TRIALS, STEPS, CHECKPOINT_EVERY = 24, 64, 4
SAME_LOSS = 1e-4
START_TIMEOUT_S = 300.0
POLL_S = 0.02


def main() -> None:
    options = _options()
    if options.sweep is not None:
        config = SweepConfig.model_validate_json((options.sweep / "config.json").read_text())
        run_or_resume(config, options.sweep / "run")
        return
    with tempfile.TemporaryDirectory() as temporary:
        rows = options.rows or Path(temporary) / "rows.jsonl"
        append_row(rows, _compare(options, Path(temporary)) | {"environment": environment()})
        found = read_rows([rows])
        print(record(options.name, found, _bars(found, options.kills)))


def _compare(options: argparse.Namespace, folder: Path) -> Row:
    base = folder / "base"
    build("tiny", base)
    content = _config(base, folder / "rows", options)
    alone, killed = folder / "alone", folder / "killed"
    for place in (alone, killed):
        place.mkdir()
        (place / "config.json").write_text(json.dumps(content))
    started = time.monotonic()
    _start(alone).wait()
    alone_s = time.monotonic() - started
    train_s = _train_s(alone / "run")
    kills = _run_with_kills(killed, options.kills, train_s, options.seed)
    first, second = RunStore.open(alone / "run"), RunStore.open(killed / "run")
    expected, found = conclusion(first), conclusion(second)
    losses, others = final_losses(first), final_losses(second)
    states = [result.state for result in first.results]
    return {
        "trials": len(first.trials),
        "pruned": states.count("pruned"),
        "finished": states.count("finished"),
        "verdicts": len(expected["verdicts"]),
        "kills": kills,
        "attempts_of_killed": sum(result.attempt for result in second.results),
        "alone_s": round(alone_s, 1),
        "same_trials": expected["trials"] == found["trials"],
        "same_verdicts": expected["verdicts"] == found["verdicts"],
        "same_ends": expected["ends"] == found["ends"],
        "same_winner": expected["winner"] == found["winner"],
        "largest_loss_difference": max(
            (abs(losses[n] - others[n]) for n in losses.keys() & others.keys()), default=None
        ),
    }


def _config(base: Path, rows: Path, options: argparse.Namespace) -> dict[str, Any]:
    data = data_config(rows, 64, 32, 4)
    return {
        "name": "search-resume",
        "base_model": {"source": str(base)},
        "data": data.model_dump(mode="json"),
        "trial": {"steps": options.steps, "batch_size": 2, "micro_batch_size": 2},
        "search": {
            "sampler": "random",
            "num_trials": options.trials,
            "space": {
                "quant.bit_width": [4, 16],
                "adapter.rank": {"low": 2, "high": 16, "integer": True},
                "optimizer.learning_rate": {"low": 1e-4, "high": 3e-2, "log": True},
            },
            "pruner": {"kind": "asha", "reduction_factor": 3, "min_steps": options.steps // 9},
        },
        "resources": {"device": "cpu", "slots_per_pack": 4},
        "checkpoint_every_steps": CHECKPOINT_EVERY,
        "max_restarts": 0,
    }


def _start(place: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.search_resume", f"--sweep={place}"]
    return children.start(command, stdout=subprocess.DEVNULL)


def _run_with_kills(place: Path, kills: int, train_s: float, seed: int) -> int:
    """Each process may train for a random time, in all about as long as the sweep takes."""
    draw = random.Random(seed)
    done = 0
    while True:
        child = _start(place)
        try:
            if done == kills:
                assert child.wait() == 0
                return done
            if not _begins_to_train(child, place / "run"):
                return done
            try:
                child.wait(draw.uniform(0, train_s / kills))
                return done  # it came to its end first
            except subprocess.TimeoutExpired:
                done += 1
        finally:
            children.end(child)
        print(f"killed {done} times", flush=True)


def _begins_to_train(child: subprocess.Popen[bytes], run: Path) -> bool:
    """Waits until its base is loaded; False if it ended before."""
    path = run / "packs.jsonl"
    before = path.read_text().count('"ready"') if path.exists() else 0
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            return False
        if path.exists() and path.read_text().count('"ready"') > before:
            return True
        time.sleep(POLL_S)
    raise SystemExit(f"the sweep did not begin within {START_TIMEOUT_S:.0f} s")


def _train_s(run: Path) -> float:
    events = RunStore.open(run).pack_events
    ready = [event["time"] for event in events if event["what"] == "ready"]
    return float(events[-1]["time"] - ready[0])


def _bars(rows: list[Row], kills: int) -> dict[str, Bar]:
    row = rows[-1]
    same = ("same_trials", "same_verdicts", "same_ends", "same_winner")
    return {
        "kills": Bar(row["kills"], kills),
        **{name.replace("_", " "): Bar(float(row[name]), 1.0) for name in same},
        "largest difference of a loss": Bar(row["largest_loss_difference"], SAME_LOSS, True),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--name", default="search_resume")
    parser.add_argument("--sweep", type=Path, help="run or resume the sweep of this folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Forwarding to MLflow: what it costs training, what it loses (nothing), and how fast it is.

`disturb` trains one trial with `orchestrator train` (the strictest case: the follower shares the
trainer's process) once for each regime and round, against a server process that is started and
killed by its id, then syncs and compares the server with the run folder point by point. `rate`
sends a made-up run folder to a new server, and the same values by raw log_batch calls to another.
Rows go to --rows; `record` writes benchmarks/results/mlflow_forwarding.json.

    python -m benchmarks.forwarding disturb --rounds 5 --steps 1500 --rows forwarding.jsonl
    python -m benchmarks.forwarding rate --trials 1000 --rows forwarding.jsonl
    python -m benchmarks.forwarding record --rows forwarding.jsonl
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.forwarding_down import REGIMES, disturb
from benchmarks.forwarding_rate import measure_rate
from benchmarks.recording import Bar, Row, append_row, environment, read_rows, record

MAX_SLOWDOWN_FRACTION = 0.02
MAX_RATIO_TO_RAW = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("disturb", "rate", "record"))
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--points", type=int, default=1000, help="metric values of one trial")
    arguments = parser.parse_args()
    if arguments.what == "record":
        rows = read_rows([arguments.rows])
        print(record("mlflow_forwarding", rows, bars(rows)))
        return
    place = environment()  # with all cores: `disturb` keeps to one
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "rate":
            found = iter([measure_rate(Path(folder), arguments.trials, arguments.points)])
        else:
            found = disturb(Path(folder), arguments.rounds, arguments.steps)
        for row in found:
            append_row(arguments.rows, row | {"environment": place})


def bars(rows: Sequence[Row]) -> dict[str, Bar]:
    """Slowdowns by medians over the rounds, of which each has every regime once: by the clock, and
    by what the threads beside the training one take."""
    found: dict[str, Bar] = {}
    runs = [row for row in rows if row["what"] == "disturb"]

    medians = {
        regime: [
            statistics.median([row[column] for row in runs if row["regime"] == regime])
            for column in ("train_s", "beside_fraction")
        ]
        for regime in REGIMES
        if any(row["regime"] == regime for row in runs)
    }
    if "undisturbed" in medians:
        usual_s, usual_beside = medians.pop("undisturbed")
        for regime, (train_s, beside) in medians.items():
            name = f"slowdown by the clock, {regime}, at most"
            found[name] = Bar(round(train_s / usual_s - 1, 4), MAX_SLOWDOWN_FRACTION, at_most=True)
            name = f"slowdown by other threads, {regime}, at most"
            found[name] = Bar(round(beside - usual_beside, 4), MAX_SLOWDOWN_FRACTION, at_most=True)
        # What tracking itself costs, with the trainer's other threads.
        name = "processor time of all threads beside training, undisturbed, at most"
        found[name] = Bar(round(usual_beside, 4), MAX_SLOWDOWN_FRACTION, at_most=True)
    if runs:
        lost = sum(row["lost"] + row["doubled"] for row in runs)
        found["points lost or doubled after sync, at most"] = Bar(lost, 0, at_most=True)
    for row in rows:
        if row["what"] == "rate":
            name = f"{row['trials']} trials x {row['points']} points, times raw log_batch, at most"
            found[name] = Bar(round(row["ours_s"] / row["raw_s"], 2), MAX_RATIO_TO_RAW, True)
    return found


if __name__ == "__main__":
    main()

"""One training for each regime of the server: how long it took, and what the server ends up with.

Training time is read from the run folder: from the trial's start to the winner's selection, so
what a command does before and after (importing, giving up on a server that is gone) is not in it.
Equal runs differ by up to a tenth on a machine that others share, more than a server that is down
could cost. On a core of its own a trainer is slowed down by what other threads take of it, so the
processor time of all threads but the training one is measured too.
"""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import yaml

from benchmarks.children import free_port
from benchmarks.forwarding_check import expected_points, lost_and_doubled
from benchmarks.mlflow_server import (
    OTHER_CORES,
    SERVER_CORES,
    MlflowServer,
    empty_store,
    on_cores,
)
from benchmarks.recording import Row
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.stores import client
from orchestrator.tracking.tail import JsonLinesTail
from tests.tiny import make_base_model, question_rows

REGIMES = ("undisturbed", "down at the start", "down in the middle", "down at the end", "down")
"""undisturbed: the server is there all the time. down: never, until the sync afterwards."""
POLL_S = 0.05
SETTLED_FRACTION = 0.1
"""Of the steps, after which processor time is counted: libraries are loaded then."""


def disturb(folder: Path, rounds: int, steps: int) -> Iterator[Row]:
    """Rounds of all regimes in turn, so that what else the machine does hits all alike."""
    os.sched_setaffinity(0, SERVER_CORES)  # what watches is none of the trainer's affair
    base = make_base_model(folder / "base")
    _train(folder / "warm-up", base, steps // 10, "undisturbed")  # the first one fills caches
    for number in range(rounds):
        turn = number % len(REGIMES)
        for place, regime in enumerate(REGIMES[turn:] + REGIMES[:turn]):
            yield _train(folder / f"{number}-{place}", base, steps, regime) | {"round": number}


def _train(folder: Path, base: Path, steps: int, regime: str) -> Row:
    with MlflowServer(_store(folder), free_port()) as server:
        if regime not in ("down at the start", "down"):
            server.start()
            server.wait()
        run_dir = folder / "run"
        command = _start(folder, base, steps, server.address)
        trial = _Steps(run_dir, command, round(steps * SETTLED_FRACTION))
        _disturb(server, regime, trial, steps)
        trial.reach(steps)
        command.wait()
        if not server.running:
            server.start()
        server.wait()
        synced = _orchestrator("sync", str(run_dir), cwd=folder)
        assert synced.wait() == 0, "sync failed"
        store = RunStore.open(run_dir)
        api = client(server.address)
        lost, doubled = lost_and_doubled(store, api, store.read("tracking")["experiment_id"])
        row = {
            "what": "disturb",
            "regime": regime,
            "steps": steps,
            "train_s": round(_train_s(store), 3),
            "beside_fraction": round(trial.beside_fraction, 5),
            "exit_code": command.returncode,
            "points": sum(expected_points(store).values()),
            "lost": len(lost),
            "doubled": len(doubled),
        }
    shutil.rmtree(folder)
    return row


def _disturb(server: MlflowServer, regime: str, trial: "_Steps", steps: int) -> None:
    """Kill and start the server as the trial reaches a part of its steps."""
    match regime:
        case "down at the start":
            trial.reach(steps * 2 // 10)
            server.start()
        case "down in the middle":
            trial.reach(steps * 3 // 10)
            server.kill()
            trial.reach(steps * 6 // 10)
            server.start()
        case "down at the end":
            trial.reach(steps * 8 // 10)
            server.kill()
        case _:
            pass


def _start(folder: Path, base: Path, steps: int, address: str) -> subprocess.Popen[bytes]:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in question_rows(400)))
    content = {
        "name": "forwarding",
        "base_model": {"source": str(base)},
        "data": {"train": str(rows), "block_length": 128, "max_held_out_examples": 8},
        "trial": {"steps": steps, "batch_size": 4, "quant": {"compute_dtype": "float32"}},
        "evaluation": {"every_steps": 10},
        "tracking": {"uri": address},
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    return _orchestrator("train", str(path), "--run-dir", str(folder / "run"), cwd=folder)


def _orchestrator(*arguments: str, cwd: Path) -> subprocess.Popen[bytes]:
    program = "from jobs.cli import main; main()"
    return subprocess.Popen(
        [*on_cores(OTHER_CORES), sys.executable, "-c", program, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _train_s(store: RunStore) -> float:
    times = {decision["action"]: decision["time"] for decision in store.decisions}
    return float(times["select_winner"] - times["assign"])


class _Steps:
    """How far the trial of a run folder is, and what its process has taken for that."""

    def __init__(self, run_dir: Path, command: subprocess.Popen[bytes], settled: int) -> None:
        self._rows = JsonLinesTail(run_dir / "trials" / "000" / "progress.jsonl")
        self._command = command
        self._process = psutil.Process(command.pid)
        self._settled = settled
        self._seen: list[tuple[int, float, float]] = []
        """Steps, and processor seconds of all threads and of the training one, once settled."""

    @property
    def beside_fraction(self) -> float:
        """Processor time of the other threads, as a part of the training thread's."""
        if len(self._seen) < 2:  # it ended early
            return math.nan
        (_, first_s, first_own_s), (_, last_s, last_own_s) = self._seen[0], self._seen[-1]
        own_s = last_own_s - first_own_s
        return (last_s - first_s - own_s) / own_s

    def reach(self, step: int) -> None:
        """Wait until the trial is there, or its command is over."""
        while not self._seen or self._seen[-1][0] < step:
            if self._command.poll() is not None:
                return
            reached = max((row["step"] for row in self._rows.read()), default=0)
            if reached >= self._settled:
                with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
                    self._seen.append((reached, *self._processor_s()))
            time.sleep(POLL_S)

    def _processor_s(self) -> tuple[float, float]:
        """Of all threads, and of the training one."""
        seconds = {one.id: one.user_time + one.system_time for one in self._process.threads()}
        return sum(seconds.values()), seconds[self._process.pid]


def _store(folder: Path) -> str:
    return empty_store(folder / "mlflow", folder.parent / "template")

"""Trials whose process is killed at a random step and resumed, against the same trials left alone.

    python -m benchmarks.engine_resume run --rows FILE [--workers 2 --gpus 2]
    python -m benchmarks.engine_resume record --rows FILE ...

A kill is SIGKILL to the worker's process as soon as its trial has trained a step drawn at random;
a new process goes on from what is on disk. The adapters' digests must be equal. --together of these
trials run at the same time. With --workers 2 each trial is trained by two, each on a GPU of its own
or, with --gpus 1, on the same; one drawn at random is killed, and then its partner is ended, as a
sweep does it.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from orchestrator.wording import counted

# (strategy, optimizer, kills). Of 4-bit bases; the first in CUDA graphs where there is a GPU. With
# two workers each is killed PAIR_KILLS times.
CASES: tuple[tuple[Row, str, int], ...] = (
    ({}, "adamw", 3),
    ({}, "adamw_8bit", 2),
    ({}, "paged_adamw_8bit", 3),
    ({}, "paged_adamw_32bit", 2),
    ({"kind": "zero", "stage": 1}, "adamw", 2),
    ({"kind": "zero", "stage": 2}, "paged_adamw_8bit", 2),
    ({"kind": "zero", "stage": 2, "offload_optimizer": "cpu"}, "deepspeed_cpu_adam", 2),
    ({"kind": "zero", "stage": 3}, "adamw", 2),
    ({"kind": "zero", "stage": 3, "offload_optimizer": "cpu"}, "paged_adamw_32bit", 2),
)
PAIR_KILLS = 2
STEPS, CHECKPOINT_EVERY, TOKENS, RANK = 24, 5, 256, 16
POLL_S = 0.01


def main() -> None:
    options = _options()
    if options.action == "record":
        rows = read_rows(options.rows)
        print(record(options.name, rows, bars(rows)))
        return
    if options.action == "worker":
        _work(options)
        return
    children.end_on_sigterm()
    model = options.folder / options.shape
    children.call("benchmarks.models", options.shape, str(model))
    from benchmarks.blocks import prepare_blocks

    shards = prepare_blocks(options.folder / "resume", model, TOKENS)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.together) as pool:
        place = [f"--model={model}", f"--shards={shards}"]
        runs = []
        for number, (_, _, kills) in enumerate(CASES):
            for kill in range((kills if options.workers == 1 else PAIR_KILLS) + 1):
                step = draw.randrange(1, STEPS) if kill else None
                killed = draw.randrange(options.workers)
                words = [*place, f"--case={number}", f"--attempts={folder}/{number}-{kill}"]
                runs.append((number, step, pool.submit(_run, options, words, step, killed)))
        undisturbed: dict[int, Row] = {}
        for number, step, run in runs:
            if step is None:
                undisturbed[number] = run.result()
            else:
                row = _row(number, step, undisturbed[number], run.result())
                row |= {"workers": options.workers, "environment": environment()}
                append_row(options.rows[0], row)


def bars(rows: list[Row]) -> dict[str, Bar]:
    equal = Counter(
        row["workers"] for row in rows if row["digest"] == row["undisturbed_digest"] != ""
    )
    goals = {1: 20, 2: PAIR_KILLS * len(CASES)}
    return {
        f"trials of {counted(workers, 'worker')} killed and resumed that end with the same bytes": (
            Bar(equal[workers], goals[workers])
        )
        for workers in sorted({row["workers"] for row in rows})
    }


def _row(number: int, step: int, whole: Row, resumed: Row) -> Row:
    strategy, optimizer, _ = CASES[number]
    return {
        "strategy": strategy or {"kind": "replicated"},
        "optimizer": optimizer,
        "killed_after_step": step,
        "resumed_at_step": resumed.get("opened_at_step"),
        "program": resumed.get("program"),
        "undisturbed_digest": whole.get("digest", ""),
        "digest": resumed.get("digest", ""),
    }


def _run(options: argparse.Namespace, words: list[str], kill_after: int | None, killed: int) -> Row:
    """Of the last attempt: its digest and where it began. `killed`: the world_rank."""
    folder = Path(words[-1].removeprefix("--attempts="))
    folder.mkdir(parents=True)
    logs = [folder / f"log-{rank}" for rank in range(options.workers)]
    command = [sys.executable, "-m", "benchmarks.engine_resume", "worker", *words]
    command.append(f"--workers={options.workers}")
    ends = time.monotonic() + options.timeout
    for attempt in range(1, 3 if kill_after else 2):
        workers = children.start_ranks([*command, f"--attempt={attempt}"], options.gpus, logs)
        is_killed = False
        codes: list[int | None] = [None]
        while None in codes and not any(codes) and time.monotonic() < ends and not is_killed:
            time.sleep(POLL_S)
            codes = [worker.poll() for worker in workers]
            is_killed = attempt == 1 and kill_after is not None and _step(folder) >= kill_after
        for worker in (workers[killed], *workers):
            children.end(worker)
        if attempt == 1 and kill_after is not None and not is_killed:
            break  # it failed before
    result = folder / "result.json"
    if result.exists():
        return dict(json.loads(result.read_text()))
    for log in logs:
        print(log.read_text(errors="replace")[-1000:], flush=True)
    return {}


def _step(folder: Path) -> int:
    try:
        return int((folder / "step").read_text() or 0)
    except FileNotFoundError:
        return 0


def _work(options: argparse.Namespace) -> None:
    import torch

    from benchmarks import own
    from orchestrator.config import EvaluationConfig, TrialConfig
    from orchestrator.records import (
        Assign,
        Evaluated,
        GroupPlace,
        Leave,
        SlotTask,
        TrialDone,
        TrialOpened,
    )
    from orchestrator.training.pack import PackWorker

    strategy, optimizer, _ = CASES[options.case]
    trial = TrialConfig.model_validate(
        {
            "adapter": {"rank": RANK, "dropout": 0.1},
            "optimizer": {"name": optimizer, "learning_rate": 1e-3},
            "strategy": strategy,
            "steps": STEPS,
            "batch_size": 2,
            "micro_batch_size": 1,
        }
    )
    graph = torch.cuda.is_available() and not strategy
    pack = own.Pack(options.model, options.shards, 4, 1, "graph" if graph else "eager")
    worker = PackWorker(
        replace(
            own.pack_spec(pack),
            strategy=trial.strategy.model_dump(),
            dequantise_once=False,
            dropout=True,
            checkpoint_every_steps=CHECKPOINT_EVERY,
            evaluation=EvaluationConfig(every_steps=1),  # so that each step is told
            world_size=options.workers,
        ),
        GroupPlace(options.world_rank, options.workers, options.init_method),
    )
    worker.load()
    folder: Path = options.attempts
    attempt_dir = folder / str(options.attempt)
    attempt_dir.mkdir(exist_ok=True)
    found = sorted(folder.glob("*/checkpoint-*"), reverse=True)
    task = SlotTask(0, options.attempt, trial, str(attempt_dir), tuple(map(str, found)))
    events: list[Any] = worker.advance([Assign(task)])
    (opened,) = [event for event in events if isinstance(event, TrialOpened)]
    while not (done := [event for event in events if isinstance(event, TrialDone)]):
        for event in events:
            if isinstance(event, Evaluated) and options.world_rank == 0:
                (folder / "step").write_text(str(event.step))
        events = worker.advance([])
    worker.advance([Leave(save=False)])
    if options.world_rank > 0:
        return
    (folder / "result.json").write_text(
        json.dumps(
            {
                "digest": done[0].adapter_digest,
                "opened_at_step": opened.step,
                "program": worker.programs.kind,
            }
        )
    )


def _options() -> argparse.Namespace:
    parser, actions = parser_of_actions(__doc__)
    run = actions.add_parser("run")
    run.add_argument("--shape", default="small")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--together", type=int, default=8, help="trials")
    run.add_argument("--workers", type=int, choices=[1, 2], default=1, help="of a trial")
    run.add_argument("--gpus", type=int, choices=[1, 2], default=1, help="of two workers")
    run.add_argument("--timeout", type=float, default=200, help="seconds of a trial")
    run.add_argument("--folder", type=Path, default=Path("/tmp/packs"))
    run.add_argument("--rows", type=Path, nargs=1, required=True)
    work = actions.add_parser("worker")
    work.add_argument("--model", type=Path, required=True)
    work.add_argument("--shards", type=Path, required=True)
    work.add_argument("--case", type=int, required=True)
    work.add_argument("--attempt", type=int, required=True)
    work.add_argument("--attempts", type=Path, required=True, help="a folder")
    work.add_argument("--world-rank", type=int, required=True)
    work.add_argument("--workers", type=int, required=True)
    work.add_argument("--init-method", required=True)
    add_record_action(actions, "engine_resume")
    return parser.parse_args()


if __name__ == "__main__":
    main()

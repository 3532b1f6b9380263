"""Bits x ZeRO stage x offload x optimizer on two GPUs: each cell trained, saved, loaded by PEFT.

    python -m benchmarks.engine_zero_matrix run --rows FILE [--gpus 1]
    python -m benchmarks.engine_zero_matrix record --rows FILE

A cell's held-out losses, after 4 and 8 steps of two blocks, are held against those of the
same trial replicated on one GPU (deepspeed_cpu_adam against torch's AdamW); and the loss of the
adapter as plain transformers, bitsandbytes and PEFT load it against what its worker reported. Stage
0 is strategy.kind: replicated. Cells that the rules refuse are listed with the reason. A pair of
processes trains one cell after another; where a cell ends it, a new pair goes on with the next.
--pairs train at the same time, each some of the optimizers. With --gpus 1 both processes of a pair
are on one card.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import children
from benchmarks.recording import (
    Bar,
    Row,
    add_record_action,
    append_row,
    command,
    environment,
    parser_of_actions,
    read_rows,
    record,
)
from orchestrator.config import TrialConfig
from orchestrator.planning.compatibility import problems

BITS = (4, 8, 16)
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "deepspeed_cpu_adam")
STAGES = (0, 1, 2, 3)
OFFLOADS = {
    "none": {},
    "cpu": {"offload_optimizer": "cpu"},
    "cpu params": {"offload_optimizer": "cpu", "offload_params": "cpu"},
    "nvme": {"offload_optimizer": "nvme"},
    "nvme params": {"offload_optimizer": "nvme", "offload_params": "nvme"},
}
TOKENS, HELD_OUT_BLOCKS = 256, 4
# Of nats: sums in another order, in bf16 (packs_equality.json: 0.010 between two programs).
BOUND = 0.02


def main() -> None:
    options = _options()
    if options.action == "record":
        rows = read_rows(options.rows)
        for row in rows:
            row["strategy"].pop("nvme_path", None)  # says nothing on another machine
        print(record(options.name, rows, bars(rows)))
        return
    children.end_on_sigterm()
    model = options.folder / options.shape
    children.call("benchmarks.models", options.shape, str(model))
    from benchmarks.blocks import prepare_blocks

    shards = prepare_blocks(options.folder / "matrix", model, TOKENS, HELD_OUT_BLOCKS)
    place = {"model": str(model), "shards": str(shards), "nvme_path": str(options.nvme)}
    place |= {"gpus": options.gpus}
    known = read_rows(options.rows) if options.rows[0].exists() else []
    left = []
    for cell, why in cells(options.bits, options.optimizers, str(options.nvme)):
        if any(_same(cell, row) for row in known):
            continue
        if why:
            row = cell | {"state": "refused", "reason": why[0]}
            append_row(options.rows[0], row | {"environment": environment()})
        else:
            left.append(cell)
    shares = [
        [cell for cell in left if OPTIMIZERS.index(cell["optimizer"]) % options.pairs == number]
        for number in range(options.pairs)
    ]
    with ThreadPoolExecutor(options.pairs) as pool:
        list(pool.map(lambda share: _train(options, place, share), shares))
    shutil.rmtree(options.nvme, ignore_errors=True)  # which the pairs share


def cells(
    bits: Sequence[int], optimizers: Sequence[str], nvme_path: str
) -> Iterator[tuple[Row, list[str]]]:
    """All of the matrix, each with what the rules have against it."""
    for width, optimizer, stage, (name, offload) in itertools.product(
        bits, optimizers, STAGES, OFFLOADS.items()
    ):
        if stage == 0 and name != "none":
            continue
        strategy: Row = {"kind": "zero", "stage": stage, **offload} if stage else {}
        if "nvme" in name:
            strategy["nvme_path"] = nvme_path
        trial = TrialConfig.model_validate(
            {
                "quant": {"bit_width": width},
                "optimizer": {"name": optimizer},
                "strategy": strategy,
                "batch_size": 2,
                "micro_batch_size": 1,
            }
        )
        facts: Row = {"bit_width": width, "optimizer": optimizer, "stage": stage, "offload": name}
        yield facts | {"strategy": strategy}, problems(trial, 2)


def bars(rows: Sequence[Row]) -> dict[str, Bar]:
    trained = [row for row in rows if row["state"] == "trained"]
    wanted = sum(not why for _, why in cells(BITS, OPTIMIZERS, "nvme"))
    return {
        "cells trained, of those that the rules allow": Bar(len(trained), wanted),
        "nats from the reference, at most": Bar(
            max(row["largest_difference"] for row in trained), BOUND, at_most=True
        ),
        "nats from the reported loss as PEFT loads it, at most": Bar(
            max(row["peft_difference"] for row in trained), BOUND, at_most=True
        ),
    }


def _same(row: Row, other: Row) -> bool:
    return all(row[key] == other[key] for key in ("bit_width", "optimizer", "stage", "offload"))


def _train(options: argparse.Namespace, place: Row, left: Sequence[Row]) -> None:
    while left:
        with tempfile.TemporaryDirectory() as temporary:
            found, log = _pair(options, Path(temporary), place | {"cells": list(left)})
        left = left[len(found) :]
        if left and not log:
            print(f"out of time before {left[0]}", flush=True)
            return
        if left:
            lost = left[0] | {"state": "failed", "reason": log}
            append_row(options.rows[0], lost | {"environment": environment()})
            left = left[1:]


def _pair(options: argparse.Namespace, folder: Path, work: Row) -> tuple[list[Row], str]:
    """Rows of the cells that were trained; and where a cell ended the processes, how."""
    (folder / "work.json").write_text(json.dumps(work))
    rows = folder / "rows.jsonl"
    words = [sys.executable, "-m", "benchmarks.zero_cells", f"--rows={rows}"]
    words.append(f"--work={folder / 'work.json'}")
    told = 0

    def tell() -> None:
        nonlocal told
        told = _tell(options.rows[0], rows, told)

    codes, last = children.run_ranks(words, options.gpus, options.timeout, tell)
    how = f"exit codes {codes}: {last}" if any(codes) else ""
    return (read_rows([rows]) if rows.exists() else []), how


def _tell(to: Path, rows: Path, told: int) -> int:
    """Append what is new: a run that is cut off leaves what it measured."""
    found = read_rows([rows]) if rows.exists() else []
    for row in found[told:]:
        append_row(to, row | {"command": command()})
    return len(found)


def _options() -> argparse.Namespace:
    parser, actions = parser_of_actions(__doc__)
    run = actions.add_parser("run")
    run.add_argument("--shape", default="small")
    run.add_argument("--bits", type=int, nargs="+", default=list(BITS))
    run.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    run.add_argument("--pairs", type=int, default=2)
    run.add_argument("--gpus", type=int, choices=(1, 2), default=2, help="1: both ranks on one")
    run.add_argument("--timeout", type=float, default=500, help="seconds of a pair")
    run.add_argument("--folder", type=Path, default=Path("/tmp/packs"))
    run.add_argument("--nvme", type=Path, default=Path("/tmp/nvme"))
    run.add_argument("--rows", type=Path, nargs=1, required=True)
    add_record_action(actions, "engine_zero_matrix")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Tokens per second of K adapters in one pack, against what else one can do with a card.

    python -m benchmarks.packs run --rows FILE --shape 0.5b --bits 4 --tokens 1024 --slots 1 16
    python -m benchmarks.packs record --rows FILE --name packs_gpu

Every adapter has rank 16 on all linear layers and takes one block of `--tokens` a step. All sides
use the same optimizer, adamw being torch's fused one. Parts, each in processes of its own:

    matmul      the card's rate on a square bf16 product
    stock       PEFT + bitsandbytes with gradient checkpointing, one adapter at a time
    stock-plain the same without gradient checkpointing
    pack        this project's engine at each of --slots; at K=1 with each of --single-programs, of
                which the best is "own best single"
    shared      --processes processes on one card at once, each stock, and each a pack of one: what
                fractional GPUs give. Rates are added up over processes that start together, so the
                last one's time alone on the card counts for them.
    frozen      the frozen products alone at each of --slots (see benchmarks.frozen): what a pack
                would do if all else took no time

Parts are measured one after another. With --together N, N of them first load and compile at the
same time, as far as their memory allows; then all but the measured one wait.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import children
from benchmarks.pack_bars import bars, with_ratios
from benchmarks.recording import (
    Row,
    add_record_action,
    append_row,
    parser_of_actions,
    read_rows,
    record,
)

PARTS = ("matmul", "stock", "stock-plain", "pack", "shared", "frozen")
DEFAULT_PARTS = ("matmul", "stock", "pack", "shared")
OPTIMIZERS = ("adamw", "paged_adamw_8bit")


def main() -> None:
    options = _options()
    if options.action == "record":
        rows = read_rows(options.rows)
        print(record(options.name, with_ratios(rows), bars(rows)))
        return
    children.end_on_sigterm()
    model = options.folder / options.shape
    children.call("benchmarks.models", options.shape, str(model))
    if "matmul" in options.parts:
        for found in children.measure([children.Part(["matmul"])], options.timeout):
            for content in found:
                append_row(options.rows[0], {"who": "matmul"} | content)
    for tokens in options.tokens:
        data = str(options.folder / "data")
        shards = children.call("benchmarks.blocks", data, str(model), str(tokens))
        for bits in options.bits:
            place = [f"--model={model}", f"--shards={shards}"]
            facts = {"shape": options.shape, "bit_width": bits, "tokens_per_adapter": tokens}
            place += [f"--tokens={tokens}", f"--bits={bits}", f"--optimizer={options.optimizer}"]
            place += [f"--shape={options.shape}"]
            parts = list(_parts(options))
            for first in range(0, len(parts), options.together):
                chunk = parts[first : first + options.together]
                started = [children.Part([*words, *place], count) for _, words, count in chunk]
                measured = children.measure(started, options.timeout)
                for (row, _, _), found in zip(chunk, measured, strict=True):
                    _append(options, row | facts | {"optimizer": options.optimizer}, found)


def _parts(options: argparse.Namespace) -> Iterator[tuple[Row, list[str], int]]:
    """Each part's first columns, its arguments, and its number of processes."""
    stock = ["stock", f"--steps={options.stock_steps}"]
    if "stock" in options.parts:
        yield {"who": "stock", "adapters": 1}, stock, 1
    if "stock-plain" in options.parts:
        row = {"who": "stock, no checkpointing", "adapters": 1}
        yield row, [*stock, "--no-checkpointing"], 1
    if "pack" in options.parts:
        for slots in options.slots:
            for program in options.single_programs if slots == 1 else [options.program]:
                row = {"who": "pack", "adapters": slots, "program": program}
                yield row, _pack(slots, program, options.steps), 1
    if "shared" in options.parts:
        count = options.processes
        yield {"who": "stock, sharing the card", "adapters": count}, stock, count
        program = options.single_programs[0]
        row = {"who": "own singles, sharing the card", "adapters": count, "program": program}
        yield row, _pack(1, program, options.steps), count
    if "frozen" in options.parts:
        for slots in options.slots:
            words = ["frozen", f"--slots={slots}", f"--steps={options.steps}"]
            yield {"who": "frozen products alone", "adapters": slots}, words, 1


def _pack(slots: int, program: str, steps: int) -> list[str]:
    return ["pack", f"--slots={slots}", f"--program={program}", f"--steps={steps}"]


def _append(options: argparse.Namespace, row: Row, found: list[dict[str, Any]]) -> None:
    if not found:
        return
    if row["who"] in OWN:  # a graph that cannot be recorded becomes compiled blocks
        row["program"] = found[0]["program"]
    row["processes"] = len(found)
    row |= {name: round(max(part[name] for part in found), 3) for name in TIMES}
    row["peak_memory_bytes"] = sum(part["peak_memory_bytes"] for part in found)
    row["tokens_per_s"] = round(sum(part["tokens_per_s"] for part in found), 1)
    append_row(options.rows[0], row | {"environment": found[0]["environment"]})


OWN = ("pack", "own singles, sharing the card")
TIMES = ("train_s", "wall_s", "load_s", "warm_up_s")


def _options() -> argparse.Namespace:
    parser, actions = parser_of_actions(__doc__)
    run = actions.add_parser("run")
    run.add_argument("--shape", required=True)
    run.add_argument("--bits", type=int, nargs="+", default=[4])
    run.add_argument("--tokens", type=int, nargs="+", default=[1024])
    run.add_argument("--slots", type=int, nargs="+", default=[1, 16])
    run.add_argument("--parts", nargs="+", choices=PARTS, default=DEFAULT_PARTS)
    run.add_argument("--program", default="graph", help="of packs of several")
    run.add_argument("--single-programs", nargs="+", default=["graph", "compiled"])
    run.add_argument("--optimizer", choices=OPTIMIZERS, default=OPTIMIZERS[0])
    run.add_argument("--together", type=int, default=1, help="parts that load at the same time")
    run.add_argument("--steps", type=int, default=30)
    run.add_argument("--stock-steps", type=int, default=15)
    run.add_argument("--processes", type=int, default=4, help="that share the card")
    run.add_argument("--timeout", type=float, default=120, help="seconds to load, and to measure")
    run.add_argument("--folder", type=Path, default=Path("/tmp/packs"), help="models and shards")
    run.add_argument("--rows", type=Path, nargs=1, required=True)
    add_record_action(actions, "packs_gpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()

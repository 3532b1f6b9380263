"""Held-out loss curves of trials trained together, beside those of the same trials alone.

    python -m benchmarks.packs_equality run --rows FILE
    python -m benchmarks.packs_equality record --rows FILE

Trials of different rank, learning rate and seed, on an NF4 base with double quantisation, trained
three ways, each in a process of its own:

    pack         all in one pack, with --program
    alone        one after another in a pack of one slot, with --program
    alone_other  the same with --other-program

Another program adds in another order and, where it does not fuse operations, rounds in more places;
training carries that on. So the difference between the last two is the noise that the one between
the first two is held against: somewhat more than that of reordering alone. All sides pad to the
largest rank, and those alone take one slot in turn.
"""

import argparse
import multiprocessing
import tempfile
from dataclasses import replace
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
from orchestrator.records import StepProgram

Curve = list[tuple[int, float]]
"""Steps trained, held-out loss."""

# (rank, learning rate); the seeds are 0, 1, ...
TRIALS = [(4, 2e-4), (8, 1e-3), (16, 1e-4), (16, 5e-4)]
BITS = 4
HELD_OUT_BLOCKS = 8
# Of nats: smaller differences show nothing, even where both orders round alike.
LEAST_NOISE = 1e-3
AT_MOST = 3.0


def main() -> None:
    options = _options()
    if options.action == "record":
        rows = read_rows(options.rows)
        print(record(options.name, rows, bars(rows)))
        return
    children.end_on_sigterm()
    model = options.folder / options.shape
    children.call("benchmarks.models", options.shape, str(model))
    with tempfile.TemporaryDirectory() as temporary:
        for row in _compare(options, model, Path(temporary)):
            append_row(options.rows[0], row)


def _compare(options: argparse.Namespace, model: Path, folder: Path) -> list[Row]:
    """A row per trial. The sides run at the same time: their speed does not matter here."""
    sides = {
        "pack": (len(TRIALS), options.program),
        "alone": (1, options.program),
        "alone_other": (1, options.other_program),
    }
    with multiprocessing.get_context("spawn").Pool(len(sides), maxtasksperchild=1) as pool:
        place = (model, options.tokens, options.steps, options.every)
        results = [
            pool.apply_async(_curves, (folder / name, slots, program, *place))
            for name, (slots, program) in sides.items()
        ]
        measured = [result.get(options.timeout) for result in results]
    curves = {name: found[0] for name, found in zip(sides, measured, strict=True)}
    programs = {name: found[2] for name, found in zip(sides, measured, strict=True)}
    facts = {"shape": options.shape, "bit_width": BITS, "block_length": options.tokens}
    facts |= {"programs": programs}
    return [
        facts
        | {"trial": number, "rank": rank, "learning_rate": rate, "seed": number}
        | _columns({name: curves[name][number] for name in sides})
        | {"environment": measured[0][1]}
        for number, (rank, rate) in enumerate(TRIALS)
    ]


def _curves(
    folder: Path,
    slots: int,
    program: StepProgram | None,
    model: Path,
    tokens: int,
    steps: int,
    every: int,
) -> tuple[list[Curve], Row, str]:
    """Of each trial, so many at once; where it was measured, and the program that ran."""
    import torch

    from benchmarks import own
    from benchmarks.blocks import prepare_blocks
    from orchestrator.config import EvaluationConfig
    from orchestrator.records import Evaluated
    from orchestrator.training.pack import PackWorker

    shards = prepare_blocks(folder, model, tokens, HELD_OUT_BLOCKS)
    default: StepProgram = "graph" if torch.cuda.is_available() else "eager"
    pack = own.Pack(model, shards, BITS, slots, program or default)
    evaluation = EvaluationConfig(every_steps=every)
    worker = PackWorker(replace(own.pack_spec(pack), evaluation=evaluation))
    worker.load()
    configs = [
        own.trial_config(pack, steps, seed, rank, rate) for seed, (rank, rate) in enumerate(TRIALS)
    ]
    curves: list[Curve] = [[] for _ in TRIALS]
    for first in range(0, len(TRIALS), slots):
        for event in own.train(worker, configs[first : first + slots], folder):
            if isinstance(event, Evaluated):
                curves[event.trial].append((event.step, event.eval_loss))
    return curves, environment(), worker.programs.kind


def _columns(curves: dict[str, Curve]) -> Row:
    steps = [step for step, _ in curves["pack"]]
    losses = {name: [round(loss, 5) for _, loss in curve] for name, curve in curves.items()}
    return {
        "step": steps,
        **losses,
        "largest_difference": _largest(losses["pack"], losses["alone"]),
        "largest_noise": _largest(losses["alone"], losses["alone_other"]),
    }


def _largest(left: list[float], right: list[float]) -> float:
    return round(max(abs(one - other) for one, other in zip(left, right, strict=True)), 5)


def bars(rows: list[Row]) -> dict[str, Bar]:
    noise = max(row["largest_noise"] for row in rows)
    difference = max(row["largest_difference"] for row in rows)
    ratio = round(difference / max(noise, LEAST_NOISE), 2)
    return {"largest difference over noise, at most": Bar(ratio, AT_MOST, at_most=True)}


def _options() -> argparse.Namespace:
    parser, actions = parser_of_actions(__doc__)
    run = actions.add_parser("run")
    run.add_argument("--shape", default="0.5b")
    run.add_argument("--tokens", type=int, default=512, help="in a block")
    run.add_argument("--steps", type=int, default=60)
    run.add_argument("--every", type=int, default=10, help="steps between evaluations")
    run.add_argument("--program", help="default: graph on a GPU, else eager")
    run.add_argument("--other-program", default="eager")
    run.add_argument("--timeout", type=float, default=150, help="seconds for each side")
    run.add_argument("--folder", type=Path, default=Path("/tmp/packs"), help="models")
    run.add_argument("--rows", type=Path, nargs=1, required=True)
    add_record_action(actions, "packs_equality")
    return parser.parse_args()


if __name__ == "__main__":
    main()

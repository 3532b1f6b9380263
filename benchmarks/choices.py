"""What each of the planner's choices costs a pack: measured, and as the speed model has it.

    python -m benchmarks.choices run --rows FILE --shape 1.5b --slots 16 --tokens 512
    python -m benchmarks.choices record --rows FILE

One pack, recorded in graphs, with one thing changed at a time: activations computed again in half
of the layers and in all; 4-bit weights dequantised at every use; optimizers whose states are of 8
bits, and paged, where the memory holds them all.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import children
from benchmarks.memory_cases import Case, base_shape, load_of
from benchmarks.models import SHAPES
from benchmarks.own import RANK
from benchmarks.recording import (
    Bar,
    Row,
    add_record_action,
    append_row,
    parser_of_actions,
    read_rows,
    record,
)
from orchestrator.planning.gpus import GPUS, MEASURED
from orchestrator.planning.speed import tokens_per_s

# Of a step's time, on the GPU that the speed model was fitted to.
MAX_ERROR = 0.05


@dataclass(frozen=True)
class Variant:
    name: str
    optimizer: str = "adamw"
    dequantise_once: bool = True
    recomputation: bool = False
    kept_layers: int = 0


def variants(num_layers: int) -> list[Variant]:
    return [
        Variant("plain"),
        Variant(
            "recomputation in half of the layers", recomputation=True, kept_layers=num_layers // 2
        ),
        Variant("recomputation in all layers", recomputation=True),
        Variant("dequantised at every use", dequantise_once=False),
        Variant("adamw_8bit", "adamw_8bit"),
        Variant("paged_adamw_8bit", "paged_adamw_8bit"),
        Variant("paged_adamw_32bit", "paged_adamw_32bit"),
    ]


def main() -> None:
    options = _options()
    if options.action == "record":
        rows = with_ratios(read_rows(options.rows))
        print(record(options.name, rows, bars(rows)))
        return
    children.end_on_sigterm()
    model = options.folder / options.shape
    children.call("benchmarks.models", options.shape, str(model))
    data = str(options.folder / "data")
    shards = children.call("benchmarks.blocks", data, str(model), str(options.tokens))
    chosen = variants(SHAPES[options.shape].layers)
    for first in range(0, len(chosen), options.together):
        chunk = chosen[first : first + options.together]
        parts = [children.Part(_arguments(variant, options, model, shards)) for variant in chunk]
        for variant, found in zip(chunk, children.measure(parts, options.timeout), strict=True):
            for content in found:
                append_row(options.rows[0], _row(variant, options, content))


def _arguments(
    variant: Variant, options: argparse.Namespace, model: Path, shards: str
) -> list[str]:
    words = ["pack", f"--model={model}", f"--shards={shards}", f"--tokens={options.tokens}"]
    words += [f"--slots={options.slots}", "--bits=4", "--program=graph", f"--steps={options.steps}"]
    words += [f"--optimizer={variant.optimizer}", f"--kept-layers={variant.kept_layers}"]
    words += [] if variant.dequantise_once else ["--dequantise-each-use"]
    return [*words, "--recomputation"] if variant.recomputation else words


def _row(variant: Variant, options: argparse.Namespace, content: Row) -> Row:
    return {
        "choice": variant.name,
        "shape": options.shape,
        "bit_width": 4,
        "adapters": options.slots,
        "tokens_per_adapter": options.tokens,
        **{name: value for name, value in asdict(variant).items() if name != "name"},
        "program": content["program"],
        "tokens_per_s": round(content["tokens_per_s"], 1),
        "predicted_tokens_per_s": round(predicted(variant, options), 1),
        "peak_memory_bytes": content["peak_memory_bytes"],
        "environment": content["environment"],
    }


def predicted(variant: Variant, options: argparse.Namespace) -> float:
    case = Case(
        shape=options.shape,
        bit_width=4,
        dequantise_once=variant.dequantise_once,
        rank=RANK,
        slots=options.slots,
        micro_batch=1,
        tokens=options.tokens,
        recomputation=variant.recomputation,
        dropout=False,
        optimizer=variant.optimizer,
        program="graph",
        zero_stage=None,
        offload_optimizer="none",
        offload_params="none",
        kept_layers=variant.kept_layers,
    )
    load = load_of(case, "cuda")
    return tokens_per_s(base_shape(SHAPES[options.shape]), load, GPUS[MEASURED])


def with_ratios(rows: list[Row]) -> list[Row]:
    """How many times as long as the plain pack's a step takes, measured and predicted."""
    plain = next(row for row in rows if row["choice"] == "plain")
    return [
        row
        | {
            "times_as_long": round(plain["tokens_per_s"] / row["tokens_per_s"], 3),
            "predicted_times_as_long": round(
                plain["predicted_tokens_per_s"] / row["predicted_tokens_per_s"], 3
            ),
        }
        for row in rows
    ]


def bars(rows: list[Row]) -> dict[str, Bar]:
    """What the planner chooses by itself, and what the user does."""
    plain = next(row for row in rows if row["choice"] == "plain")
    others = [row for row in rows if row is not plain]
    return {
        f"largest error of a ratio predicted for {what}, at most": Bar(
            round(max(map(_error, chosen)), 3), MAX_ERROR, at_most=True
        )
        for what, chosen in (
            ("recomputation and residency", [r for r in others if _like(r, plain)]),
            ("an optimizer", [r for r in others if not _like(r, plain)]),
        )
    }


def _like(row: Row, plain: Row) -> bool:
    return bool(row["optimizer"] == plain["optimizer"])


def _error(row: Row) -> float:
    return float(abs(row["predicted_times_as_long"] / row["times_as_long"] - 1))


def _options() -> argparse.Namespace:
    parser, actions = parser_of_actions(__doc__)
    run = actions.add_parser("run")
    run.add_argument("--shape", default="1.5b")
    run.add_argument("--slots", type=int, default=16)
    run.add_argument("--tokens", type=int, default=512)
    run.add_argument("--together", type=int, default=1, help="variants that load at the same time")
    run.add_argument("--steps", type=int, default=30)
    run.add_argument("--timeout", type=float, default=120, help="seconds to load, and to measure")
    run.add_argument("--folder", type=Path, default=Path("/tmp/packs"), help="models and shards")
    run.add_argument("--rows", type=Path, nargs=1, required=True)
    add_record_action(actions, "choices")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Small sweeps on two kinds of GPUs in simulated time: what choosing how far slower ones go gains.

    python -m benchmarks.small_sweeps run --rows FILE
    python -m benchmarks.small_sweeps record --rows FILE

Each is drawn at random: two kinds, one to four of each, 3 to 40 trials of a small base at one or
two bit-widths, of equal or different lengths, in slots that are set or chosen. The rule alone
(planning/kinds.py's `longest_for`) against the forecast's choice (sweep/reach.py), by the expected
durations, to which real ones come within some percent.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.memory_cases import base_shape
from benchmarks.models import SHAPES
from benchmarks.planner_simulation import draw_trials, kinds_of
from benchmarks.recording import (
    Row,
    add_record_action,
    append_row,
    light_environment,
    parser_of_actions,
    read_rows,
    record,
)
from orchestrator.config import SweepConfig
from orchestrator.planning.durations import Durations
from orchestrator.planning.gpus import GPUS
from orchestrator.sweep.flow import sweep_premises
from orchestrator.sweep.forecast import forecast
from orchestrator.sweep.reach import best_reach

NAMES = ("H200", "H100", "A100-80G", "L40S", "A10G", "L4")
BASES = ("0.5b", "1.5b")


def main() -> None:
    options = _options()
    if options.action == "record":
        rows = read_rows(options.rows)
        print(record(options.name, rows, bars={}, summary=summary(rows)))
        return
    for seed in range(options.sweeps):
        append_row(options.rows[0], simulated(seed) | {"environment": light_environment()})


def simulated(seed: int) -> Row:
    """The rule alone may be chosen, so it is never ahead by these durations."""
    drawn = random.Random(seed)
    names = sorted(drawn.sample(NAMES, 2), key=lambda name: -GPUS[name].tflops)
    kinds = kinds_of({name: drawn.randint(1, 4) for name in names})
    base, slots = drawn.choice(BASES), drawn.choice((None, 1, 2, 4))
    config = _config(base, slots)
    widths, steps = drawn.choice(((4,), (4, 16))), drawn.choice(((300, 300), (100, 500)))
    trials = draw_trials(config, drawn.randint(3, 40), drawn, widths, steps)
    shape = base_shape(SHAPES[base])
    least = min(kind.memory_bytes for kind in kinds)
    premises = sweep_premises(config, "cuda", "bfloat16", shape, least)
    durations = Durations(premises, shape, {name: GPUS[name] for name in names})
    rule = forecast(trials, kinds, premises, durations.block_s, durations.start_s)
    started = time.perf_counter()
    chosen = best_reach(trials, kinds, premises, durations)
    return {
        "seed": seed,
        "gpus": ", ".join(f"{kind.count}x{kind.name}" for kind in kinds),
        "base": base,
        "trials": len(trials),
        "slots": slots,
        "reach": chosen.premises.reach,
        "rule_s": round(rule.makespan_s, 1),
        "chosen_s": round(chosen.forecast.makespan_s, 1),
        "choice_s": round(time.perf_counter() - started, 2),
    }


def summary(rows: Sequence[Row]) -> Row:
    gains = sorted(row["rule_s"] / row["chosen_s"] for row in rows)
    return {
        "makespan by the rule over the chosen one": {
            "mean": round(statistics.fmean(gains), 3),
            "median": round(statistics.median(gains), 3),
            "90th percentile": round(gains[int(0.9 * len(gains))], 3),
            "most": round(gains[-1], 3),
        },
        "seconds of a choice, at most": max(row["choice_s"] for row in rows),
    }


def _config(base: str, slots: int | None) -> SweepConfig:
    return SweepConfig.model_validate(
        {
            "name": "small",
            "base_model": {"source": base},
            "data": {"train": "none", "block_length": 1024},
            "resources": {"slots_per_pack": slots},
            "search": {"space": {}},
        }
    )


def _options() -> argparse.Namespace:
    parser, actions = parser_of_actions(__doc__)
    run = actions.add_parser("run")
    run.add_argument("--sweeps", type=int, default=300)
    run.add_argument("--rows", type=Path, nargs=1, required=True)
    add_record_action(actions, "small_sweeps")
    return parser.parse_args()


if __name__ == "__main__":
    main()

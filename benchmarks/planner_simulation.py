"""The real policy and planner over a simulated cluster: what a decision takes, and how well it is
scheduled.

    python -m benchmarks.planner_simulation run --rows FILE
    python -m benchmarks.planner_simulation record --rows FILE

Half of the GPUs are H100, half A100 with 80 GB, in nodes of eight, of which some are lost for ten
minutes with whatever they train. Trials of an 8B base at 4 and 16 bits have batches of 2, 4 or 8
blocks of 1,024 tokens, and step counts drawn from a range of one to five. How long a pass is
expected to take is planning/speed.py's; here it takes longer, by OFF, which the sweep has to learn
from its packs (planning/measured.py). Time is simulated by orchestrator/sweep/forecast.py, which
asks orchestrator/sweep/policy.py at each report and takes the time of that and of the learning. A
real sweep learns at few of its reports, this one at every one.

The lower bound: all work at the rate of the best pack on each kind, on all GPUs that are there,
from when a base can first be loaded to the last second, and no load after the first.
"""

import argparse
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.memory_cases import base_shape
from benchmarks.models import SHAPES
from benchmarks.recording import (
    Bar,
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
from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.measured import Factors, Measurement
from orchestrator.planning.packs import PackPlan
from orchestrator.records import TrialSpec
from orchestrator.sweep.flow import sweep_premises
from orchestrator.sweep.forecast import Forecast, Learn, Loss, forecast

SHAPE = "8b"
KINDS = ("H100", "A100-80G")
BIT_WIDTHS = (4, 16)
BATCHES = (2, 4, 8)
STEPS = (200, 1000)
OFF = {"H100": 1.1, "A100-80G": 1.4}
NODE_GPUS = 8
LOST_NODES_FRACTION = 0.1
BACK_AFTER_S = 600.0
CHECKPOINT_EVERY_S = 300.0
SIZES = (10, 100, 1_000, 10_000)
TRIALS_PER_GPU = 10
GOALS = {"decision_ms": 2.0, "slot_utilisation": 0.95, "over_bound": 1.05}


def main() -> None:
    options = _options()
    if options.action == "record":
        rows = read_rows(options.rows)
        print(record(options.name, rows, bars(rows)))
        return
    for num_trials in options.trials:
        row = simulated(num_trials, max(2, num_trials // TRIALS_PER_GPU), options.seed)
        append_row(options.rows[0], row | {"environment": light_environment()})


def simulated(num_trials: int, num_gpus: int, seed: int) -> Row:
    config = _config()
    kinds = kinds_of(dict(zip(KINDS, (num_gpus - num_gpus // 2, num_gpus // 2), strict=True)))
    shape = base_shape(SHAPES[SHAPE])
    least = min(kind.memory_bytes for kind in kinds)
    premises = sweep_premises(config, "cuda", "bfloat16", shape, least)
    gpus = {name: GPUS[name] for name in KINDS}
    expected = Durations(premises, shape, gpus)
    durations = Durations(premises, shape, gpus, lambda gpu, base: OFF[gpu])
    trials = draw_trials(config, num_trials, random.Random(seed))
    undisturbed = forecast(trials, kinds, premises, durations.block_s, durations.start_s)
    losses = _losses(kinds, undisturbed.makespan_s, seed)
    started = time.perf_counter()
    found = forecast(
        trials,
        kinds,
        premises,
        durations.block_s,
        durations.start_s,
        losses,
        CHECKPOINT_EVERY_S,
        learning(kinds, expected),
    )
    took_s = time.perf_counter() - started
    finished = {span.trial for span in found.spans if span.finished}
    assert len(finished) == num_trials, "a trial was lost for good"
    load_s = min(pack.ready_s - pack.start_s for pack in found.packs)
    bound_s = load_s + _bound_s(trials, found, durations, kinds, losses)
    first, *reports = found.decisions_s
    slots_s = sum(max(0.0, pack.end_s - pack.ready_s) * pack.plan.num_slots for pack in found.packs)
    return {
        "trials": num_trials,
        "gpus": num_gpus,
        "lost_gpus": sum(loss.num_workers for loss in losses),
        "attempts": len(found.spans),
        "reports": len(reports),
        "first_decision_ms": _ms(first),
        "decision_ms_mean": _ms(statistics.fmean(reports)),
        "decision_ms_p99": _ms(statistics.quantiles(reports, n=100, method="inclusive")[98]),
        "decision_ms_most": _ms(max(reports)),
        "slot_utilisation": round(sum(pack.occupied_s for pack in found.packs) / slots_s, 4),
        "makespan_h": round(found.makespan_s / 3600, 3),
        "bound_h": round(bound_s / 3600, 3),
        "over_bound": round(found.makespan_s / bound_s, 4),
        "simulation_s": round(took_s, 1),
    }


def learning(kinds: Sequence[WorkerKind], expected: Durations) -> Learn:
    factors = Factors()
    sums: dict[int, Measurement] = {}
    known = tuple(kinds)

    def learn(
        pack: int, plan: PackPlan, occupied: int, blocks: float, seconds: float
    ) -> Sequence[WorkerKind]:
        nonlocal known
        before = sums.get(pack, Measurement(0, 0.0, 0.0))
        sums[pack] = Measurement(
            before.tokens + round(occupied * blocks * expected.premises.block_length),
            before.expected_s + blocks * expected.block_s(plan, occupied),
            before.measured_s + seconds,
        )
        if factors.add(pack, expected.gpus[plan.kind.name].name, plan.base, sums[pack]):
            known = factors.speeds(kinds, expected.gpus)
        return known

    return learn


def bars(rows: Sequence[Row]) -> dict[str, Bar]:
    most = max(rows, key=lambda row: row["trials"])
    size = f"{most['trials']:,} trials on {most['gpus']:,} GPUs"
    return {
        f"{size}: ms a report, 99th percentile, at most": Bar(
            most["decision_ms_p99"], GOALS["decision_ms"], at_most=True
        ),
        f"{size}: slots in use": Bar(most["slot_utilisation"], GOALS["slot_utilisation"]),
        f"{size}: makespan over its lower bound, at most": Bar(
            most["over_bound"], GOALS["over_bound"], at_most=True
        ),
    }


def draw_trials(
    config: SweepConfig,
    count: int,
    drawn: random.Random,
    bit_widths: Sequence[int] = BIT_WIDTHS,
    steps: tuple[int, int] = STEPS,
) -> list[TrialSpec]:
    quants = {
        bits: config.trial.quant.model_copy(update={"bit_width": bits}) for bits in bit_widths
    }
    return [
        TrialSpec(
            number,
            {},
            config.trial.model_copy(
                update={
                    "quant": quants[drawn.choice(bit_widths)],
                    "batch_size": drawn.choice(BATCHES),
                    "steps": drawn.randint(*steps),
                }
            ),
        )
        for number in range(count)
    ]


def kinds_of(counts: Mapping[str, int]) -> tuple[WorkerKind, ...]:
    """Of GPUs by name, the fastest first, as fast as their products."""
    fastest = max(GPUS[name].tflops for name in counts)
    return tuple(
        WorkerKind(name, count, GPUS[name].memory_bytes, GPUS[name].tflops / fastest)
        for name, count in counts.items()
    )


def _config() -> SweepConfig:
    return SweepConfig.model_validate(
        {
            "name": "simulation",
            "base_model": {"source": SHAPE},
            "data": {"train": "none", "block_length": 1024},
            "search": {"space": {"quant.bit_width": list(BIT_WIDTHS)}},
        }
    )


def _losses(kinds: Sequence[WorkerKind], makespan_s: float, seed: int) -> list[Loss]:
    """At any time of the first nine tenths of an undisturbed sweep."""
    drawn = random.Random(seed)
    losses = []
    for kind in kinds:
        for _ in range(round(kind.count / NODE_GPUS * LOST_NODES_FRACTION)):
            at_s = drawn.uniform(0, 0.9 * makespan_s)
            losses.append(Loss(at_s, kind.name, NODE_GPUS, at_s + BACK_AFTER_S))
    return losses


def _bound_s(
    trials: Sequence[TrialSpec],
    found: Forecast,
    durations: Durations,
    kinds: Sequence[WorkerKind],
    losses: Sequence[Loss],
) -> float:
    from orchestrator.planning.waiting import pack_key, work

    # Seconds of one worker for a block, at the best of all numbers of slots, by key and kind.
    best: dict[tuple[object, str], float] = {}
    for pack in found.packs:
        plan = pack.plan
        for occupied in range(1, plan.num_slots + 1):
            block_s = durations.block_s(plan, occupied) / occupied * plan.world_size
            place = (plan.key, plan.kind.name)
            best[place] = min(best.get(place, block_s), block_s)
    fast, slow = kinds[0].name, kinds[1].name
    keys = {pack_key(trial.config) for trial in trials}
    for key in keys:  # a kind that never had one of these packs: as the other, by its rate
        ratio = kinds[1].speed
        best.setdefault((key, fast), best.get((key, slow), 0.0) * ratio)
        best.setdefault((key, slow), best[key, fast] / ratio)
    work_s = sum(work(trial.config) * best[pack_key(trial.config), fast] for trial in trials)
    # The most that a slow worker does of a fast one's second.
    part = max(best[key, fast] / best[key, slow] for key in keys)
    rates = {fast: 1.0, slow: part}
    total = sum(kind.count * rates[kind.name] for kind in kinds)
    bound_s = work_s / total
    for _ in range(20):  # what was not there has to be made up for
        lost = sum(
            loss.num_workers
            * rates[loss.kind]
            * max(0.0, min(loss.back_s, bound_s) - min(loss.at_s, bound_s))
            for loss in losses
        )
        bound_s = (work_s + lost) / total
    return bound_s


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _options() -> argparse.Namespace:
    parser, actions = parser_of_actions(__doc__)
    run = actions.add_parser("run")
    run.add_argument("--trials", type=int, nargs="+", default=SIZES, help="ten for each GPU")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--rows", type=Path, nargs=1, required=True)
    add_record_action(actions, "planner_simulation")
    return parser.parse_args()


if __name__ == "__main__":
    main()

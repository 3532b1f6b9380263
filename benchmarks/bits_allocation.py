"""Bits given layer by layer against as many given at random, by the loss after fine-tuning.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python -m benchmarks.bits_allocation --folder DIR

SmolLM2-135M on the quickstart's data, one adapter on each base: 4 bits everywhere, 16 bits
everywhere, 4/8/16 as `bit_width: auto` chooses them under an average, and random choices that take
as much: layers in a random order get 8 bits as long as auto's own average allows. All train the
same blocks in the same order from the same first weights. A run that is cut off goes on where it
was when it is called again with the same folder.
"""

import argparse
import multiprocessing
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.recording import Bar, Row, append_row, environment, read_rows, record
from orchestrator.config import BaseModelConfig, EvaluationConfig, QuantConfig, TrialConfig
from orchestrator.data.prepare import PreparedData, find_prepared, prepare
from orchestrator.files import cache_dir, read_json, write_json
from orchestrator.loading import load_config
from orchestrator.planning.allocation import LayerLoss, allocate, resolved, total_increase
from orchestrator.planning.bits import bits_of, stored_bits
from orchestrator.planning.patterns import as_pattern
from orchestrator.records import (
    Assign,
    BaseModel,
    Device,
    PackSpec,
    SlotTask,
    TrialDone,
)

CONFIG = Path(__file__).parents[1] / "jobs" / "configs" / "quickstart.yaml"
NUM_RANDOM = 5
AUTO, FOUR, SIXTEEN = "auto", "4 bits", "16 bits"
NEVER = 1_000_000


@dataclass(frozen=True)
class Task:
    name: str
    quant: QuantConfig
    average_bits: float
    expected_increase: float
    """Of the loss against 16 bits, as the sensitivities say."""


@dataclass(frozen=True)
class Setting:
    base: BaseModel
    data_place: str
    steps: int
    seed: int
    device: Device
    compute_dtype: str


def main() -> None:
    options = _options()
    rows_file = options.folder / "rows.jsonl"
    setting = _setting(options)
    layers = _sensitivities(options.folder, setting)
    tasks = _tasks(layers, options.average_bits, setting.compute_dtype)
    done = {row["name"] for row in _rows(rows_file)}
    waiting = [(task, setting) for task in tasks if task.name not in done]
    # Spawned: what one run leaves behind must not weigh on the next.
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        for row in pool.imap_unordered(_train, waiting):
            append_row(rows_file, row)
    order = [task.name for task in tasks]
    rows = sorted(_rows(rows_file), key=lambda row: order.index(row["name"]))
    print(record("bits_allocation", rows, bars(rows, options.average_bits)))


def bars(rows: list[Row], average_bits: float) -> dict[str, Bar]:
    losses = {row["name"]: row["eval_loss"] for row in rows}
    drawn = [loss for name, loss in losses.items() if name.startswith("random")]
    auto, four, sixteen = losses[AUTO], losses[FOUR], losses[SIXTEEN]
    mean = sum(drawn) / len(drawn)
    taken = next(row["average_bits"] for row in rows if row["name"] == AUTO)
    return {
        "average bits of auto, at most": Bar(taken, average_bits, at_most=True),
        "eval loss of 4 bits everywhere less auto's": Bar(round(four - auto, 5), 0.0),
        f"mean eval loss of {len(drawn)} random choices less auto's": Bar(
            round(mean - auto, 5), 0.0
        ),
        "random choices that auto is better than": Bar(
            sum(loss > auto for loss in drawn), len(drawn) / 2
        ),
        "part of the gap from 4 to 16 bits that auto closes": Bar(
            round((four - auto) / (four - sixteen), 3), 0.0
        ),
        "part of the gap that the random choices close on average": Bar(
            round((four - mean) / (four - sixteen), 3), 0.0
        ),
    }


def _setting(options: argparse.Namespace) -> Setting:
    import torch

    from orchestrator.sweep.flow import auto_compute_dtype
    from orchestrator.training.model_source import resolve_base_model

    config = load_config(CONFIG, [f"data.max_held_out_examples={options.held_out}"])
    base = resolve_base_model(BaseModelConfig(source=options.model or config.base_model.source))
    data = _data(config, base, options.folder)
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    return Setting(
        base, data.place, options.steps, options.seed, device, auto_compute_dtype(device)
    )


def _data(config: Any, base: BaseModel, folder: Path) -> PreparedData:
    place = folder / "data.json"
    if place.exists() and (found := find_prepared(read_json(place)["place"])):
        return found
    data = prepare(config.data, Path(base.folder), cache_dir())
    write_json(place, data.to_json())
    return data


def _sensitivities(folder: Path, setting: Setting) -> list[LayerLoss]:
    path = folder / "sensitivities.json"
    if not path.exists():
        from orchestrator.training.sensitivity import measure_sensitivity

        quant = QuantConfig(compute_dtype=setting.compute_dtype)  # type: ignore[arg-type]
        layers = measure_sensitivity(setting.base, quant, setting.device, setting.data_place)
        write_json(path, [layer.to_json() for layer in layers])
    return [LayerLoss.from_json(record) for record in read_json(path)]


def _tasks(layers: list[LayerLoss], average_bits: float, compute_dtype: str) -> list[Task]:
    common = {"compute_dtype": compute_dtype}
    asked = QuantConfig.model_validate(
        {"bit_width": "auto", "average_bits": average_bits, **common}
    )
    allocation = allocate(asked, layers, plain_bytes=0, dtype_bytes=2)
    auto = resolved(asked, allocation)
    tasks = [
        _task(name, layers, QuantConfig.model_validate({"bit_width": bits, **common}))
        for name, bits in ((FOUR, 4), (SIXTEEN, 16))
    ]
    tasks.append(_task(AUTO, layers, auto))
    for seed in range(NUM_RANDOM):
        widths = _drawn(layers, asked, allocation.average_bits, seed)
        pattern = QuantConfig.model_validate({"bit_width_pattern": as_pattern(widths), **common})
        tasks.append(_task(f"random {seed}", layers, pattern))
    return tasks


def _drawn(
    layers: list[LayerLoss], quant: QuantConfig, average_bits: float, seed: int
) -> dict[str, int]:
    """Layers in a random order get 8 bits as long as the average allows."""
    widths = dict.fromkeys((layer.name for layer in layers), 4)
    four, eight = (stored_bits(quant, bits) for bits in (4, 8))
    room = (average_bits - four) * sum(layer.num_params for layer in layers)
    for layer in random.Random(seed).sample(layers, len(layers)):
        cost = (eight - four) * layer.num_params
        if cost <= room:
            widths[layer.name] = 8
            room -= cost
    return widths


def _task(name: str, layers: list[LayerLoss], quant: QuantConfig) -> Task:
    widths = {layer.name: bits_of(quant, layer.name) or 0 for layer in layers}
    taken = sum(layer.num_params * stored_bits(quant, widths[layer.name]) for layer in layers)
    average = taken / sum(layer.num_params for layer in layers)
    return Task(name, quant, round(average, 4), round(total_increase(layers, widths), 6))


def _train(job: tuple[Task, Setting]) -> Row:
    task, setting = job
    from orchestrator.training.pack import PackWorker

    trial = _trial(task.quant, setting)
    worker = PackWorker(_spec(task.quant, trial, setting))
    worker.load()
    with tempfile.TemporaryDirectory() as folder:
        events = worker.advance([Assign(SlotTask(0, 1, trial, folder))])
        while worker.slots:
            events += worker.advance([])
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    return {
        "name": task.name,
        "average_bits": task.average_bits,
        "layers": _counts(task.quant),
        "expected_increase": task.expected_increase,
        "baseline_eval_loss": round(done.baseline_eval_loss, 5),
        "eval_loss": round(done.eval_loss, 5),
        "train_loss": round(done.train_loss, 5),
        "steps": done.steps,
        "tokens": done.tokens,
        "seed": setting.seed,
        "train_s": round(done.train_s, 1),
        "environment": environment(),
    }


def _counts(quant: QuantConfig) -> dict[str, int]:
    """Keys of the map by bits, alternatives counted: layers where the map names all."""
    counts: dict[str, int] = {}
    for key, bits in quant.bit_width_pattern.items():
        counts[str(bits)] = counts.get(str(bits), 0) + 1 + key.count("|")
    return counts


def _trial(quant: QuantConfig, setting: Setting) -> TrialConfig:
    trial = load_config(CONFIG).trial.model_dump()
    changes = {"quant": quant.model_dump(), "steps": setting.steps, "batch_size": 4}
    return TrialConfig.model_validate(trial | changes | {"seed": setting.seed})


def _spec(quant: QuantConfig, trial: TrialConfig, setting: Setting) -> PackSpec:
    return PackSpec(
        pack=0,
        base_model=setting.base,
        data_place=setting.data_place,
        template="chat",
        quant=quant.model_dump(),
        target_modules="all-linear",
        num_slots=1,
        max_rank=trial.adapter.rank,
        micro_batch_size=trial.batch_size,
        gradient_checkpointing=False,
        strategy=trial.strategy.model_dump(),
        device=setting.device,
        cpus=1,
        evaluation=EvaluationConfig(),
        checkpoint_every_steps=NEVER,
        # The same numbers, sooner; and no run pays for its codes in time.
        dequantise_once=quant.packed,
    )


def _rows(path: Path) -> list[Row]:
    return read_rows([path]) if path.exists() else []


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", help="as base_model.source has it; the quickstart's by default")
    parser.add_argument("--average-bits", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()

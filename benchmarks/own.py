"""Tokens per second of this project's engine, through PackWorker as a sweep drives it."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import torch

from orchestrator.config import EvaluationConfig, StrategyConfig, TrialConfig
from orchestrator.records import (
    Assign,
    BaseModel,
    Device,
    Event,
    PackSpec,
    SlotTask,
    StepProgram,
    TrialDone,
    TrialStopped,
)
from orchestrator.sweep.flow import auto_compute_dtype
from orchestrator.training.pack import PackWorker

RANK, ALPHA = 16, 32
WARM_UP_STEPS = 3
NEVER = 1_000_000


@dataclass(frozen=True)
class Measurement:
    tokens_per_s: float
    """Of all adapters together."""
    train_s: float
    wall_s: float
    """train_s with the evaluation and the saving of each adapter."""
    load_s: float
    warm_up_s: float
    """Compiling and recording are in it."""
    peak_memory_bytes: int
    """As torch counts tensors: no context, and not what a graph's pool keeps for later."""
    program: str = ""
    """The one that ran, of this project's engine."""


@dataclass(frozen=True)
class Pack:
    model: Path
    shards: Path
    """Folder of the manifests."""
    bit_width: int
    num_slots: int
    program: StepProgram
    optimizer: str = "adamw"
    dequantise_once: bool = True
    """If it is of 4 bits."""
    recomputation: bool = False
    kept_layers: int = 0


def measure(pack: Pack, trials: int, steps: int, ready: Callable[[], None]) -> Measurement:
    """Train so many trials, as many at once as there are slots, each step on one block.

    `ready` is called between the warm-up and the measurement.
    """
    worker = PackWorker(pack_spec(pack))
    load_s = worker.load().load_s
    numbers = count()
    with tempfile.TemporaryDirectory() as folder:

        def group(size: int, steps: int) -> list[TrialDone]:
            configs = [trial_config(pack, steps, seed) for seed in islice(numbers, size)]
            events = train(worker, configs, Path(folder))
            return [event for event in events if isinstance(event, TrialDone)]

        started = time.monotonic()
        group(pack.num_slots, WARM_UP_STEPS)
        warm_up_s = time.monotonic() - started
        ready()
        started = time.monotonic()
        sizes = [min(pack.num_slots, trials - n) for n in range(0, trials, pack.num_slots)]
        groups = [group(size, steps) for size in sizes]
        wall_s = time.monotonic() - started
    done = [trial for group_of_trials in groups for trial in group_of_trials]
    train_s = sum(max(trial.train_s for trial in part) for part in groups)
    return Measurement(
        sum(trial.tokens for trial in done) / train_s,
        train_s,
        wall_s,
        load_s,
        warm_up_s,
        worker.memory.tensor_bytes,
        worker.programs.kind,
    )


def pack_spec(pack: Pack) -> PackSpec:
    device = _device()
    return PackSpec(
        pack=0,
        base_model=BaseModel(str(pack.model), None, str(pack.model), "benchmark"),
        data_place=str(pack.shards),
        template="plain",
        quant=trial_config(pack, 1, 0).quant.model_dump()
        | {"compute_dtype": auto_compute_dtype(device)},
        target_modules="all-linear",
        num_slots=pack.num_slots,
        max_rank=RANK,
        micro_batch_size=1,
        gradient_checkpointing=pack.recomputation,
        kept_layers=pack.kept_layers,
        strategy=StrategyConfig().model_dump(),
        device=device,
        cpus=1,
        evaluation=EvaluationConfig(),
        checkpoint_every_steps=NEVER,
        dequantise_once=pack.bit_width == 4 and pack.dequantise_once,
        step_program=pack.program,
    )


def trial_config(
    pack: Pack, steps: int, seed: int, rank: int = RANK, learning_rate: float = 1e-4
) -> TrialConfig:
    return TrialConfig.model_validate(
        {
            "quant": {"bit_width": pack.bit_width},
            "adapter": {"rank": rank, "alpha": ALPHA},
            "optimizer": {"name": pack.optimizer, "learning_rate": learning_rate},
            "steps": steps,
            "batch_size": 1,
            "micro_batch_size": 1,
            "gradient_checkpointing": False,
            "seed": seed,
        }
    )


def train(worker: PackWorker, trials: Sequence[TrialConfig], folder: Path) -> list[Event]:
    """All of them at once, each numbered by its seed."""
    tasks = []
    for trial in trials:
        attempt_dir = folder / str(trial.seed)
        attempt_dir.mkdir()
        tasks.append(SlotTask(trial.seed, 1, trial, str(attempt_dir)))
    events = worker.advance([Assign(task) for task in tasks])
    while worker.slots:
        events += worker.advance([])
    for event in events:
        if isinstance(event, TrialStopped):
            raise SystemExit(f"trial {event.trial} stopped: {event.reason}: {event.message}")
    return events


def _device() -> Device:
    return "cuda" if torch.cuda.is_available() else "cpu"

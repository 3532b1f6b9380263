"""The whole flow of one sweep, from a locked run folder to a registered champion.

config -> base model -> shards -> trials -> packs -> results -> winner -> registry -> report. Every
step leaves a record in the run folder and is passed over when its record is there, so that a
resumed sweep runs the same function. What differs between Ray and one process comes in as Services.
"""

import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from orchestrator.config import SweepConfig
from orchestrator.data.manifest import fetch_manifest
from orchestrator.data.prepare import PreparedData, RunTasks, find_prepared, prepare
from orchestrator.data.questions import held_out_questions
from orchestrator.data.reader import BlockReader
from orchestrator.data.tokenizing import load_tokenizer
from orchestrator.errors import ConfigError, TrialFailed
from orchestrator.files import cache_dir
from orchestrator.planning.capacity import check_pack_fits, check_step_program
from orchestrator.planning.durations import Durations
from orchestrator.planning.gpus import Gpu
from orchestrator.planning.kinds import ALIKE, WorkerKind
from orchestrator.planning.memory import GIB, HOST_OPTIMIZER_BYTES, kept_states_bytes
from orchestrator.planning.options import Premises
from orchestrator.planning.packs import PackPlan
from orchestrator.planning.patterns import unmatched
from orchestrator.planning.shape import BaseShape, UnknownShape, check_targets, read_shape
from orchestrator.records import (
    BaseModel,
    ComputeDtype,
    Decision,
    Device,
    Notice,
    PackSpec,
    TrialResult,
    TrialSpec,
)
from orchestrator.search.objectives import violations
from orchestrator.search.space import Bounds, KnownPoints, bounds, next_trial
from orchestrator.sweep.bits import BitChooser, RunOnWorker, check_budgets, run_here
from orchestrator.sweep.controller import Controller
from orchestrator.sweep.earlier import keep_speeds, speeds_to_begin_with
from orchestrator.sweep.executor import Executor
from orchestrator.sweep.expectations import within
from orchestrator.sweep.own_share import OwnShare, one_worker_claimed
from orchestrator.sweep.pace import Pace
from orchestrator.sweep.run_store import RunStore
from orchestrator.sweep.selection import Winner, select_winner
from orchestrator.sweep.sharing import Alone, Sharing

# Trials that a sampler which learns has under way for each worker: more fill a worker better, and
# are drawn knowing fewer results.
LEARNING_TRIALS_PER_WORKER = 4


class Display(Protocol):
    """Where a person follows the sweep."""

    def say(self, line: str) -> None: ...

    def observe(self, notice: Notice) -> None: ...


@dataclass(frozen=True)
class Services:
    executor: Executor
    task_pool: Callable[[], AbstractContextManager[RunTasks]]
    """Prepares the data; what it holds is given back before training begins."""
    num_workers: int
    display: Display
    on_controller: Callable[[Controller], None] = field(default=lambda controller: None)
    """Is given the controller before it runs, so that signals can reach it."""
    watch: Callable[[Notice], None] = field(default=lambda notice: None)
    """Is told everything that the display is told."""
    worker_memory_bytes: int = 0
    """Of the worker that has least; 0: unknown."""
    kinds: tuple[WorkerKind, ...] = ()
    """Of the workers, the fastest first; empty where all are alike."""
    gpus: Mapping[str, Gpu] = field(default_factory=dict)
    """Of each kind of workers whose rates are known; of "" where all are alike."""
    run_on_worker: RunOnWorker = run_here
    """Runs one job where a worker would train; before any pack does."""
    host_memory_bytes: int = 0
    """A GPU worker's part of its node's own memory, the least; 0: unknown."""
    sharing: Sharing = field(default_factory=Alone)

    def claimed(self) -> AbstractContextManager[None]:
        """Of the fastest workers one, for what is done before there are packs."""
        return one_worker_claimed(self.sharing, self.kinds[0].name if self.kinds else ALIKE.name)


@dataclass(frozen=True)
class Outcome:
    finished: bool
    """False if the sweep was asked to stop first."""
    winner: Winner | None


def run_sweep(store: RunStore, services: Services) -> Outcome:
    """Train all trials and select the winner.

    Raises:
        ConfigError: a pack is to have more workers than there are of a kind.
        TrialFailed: no trial finished with a usable result.
    """
    config = store.sweep.config
    counts = {kind.name: kind.count for kind in services.kinds} or {"": services.num_workers}
    check_pack_fits(config.resources, counts)
    with closing(services.sharing):
        base = _base_model(store, config, services.display)
        data = _data(store, config, base, services)
        _check_task(config, base, data)
        finished = _train(store, config, base, data, services)
    if not finished:
        return Outcome(False, None)
    winner = select_winner(store.trials, store.results, config.search)
    if winner is None:
        raise TrialFailed(*_why_no_winner(store.results, config))
    store.write("winner", winner.to_json())
    store.add_decision(
        Decision(time.time(), "select_winner", f"trial {winner.trial}", winner.reason)
    )
    return Outcome(True, winner)


def _base_model(store: RunStore, config: SweepConfig, display: Display) -> BaseModel:
    record = store.read("base_model")
    if record is not None:
        return BaseModel(**record)
    from orchestrator.training.model_source import resolve_base_model

    display.say(f"base model: {config.base_model.source}")
    base = resolve_base_model(config.base_model)
    display.say(f"base model: {base.folder} ({base.digest[:12]})")
    store.write("base_model", base.__dict__)
    return base


def _data(
    store: RunStore, config: SweepConfig, base: BaseModel, services: Services
) -> PreparedData:
    record = store.read("data")
    if record is not None and (found := find_prepared(record["place"])):
        return found
    from orchestrator.training.model_source import local_folder

    folder = Path(local_folder(base))
    # Of GPUs it takes none.
    on_workers = device_named(store.sweep.device) == "cpu"
    with services.claimed() if on_workers else nullcontext(), services.task_pool() as run_tasks:
        data = prepare(config.data, folder, cache_dir(), run_tasks, services.display.say)
    store.write("data", data.to_json())
    return data


def _check_task(config: SweepConfig, base: BaseModel, data: PreparedData) -> None:
    """Raises DataError, before any worker is taken, for questions that nobody could answer."""
    task = config.evaluation.task
    if task is None or task.answer_pattern is None:
        return
    from orchestrator.training.model_source import local_folder

    reader = BlockReader(fetch_manifest(data.place, "held_out"))
    held_out_questions(reader, load_tokenizer(local_folder(base)), task)


def _train(
    store: RunStore, config: SweepConfig, base: BaseModel, data: PreparedData, services: Services
) -> bool:
    from orchestrator.training.model_source import local_folder

    shape = read_shape(Path(local_folder(base)))
    chooser = _bit_chooser(store, base, data, shape, services)
    points = KnownPoints(config, shape)

    def ask(known: list[TrialSpec], results: list[TrialResult]) -> TrialSpec | None:
        per_worker = config.resources.slots_per_pack or LEARNING_TRIALS_PER_WORKER
        trial = next_trial(config, known, results, services.num_workers * per_worker, points)
        settled = chooser.settle(trial) if trial is not None else None
        if settled is not trial:
            store.write("bits", chooser.chosen)
        return settled

    over = {result.number for result in store.results}
    asked = [trial.config for trial in store.trials if trial.number not in over]
    room = bounds(config.trial, config.search, asked)

    def build_pack(number: int, plan: PackPlan) -> PackSpec:
        return pack_spec(store, base, data, number, plan, room)

    def observe(notice: Notice) -> None:
        services.display.observe(notice)
        services.watch(notice)

    with closing(services.executor) as executor:
        premises = sweep_premises(
            config,
            device_named(store.sweep.device),
            store.sweep.compute_dtype,
            shape,
            services.worker_memory_bytes,
            room,
            services.gpus.get(ALIKE.name),
            services.host_memory_bytes,
        )
        pace = _pace(store, premises, services.gpus)
        controller = Controller(
            store,
            executor,
            ask,
            build_pack,
            services.num_workers,
            premises,
            observe,
            services.kinds,
            pace,
            own_share=OwnShare(services.sharing),
        )
        services.on_controller(controller)
        finished = controller.run()
        if not isinstance(shape, UnknownShape):
            keep_speeds(shape, pace.factors)
        return finished


def _pace(store: RunStore, premises: Premises, gpus: Mapping[str, Gpu]) -> Pace:
    shape = premises.shape
    if isinstance(shape, UnknownShape) or not gpus or premises.device == "cpu":
        return Pace()
    return Pace(Durations(premises, shape, gpus), speeds_to_begin_with(store, shape))


def _bit_chooser(
    store: RunStore,
    base: BaseModel,
    data: PreparedData,
    shape: BaseShape | UnknownShape,
    services: Services,
) -> BitChooser:
    sweep = store.sweep
    chooser = BitChooser(base, shape, data, sweep.compute_dtype, device_named(sweep.device))
    chooser.chosen |= store.read("bits") or {}
    with services.claimed():
        chooser.measure(sweep.config, services.run_on_worker, services.display.say)
    return chooser


def sweep_premises(
    config: SweepConfig,
    device: Device,
    compute_dtype: str,
    shape: BaseShape | UnknownShape,
    worker_memory_bytes: int,
    room: Bounds | None = None,
    gpu: Gpu | None = None,
    host_memory_bytes: int = 0,
) -> Premises:
    """`room` is the space's own if it is left out; `gpu` the workers', where all are alike.

    Raises:
        ConfigError: the device cannot run the step program, target modules or patterns match no
            layer of the base, a budget of bits is less than the base takes at the fewest, or
            sequences are longer than it keeps apart.
    """
    resources = config.resources
    check_lengths(config, shape)
    if not isinstance(shape, UnknownShape):
        check_layers(config, shape)
        check_budgets(config, shape, compute_dtype)
    check_step_program(resources, device)
    if resources.step_program == "in_place" and resources.slots_per_pack not in (None, 1):
        raise ConfigError(
            "resources.step_program: in_place trains one trial at a time, but got "
            f"resources.slots_per_pack={resources.slots_per_pack}: set it to 1, or leave it out"
        )
    room = room or bounds(config.trial, config.search)
    usable = resources.memory_fraction if device == "cuda" else 1.0
    task = config.evaluation.task
    premises = Premises(
        device=device,
        compute_dtype=compute_dtype,
        shape=shape,
        worker_memory_bytes=int(worker_memory_bytes * usable),
        memory_fraction=usable,
        max_rank=room.max_rank,
        target_modules=room.target_modules,
        dropout=room.dropout,
        optimizer_bytes=kept_states_bytes(room.optimizers),
        host_optimizer_bytes=max(HOST_OPTIMIZER_BYTES[name] for name in room.optimizers),
        block_length=config.data.block_length,
        evaluation_batch_size=config.evaluation.batch_size,
        resources=resources,
        generated_tokens=task.max_new_tokens if task else 0,
        generation_batch_size=min(task.batch_size, task.max_examples) if task else 1,
        gpu=gpu if device == "cuda" else None,
        host_memory_bytes=host_memory_bytes,
        in_turn=config.search.pruner.kind != "none",
    )
    return within(config.search.constraints, premises)


def check_lengths(config: SweepConfig, shape: BaseShape | UnknownShape) -> None:
    """Raises ConfigError where a sequence of the sweep may change what others in its batch are."""
    task, most = config.evaluation.task, shape.most_tokens
    length, names = config.data.block_length, "data.block_length"
    if task is not None:
        length, names = length + task.max_new_tokens, f"{names} + evaluation.task.max_new_tokens"
    if most is not None and length > most:
        raise ConfigError(
            f"{names} must be at most {most} with this base model, but got {length}: beyond that "
            "its positions are scaled by the longest sequence of a batch (its config's rope_type), "
            "so that trials in a pack would not be the trials alone"
        )


def check_layers(config: SweepConfig, shape: BaseShape) -> None:
    """Raises ConfigError for a target module that the base does not have, and for a key of a
    pattern that matches none of its layers, or none that an adapter is put on."""
    trial, search = config.trial, config.search
    layers = [linear.name for linear in shape.linears]
    choices = search.values_of("adapter.target_modules", trial.adapter.target_modules)
    for choice in choices:
        check_targets(choice, layers)
    targets = [linear.name for choice in choices for linear in shape.targets(choice)]
    written: dict[str, tuple[Any, list[str], str]] = {
        "quant.bit_width_pattern": (trial.quant.bit_width_pattern, layers, "of the base model"),
        "adapter.rank_pattern": (trial.adapter.rank_pattern, targets, "that takes an adapter"),
        "adapter.alpha_pattern": (trial.adapter.alpha_pattern, targets, "that takes an adapter"),
    }
    for name, (own, names, kind) in written.items():
        patterns = search.values_of(name, own)
        for idle in itertools.chain(*(unmatched(pattern, names) for pattern in patterns)):
            known = ", ".join(sorted({layer.rpartition(".")[2] for layer in names}))
            raise ConfigError(f"{name}: {idle!r} matches no linear layer {kind}; these are {known}")


def pack_spec(
    store: RunStore,
    base: BaseModel,
    data: PreparedData,
    number: int,
    plan: PackPlan,
    room: Bounds,
) -> PackSpec:
    sweep = store.sweep
    config = sweep.config
    quant = plan.key.quant.model_dump()
    if quant["compute_dtype"] == "auto":
        quant["compute_dtype"] = sweep.compute_dtype
    return PackSpec(
        pack=number,
        base_model=base,
        data_place=data.place,
        template=config.data.prompt_template,
        quant=quant,
        target_modules=room.target_modules,
        num_slots=plan.num_slots,
        max_rank=room.max_rank,
        micro_batch_size=plan.fit.micro_batch_size,
        gradient_checkpointing=plan.fit.gradient_checkpointing,
        kept_layers=plan.fit.kept_layers,
        reading=config.data.reading,
        strategy=dict(plan.key.strategy),
        device=device_named(sweep.device),
        cpus=config.resources.cpus_per_worker,
        evaluation=config.evaluation,
        checkpoint_every_steps=config.checkpoint_every_steps,
        dropout=room.dropout,
        world_size=plan.world_size,
        dequantise_once=plan.fit.dequantise_once,
        step_program=plan.fit.step_program,
        memory_fraction=config.resources.memory_fraction,
        accelerator=plan.kind.name,
        loftq=room.loftq and plan.key.quant.packed,
        dora=plan.key.dora,
        quantised_cache_bytes=int(config.resources.quantised_cache_gib * GIB),
    )


def device_named(name: str) -> Device:
    return "cuda" if name == "cuda" else "cpu"


def auto_compute_dtype(device: str) -> ComputeDtype:
    """bfloat16 where the hardware computes in it: GPUs, and CPUs with AVX512-BF16 or AMX."""
    if device == "cuda":
        return "bfloat16"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def _why_no_winner(results: list[TrialResult], config: SweepConfig) -> tuple[str, str]:
    reasons = []
    for result in results:
        if result.state == "finished":
            found = violations(config.search.constraints, result)
            words = f"constraint: {'; '.join(found)}" if found else "an objective is not finite"
        else:
            words = f"{result.reason}: {result.message}"
        reasons.append(f"trial {result.number}: {words}")
    first = results[0].reason if results else "raised"
    return first or "constraint", "no trial can win:\n  " + "\n  ".join(reasons)

"""`orchestrator sweep --dry-run`: trials, packs, shards and every resolved setting; starts nothing.

Imports no torch, transformers, ray or mlflow.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.inputs import check_files
from jobs.settled import settled
from orchestrator.config import SweepConfig
from orchestrator.data.sources import estimate_slices
from orchestrator.data_config import MIB
from orchestrator.errors import ConfigError
from orchestrator.loading import load_config
from orchestrator.planning.capacity import (
    Node,
    host_memory_bytes,
    worker_count,
    worker_memory_bytes,
)
from orchestrator.planning.compatibility import problems
from orchestrator.planning.gpus import Gpu
from orchestrator.planning.kinds import ALIKE, known_gpus
from orchestrator.planning.packs import one_kind, preview_packs
from orchestrator.planning.shape import BaseShape, UnknownShape, read_shape
from orchestrator.planning.waiting import pack_key
from orchestrator.records import Device, TrialSpec
from orchestrator.search.pruning import rung_steps
from orchestrator.search.space import check_space, first_trials, num_trials
from orchestrator.search_config import PrunerConfig
from orchestrator.sweep.bits import auto_settings, check_budgets, last_allocation
from orchestrator.sweep.expectations import refusal
from orchestrator.sweep.flow import auto_compute_dtype, sweep_premises
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.stores import resolve_tracking_uri, without_password
from orchestrator.tracking.translation import shown
from orchestrator.training.model_source import find_source, folder_here
from orchestrator.wording import counted
from orchestrator.yaml_core import dump_yaml

# Of searched steps, in the line about rungs.
MOST_LENGTHS = 4
NO_BASE_YET = UnknownShape("the base is not here yet: a sweep fetches it, and chooses anew")


@dataclass(frozen=True)
class Placement:
    """Where the packs will run, as far as this machine can tell."""

    device: str
    """cpu, cuda, or auto where a cluster decides."""
    num_workers: int | None
    """None where a cluster decides."""
    worker_memory_bytes: int
    """0 where a cluster decides, or this machine does not say."""
    words: str
    gpu: Gpu | None = None
    """Where its rates are known."""
    host_memory_bytes: int = 0


def show_plan(
    path: Path,
    overrides: list[str],
    run_dir: Path | None,
    ray_address: str | None,
    machine: Node,
) -> int:
    config = load_config(path, overrides)
    # All that the sweep would refuse is refused before a line is printed.
    check_space(config)
    check_files(config)
    shape = base_shape(config)
    shards = _shards(config)
    if run_dir is not None:
        RunStore(run_dir).check_free(settled(config))
    placement = _placement(config, ray_address or os.environ.get("RAY_ADDRESS"), machine)
    if not isinstance(shape, UnknownShape):
        check_budgets(config, shape, auto_compute_dtype(_device(placement)))
    trials = first_trials(config, shape)
    console = Console(soft_wrap=True)
    console.print(trials_table(config, trials))
    for trial in trials:
        for problem in problems(trial.config, config.resources.workers_per_pack, shape):
            console.print(f"trial {trial.number} will not be trained: {problem}", markup=False)
    _print_bits(console, config, placement, shape)
    _print_packs(console, config, trials, placement, shape)
    if config.search.pruner.kind != "none":
        console.print(_rungs(config.search.pruner, trials), markup=False)
        if words := _few_compete(config.search.pruner, trials):
            console.print(words, markup=False)
    for line in shards:
        console.print(line, markup=False)
    _print_settings(console, config, placement.device, run_dir)
    return 0


def _placement(config: SweepConfig, ray_address: str | None, machine: Node) -> Placement:
    resources = config.resources
    if ray_address:
        words = f"depends on the Ray cluster at {ray_address}, which a dry run does not ask"
        return Placement(resources.device, resources.num_workers, 0, words)
    device = resources.device
    if device == "auto":
        device = "cuda" if machine.num_gpus else "cpu"
    num_workers = worker_count(resources, device, [machine])
    unit = "1 GPU" if device == "cuda" else f"{resources.cpus_per_worker} CPU core(s)"
    memory_bytes = worker_memory_bytes(resources, device, [machine], num_workers)
    words = f"1 worker with {unit} of this machine"
    if num_workers > 1:
        words = f"{num_workers} workers, each with {unit} of this machine"
    gpu = known_gpus([machine]).get(ALIKE.name)
    host_bytes = host_memory_bytes(resources, [machine], num_workers)
    return Placement(device, num_workers, memory_bytes, words, gpu, host_bytes)


def _device(placement: Placement) -> Device:
    """A cluster that is not asked is taken to have GPUs."""
    return "cpu" if placement.device == "cpu" else "cuda"


def trials_table(config: SweepConfig, trials: list[TrialSpec]) -> Table:
    total = num_trials(config.search)
    more = "" if total == len(trials) else f", the first {len(trials)} shown"
    table = Table(title=f"{config.name}: {counted(total, 'trial')} ({config.search.sampler}{more})")
    table.add_column("trial", justify="right")
    for name in config.search.space:
        table.add_column(name, justify="right")
    table.add_column("steps", justify="right")
    table.add_column("blocks/step", justify="right")
    for trial in trials:
        # A dash where a condition leaves the field as the trial is written.
        params = trial.params
        values = [shown(params[name]) if name in params else "-" for name in config.search.space]
        table.add_row(
            str(trial.number), *values, str(trial.config.steps), str(trial.config.batch_size)
        )
    return table


def _rungs(pruner: PrunerConfig, trials: Sequence[TrialSpec]) -> str:
    """Of each length that a trial has, or of the shortest and the longest."""
    found = {trial.config.steps: rung_steps(pruner, trial.config) for trial in trials}
    lengths = sorted(found)
    words = [
        (", ".join(map(str, found[length])) or "none") + (f" of {length}" if lengths[1:] else "")
        for length in (lengths if len(lengths) <= MOST_LENGTHS else (lengths[0], lengths[-1]))
    ]
    return f"pruner: {pruner.kind}, rungs at steps {'; '.join(words)}"


def _few_compete(pruner: PrunerConfig, trials: Sequence[TrialSpec]) -> str:
    """Where most trials compete with too few for any to be stopped; else empty."""
    sizes = Counter(pack_key(trial.config) for trial in trials)
    few = sum(size for size in sizes.values() if size < pruner.reduction_factor)
    if pruner.kind == "median" or 2 * few < len(trials):
        return ""
    return (
        f"pruner: {few} of {len(trials)} trials compete with fewer than "
        f"{pruner.reduction_factor - 1} others, too few for one to be stopped: only those that "
        "could share a pack compete, and with trial.micro_batch_size set those of any batch_size "
        "could"
    )


def _print_bits(
    console: Console, config: SweepConfig, placement: Placement, shape: BaseShape | UnknownShape
) -> None:
    """What `bit_width: auto` gives each layer, as far as it was measured before."""
    for quant in auto_settings(config):
        try:
            found = last_allocation(config, quant, shape, auto_compute_dtype(_device(placement)))
        except ConfigError as error:
            console.print(f"bits: {quant.title}: not trained: {error}", markup=False)
            continue
        if found is None:
            words = "measured and chosen for each layer when the sweep starts"
            console.print(f"bits: {quant.title}: {words}", markup=False)
            continue
        words = f"bits: {quant.title}: as measured last, {found.reason}"
        console.print(words, markup=False, highlight=False)
        for names, bits in found.bit_width_pattern.items():
            console.print(f"  {bits} bits: {names}", markup=False, highlight=False)


def base_shape(config: SweepConfig) -> BaseShape | UnknownShape:
    folder = folder_here(config.base_model)
    return NO_BASE_YET if folder is None else read_shape(folder)


def _print_packs(
    console: Console,
    config: SweepConfig,
    trials: Sequence[TrialSpec],
    placement: Placement,
    shape: BaseShape | UnknownShape,
) -> None:
    console.print(f"placement: {placement.words}", markup=False)
    if placement.num_workers is None:
        return
    workers_per_pack = config.resources.workers_per_pack
    valid = [trial for trial in trials if not problems(trial.config, workers_per_pack, shape)]
    device = _device(placement)
    premises = sweep_premises(
        config,
        device,
        auto_compute_dtype(device),
        shape,
        placement.worker_memory_bytes,
        gpu=placement.gpu,
        host_memory_bytes=placement.host_memory_bytes,
    )
    kinds = one_kind(placement.num_workers, premises)
    refused = {}
    for trial in valid:
        if found := refusal(trial, config.search.constraints, premises, now=0.0, kinds=kinds):
            refused[trial.number] = found.message
            console.print(
                f"trial {trial.number} will not be trained: {found.message}", markup=False
            )
    valid = [trial for trial in valid if trial.number not in refused]
    packs = preview_packs(valid, placement.num_workers, premises)
    for number, (plan, members) in enumerate(packs):
        names = ", ".join(str(trial.number) for trial in members)
        starts = f"starts with trials {names}"
        console.print(f"  pack {number}: {plan.reason}; {starts}", markup=False, highlight=False)
    later = len(valid) - sum(len(members) for _, members in packs)
    if later:
        follow = "trial follows" if later == 1 else "trials follow"
        console.print(f"  {later} {follow} as slots come free")


def _shards(config: SweepConfig) -> list[str]:
    lines = []
    data = config.data
    roles = {"train": data.train_sources, "held_out": data.held_out_sources}
    for role, sources in roles.items():
        for source in sources:
            slices = estimate_slices(source, data.slice_bytes)
            weight = f", {source.weight:g} times an epoch" if source.weight != 1 else ""
            if slices is None:
                size = "known once it is made or downloaded"
            else:
                size = f"{sum(part.num_bytes for part in slices) / MIB:.1f} MiB in "
                size += counted(len(slices), "slice")
            lines.append(f"shards: {role}: {source.path}: {size}{weight}")
    if data.held_out is None:
        share = data.held_out_fraction
        lines.append(f"shards: held_out: {share:.1%} of train's examples, by content hash")
    return lines


def _print_settings(
    console: Console,
    config: SweepConfig,
    device: str,
    run_dir: Path | None,
) -> None:
    folder = run_dir or Path(config.runs_dir) / f"{config.name}-DATE"
    base_model = find_source(config.base_model)
    resolved = {
        "device": device,
        "compute_dtype": _compute_dtype(config, device),
        "base_model": str(base_model or f"{config.base_model.source} (model hub)"),
        "tracking_uri": without_password(resolve_tracking_uri(config)),
        "experiment": config.experiment_name,
        "registered_model": config.registered_model_name,
        "run_folder": str(folder),
    }
    console.print("resolved:")
    for name, value in resolved.items():
        console.print(f"  {name}: {value}", highlight=False)
    console.print("settings:")
    text = dump_yaml(config.model_dump(mode="json"))
    console.print("  " + text.replace("\n", "\n  ").rstrip(), markup=False)


def _compute_dtype(config: SweepConfig, device: str) -> str:
    written = config.trial.quant.compute_dtype
    return written if written != "auto" or device == "auto" else auto_compute_dtype(device)

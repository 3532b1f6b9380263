"""`orchestrator sweep --dry-run`: trials, packs, shards and every resolved setting; starts nothing.

Imports no torch, transformers, ray or mlflow.
"""

import os
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from orchestrator.config import SweepConfig
from orchestrator.data.sources import estimate_slices
from orchestrator.errors import ConfigError
from orchestrator.loading import load_config
from orchestrator.planning.packs import preview_packs
from orchestrator.records import TrialSpec
from orchestrator.search.space import ask, first_batch, num_trials
from orchestrator.sweep.flow import auto_compute_dtype
from orchestrator.tracking.stores import resolve_tracking_uri
from orchestrator.training.model_source import find_source

NVIDIA_DEVICES = Path("/proc/driver/nvidia/gpus")


def show_plan(path: Path, overrides: list[str], run_dir: Path | None) -> int:
    config = load_config(path, overrides)
    num_gpus = len(list(NVIDIA_DEVICES.glob("*"))) if NVIDIA_DEVICES.exists() else 0
    device = config.resources.device
    if device == "auto":
        device = "cuda" if num_gpus else "cpu"
    elif device == "cuda" and not num_gpus:
        raise ConfigError("resources.device: cuda, but this machine has no GPU: set auto or cpu")
    trials = first_trials(config, device)
    console = Console(soft_wrap=True)
    console.print(_trials_table(config, trials))
    _print_packs(console, config, trials, device, num_gpus)
    _print_shards(console, config)
    _print_settings(console, config, device, run_dir)
    return 0


def first_trials(config: SweepConfig, device: str) -> list[TrialSpec]:
    """The trials that are known before any result is in."""
    trials: list[TrialSpec] = []
    while len(trials) < first_batch(config.search):
        trials.append(ask(config, device, trials, []))
    return trials


def _trials_table(config: SweepConfig, trials: list[TrialSpec]) -> Table:
    total = num_trials(config.search)
    more = "" if total == len(trials) else f", the first {len(trials)} shown"
    table = Table(title=f"{config.name}: {total} trials ({config.search.sampler}{more})")
    table.add_column("trial", justify="right")
    for name in config.search.space:
        table.add_column(name, justify="right")
    table.add_column("steps", justify="right")
    table.add_column("blocks/step", justify="right")
    for trial in trials:
        values = [str(trial.params[name]) for name in config.search.space]
        table.add_row(
            str(trial.number), *values, str(trial.config.steps), str(trial.config.batch_size)
        )
    return table


def _print_packs(
    console: Console, config: SweepConfig, trials: list[TrialSpec], device: str, num_gpus: int
) -> None:
    resources = config.resources
    here = num_gpus if device == "cuda" else (os.cpu_count() or 1) // resources.cpus_per_worker
    num_workers = resources.num_workers or max(1, here)
    unit = "GPU" if device == "cuda" else f"{resources.cpus_per_worker} CPU core(s)"
    console.print(f"placement: {num_workers} workers, each with {unit} of this machine")
    packs = preview_packs(trials, num_workers, resources.slots_per_pack)
    for number, (plan, members) in enumerate(packs):
        names = ", ".join(str(trial.number) for trial in members)
        console.print(f"  pack {number}: {plan.reason}; starts with trials {names}")
    later = len(trials) - sum(len(members) for _, members in packs)
    if later:
        console.print(f"  {later} trials follow as slots come free")


def _print_shards(console: Console, config: SweepConfig) -> None:
    for role, source in (("train", config.data.train), ("held_out", config.data.held_out)):
        if source is None:
            fraction = config.data.held_out_fraction
            console.print(f"shards: {role}: {fraction:.1%} of train's rows, by content hash")
            continue
        slices = estimate_slices(source, config.data.rows_per_slice)
        if slices is None:
            console.print(f"shards: {role}: {source}: known once it is made or downloaded")
        else:
            rows = sum(part.num_rows for part in slices)
            console.print(f"shards: {role}: {source}: {rows} rows in {len(slices)} slices")


def _print_settings(
    console: Console, config: SweepConfig, device: str, run_dir: Path | None
) -> None:
    source = find_source(config.base_model)
    folder = run_dir or Path(config.runs_dir) / f"{config.name}-DATE"
    resolved = {
        "device": device,
        "compute_dtype": auto_compute_dtype(device)
        if config.trial.quant.compute_dtype == "auto"
        else config.trial.quant.compute_dtype,
        "base_model": str(source) if source else f"{config.base_model.source} (model hub)",
        "tracking_uri": resolve_tracking_uri(config),
        "experiment": config.experiment_name,
        "registered_model": config.registered_model_name,
        "run_folder": str(folder),
    }
    console.print("resolved:")
    for name, value in resolved.items():
        console.print(f"  {name}: {value}", highlight=False)
    console.print("settings:")
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    console.print("  " + text.replace("\n", "\n  ").rstrip(), markup=False)

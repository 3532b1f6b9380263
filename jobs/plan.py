"""`orchestrator plan`: what a sweep will do, what it takes and what it costs, before it is started.

Imports no torch, transformers, ray or mlflow. It needs no GPU: `--gpus` says which there will be.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.dry_run import base_shape, trials_table
from orchestrator.config import SweepConfig
from orchestrator.errors import ConfigError
from orchestrator.loading import load_config
from orchestrator.planning.capacity import (
    Node,
    check_pack_fits,
    host_memory_bytes,
    worker_count,
    worker_memory_bytes,
)
from orchestrator.planning.durations import Durations
from orchestrator.planning.gpus import Gpu, parse_gpus
from orchestrator.planning.kinds import ALIKE, WorkerKind, known_gpus
from orchestrator.planning.measured import Factors
from orchestrator.planning.memory import GIB, PackMemory
from orchestrator.planning.packs import PackPlan, preview_packs
from orchestrator.planning.shape import BaseShape, UnknownShape
from orchestrator.records import Device, TrialSpec
from orchestrator.search.space import check_space, first_batch, first_trials, num_trials
from orchestrator.sweep.admission import Admission
from orchestrator.sweep.earlier import earlier_speeds
from orchestrator.sweep.expectations import check_none_waits
from orchestrator.sweep.flow import auto_compute_dtype, sweep_premises
from orchestrator.sweep.forecast import Forecast
from orchestrator.sweep.reach import best_reach, later_trials
from orchestrator.wording import counted, ranges

CHART_WIDTH = 64
FILE_WIDTH = 120
WORDS = ("base", "GPUs", "trials")
FIT = ("pack", "tokens/s", "from", "to")
MOST_ROWS = 24
PARTS = {
    "base_bytes": "base, as stored",
    "dequantised_bytes": "base, dequantised",
    "adapters_bytes": "adapters and gradients",
    "optimizer_bytes": "optimizer",
    "lanes_bytes": "adapters' copies",
    "graph_bytes": "recorded step",
    "training_bytes": "training pass",
    "evaluation_bytes": "evaluation pass",
    "runtime_bytes": "CUDA and libraries",
}


def show(path: Path, overrides: list[str], gpus: str | None, machine: Node) -> int:
    config = load_config(path, overrides)
    check_space(config)
    kinds, known = _workers(config, gpus, machine)
    shape = base_shape(config)
    trials = first_trials(config, shape)
    # Where nobody's window sets a width: enough for the tables.
    width = None if sys.stdout.isatty() else FILE_WIDTH
    console = Console(soft_wrap=True, highlight=False, width=width)
    plan = _Shown(console, config, kinds, known, shape)
    console.print(trials_table(config, trials))
    plan.plan(trials)
    return 0


def _workers(
    config: SweepConfig, gpus: str | None, machine: Node
) -> tuple[tuple[WorkerKind, ...], dict[str, Gpu]]:
    """The kinds of workers, the fastest first, and what is known of their GPUs; without `--gpus`
    those of this machine."""
    resources = config.resources
    if gpus is None:
        device = resources.device
        if device == "auto":
            device = "cuda" if machine.num_gpus else "cpu"
        count = worker_count(resources, device, [machine])
        memory_bytes = worker_memory_bytes(resources, device, [machine], count)
        gpu = known_gpus([machine]).get(ALIKE.name) if device == "cuda" else None
        name = machine.gpu_kind if gpu else "GPU of this machine"
        if device != "cuda":
            name = "worker on this machine's CPU"
        host_bytes = host_memory_bytes(resources, [machine], count)
        kind = WorkerKind(name, count, memory_bytes, host_memory_bytes=host_bytes)
        return (kind,), {name: gpu} if gpu else {}
    if resources.device == "cpu":
        raise ConfigError(f"--gpus {gpus}, but resources.device: cpu: set auto or cuda")
    found = sorted(_merged(parse_gpus(gpus)), key=lambda entry: -entry[2].tflops)
    fastest = found[0][2].tflops
    left = resources.num_workers
    kinds = []
    for count, name, gpu in found:
        used = count if left is None else min(count, left)
        left = None if left is None else left - used
        kinds.append(WorkerKind(name, used, gpu.memory_bytes, gpu.tflops / fastest))
    if left:
        raise ConfigError(f"resources.num_workers={resources.num_workers}: --gpus {gpus} has fewer")
    kinds = [kind for kind in kinds if kind.count]
    check_pack_fits(resources, {kind.name: kind.count for kind in kinds})
    return tuple(kinds), {name: gpu for _, name, gpu in found}


def _merged(written: Sequence[tuple[int, str, Gpu]]) -> list[tuple[int, str, Gpu]]:
    """Each card once, under the name that it was written with first."""
    found: dict[str, tuple[int, str, Gpu]] = {}
    for count, name, gpu in written:
        before, first, _ = found.get(gpu.name, (0, name, gpu))
        found[gpu.name] = (before + count, first, gpu)
    return list(found.values())


class _Shown:
    def __init__(
        self,
        console: Console,
        config: SweepConfig,
        kinds: Sequence[WorkerKind],
        known: dict[str, Gpu],
        shape: BaseShape | UnknownShape,
    ) -> None:
        self._console = console
        self._config = config
        self._kinds = kinds
        self._known = known
        self._shape = shape
        on_cpu = not known and "CPU" in kinds[0].name
        self._device: Device = "cpu" if on_cpu else "cuda"
        self._premises = sweep_premises(
            config,
            self._device,
            auto_compute_dtype(self._device),
            shape,
            min(kind.memory_bytes for kind in kinds),
            gpu=known[kinds[0].name] if len(known) == 1 else None,
        )
        self._admission = Admission(self._premises, config.search.constraints, kinds)

    def plan(self, given: Sequence[TrialSpec]) -> None:
        trials = [trial for trial in given if self._is_trained(trial)]
        trials += later_trials(self._config, len(given), lambda trial: not self._why_not(trial))
        if not trials:
            raise ConfigError(f"no trial can be trained: {self._why_not(given[0])}")
        for kind in self._kinds:
            memory = f" of {kind.memory_bytes / GIB:.1f} GiB" if kind.memory_bytes else ""
            self._say(f"workers: {kind.count} x {kind.name}{memory}")
        if isinstance(self._shape, UnknownShape) or not self._known:
            packs = preview_packs(trials, 0, self._premises, kinds=self._kinds)
            for number, (plan, members) in enumerate(packs):
                names = ", ".join(str(trial.number) for trial in members)
                self._say(f"pack {number}: {plan.reason}; starts with trials {names}")
            self._memory([plan for plan, _ in packs])
            self._say(f"time: not predicted: {self._why_no_time()}")
            return
        measured = Factors(earlier_speeds(self._shape))
        durations = Durations(self._premises, self._shape, self._known, measured.factor)
        kinds = measured.speeds(self._kinds, self._known)
        chosen = best_reach(trials, kinds, self._premises, durations)
        found = chosen.forecast
        check_none_waits(found.waiting, kinds)
        self._packs(found, durations)
        self._memory([pack.plan for pack in found.packs])
        self._chart(found)
        self._totals(found)
        if chosen.reason:
            self._say(chosen.reason)
        self._measured(found, measured)

    def _is_trained(self, trial: TrialSpec) -> bool:
        found = self._why_not(trial)
        if found:
            self._say(f"trial {trial.number} will not be trained: {found}")
        return not found

    def _why_not(self, trial: TrialSpec) -> str:
        refused = self._admission.refused_new(trial)
        return refused.message if refused else ""

    def _why_no_time(self) -> str:
        if isinstance(self._shape, UnknownShape):
            return self._shape.reason
        return "say with --gpus which GPUs the sweep will have, such as --gpus 8xH100-80GB"

    def _packs(self, found: Forecast, durations: Durations) -> None:
        table = Table(title="packs")
        names = ("pack", "base", "GPUs", "slots", "blocks/pass", "tokens/s", "from", "to", "trials")
        for name in names:
            table.add_column(
                name, justify="left" if name in ("base", "GPUs", "trials") else "right"
            )
        for pack in found.packs:
            plan, trials = pack.plan, [s.trial for s in found.spans if s.pack == pack.number]
            recomputing = ", recomputing" if plan.fit.gradient_checkpointing else ""
            if kept := plan.fit.kept_layers:
                recomputing += f" all but {counted(kept, 'layer')}"
            table.add_row(
                str(pack.number),
                plan.base + recomputing,
                f"{plan.world_size}x{plan.kind.name}",
                str(plan.num_slots),
                str(plan.fit.micro_batch_size),
                f"{durations.tokens_per_s(plan):,.0f}",
                _clock(pack.start_s),
                _clock(pack.end_s),
                ranges(sorted(trials)),
            )
        self._console.print(table)
        for pack in found.packs:
            if not pack.plan.fit.fits:
                self._say(f"pack {pack.number}: {pack.plan.reason}")

    def _measured(self, found: Forecast, measured: Factors) -> None:
        """Whose times are corrected by what earlier sweeps measured on this machine."""
        used = {(self._known[p.plan.kind.name].name, p.plan.base) for p in found.packs}
        for gpu, base in sorted(used):
            factor = measured.factor(gpu, base)
            if factor != 1:
                self._say(f"{base} on {gpu}: times x {factor:.2f}, as earlier sweeps measured")

    def _memory(self, plans: Sequence[PackPlan]) -> None:
        """Of each kind of pack once."""
        columns: dict[tuple[str, PackMemory], int] = {}
        for plan in plans:
            if plan.fit.memory is not None:
                columns.setdefault((_column(plan), plan.fit.memory), plan.fit.budget_bytes)
        if not columns:
            return
        where = "GPU" if self._device == "cuda" else "worker"
        table = Table(title=f"memory per {where}, GiB")
        table.add_column("part")
        for name, _ in columns:
            table.add_column(name, justify="right")
        memories = [memory for _, memory in columns]
        for part, title in PARTS.items():
            values = [getattr(memory, part) for memory in memories]
            if any(values):
                table.add_row(title, *(f"{value / GIB:.2f}" for value in values))
        table.add_section()
        totals = (f"{memory.total_bytes / GIB:.2f}" for memory in memories)
        table.add_row("at its peak", *totals)
        table.add_row("may be used", *(f"{budget / GIB:.2f}" for budget in columns.values()))
        hosts = [memory.host_bytes for memory in memories]
        if any(hosts):
            table.add_row("on the host", *(f"{value / GIB:.2f}" for value in hosts))
        self._console.print(table)
        self._say("a training and an evaluation pass are not held at the same time")

    def _chart(self, found: Forecast) -> None:
        """A row for each worker: its packs by number, dots while one loads."""
        rows = {worker: [" "] * CHART_WIDTH for pack in found.packs for worker in pack.workers}
        scale = CHART_WIDTH / max(found.makespan_s, 1e-9)
        for pack in found.packs:
            first, ready = int(pack.start_s * scale), int(pack.ready_s * scale)
            last = max(first + 1, min(CHART_WIDTH, round(pack.end_s * scale)))
            label = f"{pack.number} "
            for worker in pack.workers:
                for place in range(first, min(last, CHART_WIDTH)):
                    letter = label[(place - ready) % len(label)]
                    rows[worker][place] = "." if place < ready else letter.replace(" ", "=")
        self._say("which pack each GPU trains (dots: loading)")
        for worker, row in sorted(rows.items())[:MOST_ROWS]:
            self._say(f"  {worker:>4} |{''.join(row)}|")
        if len(rows) > MOST_ROWS:
            self._say(f"  and {len(rows) - MOST_ROWS} more GPUs")
        self._say(f"       0{_clock(found.makespan_s):>{CHART_WIDTH + 1}}")

    def _totals(self, found: Forecast) -> None:
        search = self._config.search
        known = first_batch(search)
        if num_trials(search) > known:
            self._say(
                f"only trials 0-{known - 1} are known before results are in: those after them are "
                "drawn from the space for this plan, and the sweep will train others"
            )
        hours, gpu_hours = found.makespan_s / 3600, found.worker_s / 3600
        words = f"predicted: {hours:.2f} hours, {gpu_hours:.2f} GPU-hours, evaluations apart"
        if search.pruner.kind != "none":
            words += f"; less as far as {search.pruner.kind} stops trials"
        self._say(words)
        if any(pack.plan.key.zero for pack in found.packs):
            self._say(
                "of packs under ZeRO these are the least: what their workers exchange and offload "
                "is not in them"
            )
        rate = self._config.resources.cost_per_hour
        if rate is not None:
            self._say(f"price: {gpu_hours * rate:.2f} at {rate:g} for a GPU and hour")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False)


def _column(plan: PackPlan) -> str:
    slots = counted(plan.num_slots, "slot")
    passes = counted(plan.fit.micro_batch_size, "block") + " a pass"
    words = [slots, passes, *(["recomputing"] if plan.fit.gradient_checkpointing else [])]
    base = plan.key.title + (", ZeRO" if plan.key.zero else "")
    return f"{base}\n{', '.join(words)}\n{plan.kind.name}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"

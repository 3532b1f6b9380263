"""A whole sweep in one process, without Ray and MLflow, for benchmarks of search."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from orchestrator.config import SweepConfig
from orchestrator.data.prepare import run_in_process
from orchestrator.records import Notice, TrialResult
from orchestrator.sweep.executor import InProcessExecutor
from orchestrator.sweep.flow import Outcome, Services, auto_compute_dtype, run_sweep
from orchestrator.sweep.run_store import RunStore, SweepRecord, holds_sweep


class Silent:
    """A Display that shows nothing."""

    def say(self, line: str) -> None:
        pass

    def observe(self, notice: Notice) -> None:
        pass


def run_or_resume(
    config: SweepConfig, folder: Path, watch: Callable[[Notice], None] = lambda notice: None
) -> tuple[RunStore, Outcome]:
    """What the folder holds already is not trained again."""
    import torch

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    if holds_sweep(folder):
        store = RunStore.open(folder)
    else:
        dtype = auto_compute_dtype(device)
        record = SweepRecord(folder.name, 0.0, config, device, dtype, "in_process", {})
        store = RunStore.create(folder, record)
    services = Services(
        executor=InProcessExecutor(),
        task_pool=lambda: nullcontext(run_in_process),
        num_workers=1,
        display=Silent(),
        watch=watch,
        worker_memory_bytes=torch.cuda.get_device_properties(0).total_memory if cuda else 0,
    )
    with store.locked():
        return store, run_sweep(store, services)


def num_tokens(results: Sequence[TrialResult]) -> int:
    """Trained in all, also by trials that were stopped."""
    return sum(result.tokens for result in results)


def conclusion(store: RunStore) -> dict[str, Any]:
    """What must not depend on when and where it was done: every trial, each verdict about it, how
    it ended, and the winner."""
    verdicts = [row for row in store.decisions if row["action"] in ("keep_trial", "stop_trial")]
    winner = store.read("winner") or {}
    return {
        "trials": {trial.number: trial.params for trial in store.trials},
        "verdicts": sorted(
            (row["facts"]["trial"], row["facts"]["rung"], row["action"]) for row in verdicts
        ),
        "ends": {r.number: (r.state, r.steps) for r in store.results},
        "winner": winner.get("trial"),
    }


def final_losses(store: RunStore) -> dict[int, float]:
    """By trial; of a pruned one, at the rung where it was stopped."""
    return {r.number: r.eval_loss for r in store.results if r.eval_loss is not None}

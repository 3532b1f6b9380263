"""Small sweeps for tests, run by simulated workers."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.config import SweepConfig
from orchestrator.planning.packs import PackPlan
from orchestrator.records import BaseModel, Event, PackSpec, TrialResult, TrialSpec
from orchestrator.search.space import ask, num_trials
from orchestrator.sweep.controller import Controller
from orchestrator.sweep.executor import Executor
from orchestrator.sweep.run_store import RunStore, SweepRecord

SPACE = {"quant.bit_width": [4, 16], "adapter.rank": [4, 16]}


def sweep_config(**changes: Any) -> SweepConfig:
    content: dict[str, Any] = {
        "name": "test",
        "base_model": {"source": "somewhere/base"},
        "data": {"train": "train.jsonl"},
        "trial": {"steps": 6, "optimizer": {"learning_rate": 1e-3}},
        "search": {"space": SPACE},
        "checkpoint_every_steps": 2,
    }
    return SweepConfig.model_validate(with_changes(content, changes))


def with_changes(content: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The content with fields replaced that `changes` names, dotted with __."""
    for dotted, value in changes.items():
        *parents, leaf = dotted.split("__")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return content


def make_store(folder: Path, config: SweepConfig) -> RunStore:
    record = SweepRecord(folder.name, time.time(), config, "cpu", "float32", "in_process", {})
    return RunStore.create(folder, record)


def make_controller(
    store: RunStore,
    executor: Executor,
    num_workers: int = 2,
    observe: Callable[[Event], None] = lambda event: None,
) -> Controller:
    config = store.sweep.config

    def next_trial(known: Sequence[TrialSpec], results: Sequence[TrialResult]) -> TrialSpec | None:
        if len(known) >= num_trials(config.search):
            return None
        return ask(config, known, results)

    def build_pack(number: int, plan: PackPlan) -> PackSpec:
        return pack_spec(number, plan)

    return Controller(store, executor, next_trial, build_pack, num_workers, observe)


def pack_spec(number: int, plan: PackPlan) -> PackSpec:
    return PackSpec(
        pack=number,
        base_model=BaseModel("somewhere/base", None, "/nowhere", "digest"),
        train_manifest="train.json",
        held_out_manifest="held_out.json",
        template="plain",
        quant=dict(plan.key.quant),
        target_modules="all-linear",
        num_slots=plan.num_slots,
        max_rank=16,
        micro_batch_size=plan.key.micro_batch_size,
        gradient_checkpointing=False,
        strategy=dict(plan.key.strategy),
        device="cpu",
        cpus=1,
        evaluation=sweep_config().evaluation,
        checkpoint_every_steps=2,
    )

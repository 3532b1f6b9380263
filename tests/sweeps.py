"""Small sweeps for tests, run by simulated workers."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.config import (
    QuantConfig,
    ResourcesConfig,
    StrategyConfig,
    SweepConfig,
    TrialConfig,
)
from orchestrator.planning.fit import Fit
from orchestrator.planning.options import PackWish, Premises
from orchestrator.planning.packs import PackPlan
from orchestrator.planning.shape import BaseShape, Linear, UnknownShape
from orchestrator.planning.waiting import pack_key
from orchestrator.records import BaseModel, Device, Notice, PackSpec, TrialResult, TrialSpec
from orchestrator.search.space import next_trial
from orchestrator.sweep.controller import LEAVE_TIMEOUT_S, Controller
from orchestrator.sweep.executor import Executor
from orchestrator.sweep.flow import sweep_premises
from orchestrator.sweep.own_share import OwnShare
from orchestrator.sweep.pace import Pace
from orchestrator.sweep.run_store import RunStore, SweepRecord

NO_BASE = UnknownShape("there is no base")
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
    observe: Callable[[Notice], None] = lambda notice: None,
    workers_per_pack: int = 1,
    given: Premises | None = None,
    pace: Pace | None = None,
    leave_timeout_s: float = LEAVE_TIMEOUT_S,
    asked: Callable[[], None] = lambda: None,
    own_share: OwnShare | None = None,
) -> Controller:
    """Of workers of one process, which cannot train a pack together. `asked` is called whenever the
    sampler is."""
    config = store.sweep.config

    def ask(known: Sequence[TrialSpec], results: Sequence[TrialResult]) -> TrialSpec | None:
        asked()
        return next_trial(config, known, results, most_under_way=2 * num_workers)

    def build_pack(number: int, plan: PackPlan) -> PackSpec:
        return pack_spec(number, plan)

    slots_per_pack = config.resources.slots_per_pack
    resources = ResourcesConfig(slots_per_pack=slots_per_pack, workers_per_pack=workers_per_pack)
    given = given or replace(premises(config), resources=resources)
    return Controller(
        store,
        executor,
        ask,
        build_pack,
        num_workers,
        given,
        observe,
        pace=pace,
        leave_timeout_s=leave_timeout_s,
        own_share=own_share,
    )


def premises(
    config: SweepConfig,
    device: Device = "cpu",
    shape: BaseShape | UnknownShape = NO_BASE,
    worker_memory_bytes: int = 0,
) -> Premises:
    dtype = "bfloat16" if device == "cuda" else "float32"
    return sweep_premises(config, device, dtype, shape, worker_memory_bytes)


def pack_wish(
    config: SweepConfig,
    share: int,
    batch_size: int,
    strategy: StrategyConfig = StrategyConfig(),  # noqa: B008  (frozen)
) -> PackWish:
    """Of one worker for `share` trials with steps of `batch_size` blocks."""
    return PackWish(
        quant=QuantConfig(bit_width=config.trial.quant.bit_width),
        strategy=strategy,
        alone="",
        share=share,
        num_slots=config.resources.slots_per_pack,
        worker_blocks=batch_size,
        micro_batch_size=config.trial.micro_batch_size,
        gradient_checkpointing=config.trial.gradient_checkpointing,
    )


def llama_shape(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int
) -> BaseShape:
    head_dim = hidden // heads
    sizes = {
        "self_attn.q_proj": (hidden, heads * head_dim),
        "self_attn.k_proj": (hidden, kv_heads * head_dim),
        "self_attn.v_proj": (hidden, kv_heads * head_dim),
        "self_attn.o_proj": (heads * head_dim, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }
    linears = tuple(
        Linear(f"model.layers.{layer}.{name}", *size)
        for layer in range(layers)
        for name, size in sizes.items()
    )
    plain = 2 * vocab * hidden + (2 * layers + 1) * hidden
    sizes_of_heads = (heads, kv_heads, head_dim)
    return BaseShape(
        layers, hidden, intermediate, *sizes_of_heads, vocab, linears, plain, activation="silu"
    )


LLAMA_8B = llama_shape(32, 4096, 14336, 32, 8, 128_256)
LLAMA_HALF_B = llama_shape(24, 896, 4864, 14, 2, 151_936)


def pack_plan(trial: TrialConfig, num_slots: int) -> PackPlan:
    chosen = Fit(num_slots, trial.batch_size, False, False, "eager", None, 0, ())
    return PackPlan(pack_key(trial), 1, chosen, "")


def pack_spec(number: int, plan: PackPlan) -> PackSpec:
    return PackSpec(
        pack=number,
        base_model=BaseModel("somewhere/base", None, "/nowhere", "digest"),
        data_place="shards",
        template="plain",
        quant=plan.key.quant.model_dump(),
        target_modules="all-linear",
        num_slots=plan.num_slots,
        max_rank=16,
        micro_batch_size=plan.fit.micro_batch_size,
        gradient_checkpointing=plan.fit.gradient_checkpointing,
        kept_layers=plan.fit.kept_layers,
        strategy=dict(plan.key.strategy),
        device="cpu",
        cpus=1,
        evaluation=sweep_config().evaluation,
        checkpoint_every_steps=2,
        world_size=plan.world_size,
    )

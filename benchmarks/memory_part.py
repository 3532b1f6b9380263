"""Measures the memory of one shape's pack workers in one process, for `benchmarks.planner_memory`.

Cases with the same base use one that is loaded once; what a case changes about it is undone. A row
is appended as soon as it is measured. With --world-rank it is one of the workers of a pack, which
train one case.

What is compared, at its highest, once the base is loaded:

    torch       bytes of the tensors, and what the pools of recorded graphs hold beyond theirs, as
                nobody else can use that. What the allocator merely keeps for later is not in it
    managed     bitsandbytes' paged states, which bypass torch's allocator
    outside     the CUDA context and loaded kernels: what the driver counts for this process without
                what torch's allocator holds. Read where nothing is managed; elsewhere the record
                takes the median of those
    host        pages of this process that are no file's, at any time (Linux). Locked memory lies in
                shared pages; what torch holds of it is told beside them

Each case runs on a card made so small that the plan just fits it (what is expected is the part of
it that the planner uses). What runs out of memory there is measured again without that; by new
processes where several train it, since the others wait for the one that is lost.
"""

import argparse
import gc
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from benchmarks.blocks import prepare_blocks
from benchmarks.host_memory import host_peak
from benchmarks.memory_cases import (
    MICRO_BATCHES,
    OUT_OF_MEMORY_EXIT,
    Case,
    expected,
    worker_rows,
)
from benchmarks.models import SHAPES
from benchmarks.own import NEVER, train
from benchmarks.recording import Row, append_row, environment
from orchestrator.config import EvaluationConfig, QuantConfig, StrategyConfig, TrialConfig
from orchestrator.planning.fit import BUDGET_FRACTION
from orchestrator.planning.memory import PackMemory, context_bytes
from orchestrator.records import ALONE, BaseModel, Device, GroupPlace, Leave, PackSpec
from orchestrator.training.base_model import LoadedBase
from orchestrator.training.lanes import AdaptedLinear
from orchestrator.training.loftq import Corrections
from orchestrator.training.memory import outside_bytes, paged_bytes, pool_bytes
from orchestrator.training.pack import PackWorker

STEPS = 2
PASSES = 2  # of a step


def main() -> None:
    options = _options()
    ends = time.monotonic() + options.seconds
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    bases = Bases()
    place, rows = ALONE, options.rows
    for content in json.loads(options.cases.read_text()):
        case = Case(**content)
        if time.monotonic() > ends:
            print(f"out of time before {case}", flush=True)
            return
        if case.world_size > 1:
            place = GroupPlace(options.world_rank, case.world_size, options.init_method)
            rows = worker_rows(options.rows, options.world_rank)
        held_out = max(MICRO_BATCHES) * case.world_size  # so many that an evaluation's pass is full
        folder = options.model.parent / f"data-{case.shape}"
        shards = _shards(folder, options.model, case.tokens, held_out, case.documents)
        spec = pack_spec(case, options.model, shards, device)
        plan = expected(case, SHAPES[case.shape], device)
        fraction = 1.0 if options.uncapped else _limit(case, plan)
        row = asdict(case) | measured_row(case, spec, plan, bases, fraction, place)
        append_row(rows, row | {"command": options.command})


class Bases:
    """The base of the last case, for the next one that can use it."""

    def __init__(self) -> None:
        self._key: object = None
        self._base: LoadedBase | None = None

    def __call__(self, case: Case, worker: "SharingWorker") -> LoadedBase:
        if self._base is None or case.zero_stage is not None or self._key != case.base:
            self.drop()
            self._base = worker.load_base()
            self._key = case.base
        return self._base

    def clean(self, zero: bool) -> None:
        """Undo what a worker did to it; DeepSpeed changes too much."""
        if zero:
            self.drop()
        if self._base is not None:
            _restore(self._base.model)
        torch._dynamo.reset()
        _collect()

    def drop(self) -> None:
        self._base = None
        _collect()


class SharingWorker(PackWorker):
    """Takes its base from `bases`, and begins to count once it is there."""

    def __init__(self, spec: PackSpec, case: Case, bases: Bases, place: GroupPlace) -> None:
        super().__init__(spec, place)
        self._case = case
        self._bases = bases

    def load_base(self) -> LoadedBase:
        strategy = StrategyConfig.model_validate(self.spec.strategy)
        return super()._load_base(strategy, Corrections(self.spec.max_rank))

    def _load_base(self, strategy: StrategyConfig, corrections: Corrections) -> LoadedBase:
        base = self._bases(self._case, self)
        _collect()
        _reset_peak()
        return base


def measured_row(
    case: Case,
    spec: PackSpec,
    plan: PackMemory,
    bases: Bases,
    fraction: float,
    place: GroupPlace,
) -> Row:
    started = time.monotonic()
    lost = ""
    with host_peak() as host:
        try:
            found = _measure(case, spec, bases, fraction, place)
        except torch.OutOfMemoryError as error:
            lost = str(error).splitlines()[0]
        if lost:  # out of the handler, whose error keeps the lost worker's tensors alive
            print(f"out of memory: {lost}", flush=True)
            bases.drop()
            _reset_dynamo()
            found = _measure(case, spec, bases, 1.0, place)
    return {
        "expected_bytes": plan.total_bytes,
        "expected": asdict(plan),
        **found,
        "host_bytes": host.num_bytes,
        "host_shared_bytes": host.shared_bytes,
        "locked_bytes": _locked_bytes(),
        "out_of_memory": bool(lost),
        "took_s": round(time.monotonic() - started, 1),
        "environment": environment(),
    }


def _measure(case: Case, spec: PackSpec, bases: Bases, fraction: float, place: GroupPlace) -> Row:
    cuda = spec.device == "cuda"
    # Of the last case's recording: cuBLAS's workspaces in its pool, which torch never frees.
    left, _ = _pools()
    fraction = min(1.0, fraction + left / total) if (total := _card_bytes()) else fraction
    worker = SharingWorker(replace(spec, memory_fraction=fraction), case, bases, place)
    paged = len(paged_bytes()) if cuda else 0
    try:
        worker.load()
        before, pool, unused = _peak(), *_pools()
        _reset_peak()
        with tempfile.TemporaryDirectory() as folder:
            train(worker, list(_trials(case)), Path(folder))
        trained = worker.memory.tensor_bytes
        peak = max(before, trained + unused) - left
        managed = sum(paged_bytes()[paged:]) if cuda else 0
        # Where pages of managed memory lie, here or on the host, the driver does not say.
        outside = outside_bytes() if cuda and not paged_bytes() else None
        return {
            "torch_bytes": peak,
            "managed_bytes": managed,
            "outside_bytes": outside,
            "pool_bytes": pool - left,
            "allocated_bytes": trained,
            "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else 0,
            "ran": worker.programs.kind,
        }
    except torch.OutOfMemoryError as error:
        if place.world_size > 1:  # at once: to leave the pack would wait for the others
            print(f"out of memory: {error}", file=sys.stderr, flush=True)
            os._exit(OUT_OF_MEMORY_EXIT)
        raise
    finally:
        if hasattr(worker, "engine"):
            worker.advance([Leave(save=False)])
        worker.__dict__.clear()  # the error of a lost worker keeps it alive
        bases.clean(case.zero_stage is not None)
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)


def pack_spec(case: Case, model: Path, shards: Path, device: Device) -> PackSpec:
    quant = QuantConfig(bit_width=case.bit_width).model_dump()
    return PackSpec(
        pack=0,
        base_model=BaseModel(str(model), None, str(model), "benchmark"),
        data_place=str(shards),
        template="plain",
        quant=quant | {"compute_dtype": "bfloat16" if device == "cuda" else "float32"},
        target_modules="all-linear",
        num_slots=case.slots,
        max_rank=case.rank,
        micro_batch_size=case.micro_batch,
        gradient_checkpointing=case.recomputation,
        kept_layers=case.kept_layers,
        strategy=case.strategy.model_dump(),
        device=device,
        cpus=1,
        evaluation=EvaluationConfig(batch_size=1),
        checkpoint_every_steps=NEVER,
        dropout=case.dropout,
        dequantise_once=case.dequantise_once,
        step_program=case.program,
        world_size=case.world_size,
    )


def _trials(case: Case) -> Iterator[TrialConfig]:
    for number in range(case.slots):
        yield TrialConfig.model_validate(
            {
                "quant": {"bit_width": case.bit_width},
                "adapter": {"rank": case.rank, "dropout": 0.1 if case.dropout else 0.0},
                "optimizer": {"name": case.optimizer},
                "strategy": case.strategy.model_dump(),
                "steps": STEPS,
                "batch_size": PASSES * case.micro_batch * case.world_size,
                "micro_batch_size": case.micro_batch,
                "seed": number,
            }
        )


def _limit(case: Case, plan: PackMemory) -> float:
    """The part of this card's memory that torch would have on one that the plan just fits."""
    if not torch.cuda.is_available():
        return 1.0
    card = plan.total_bytes / BUDGET_FRACTION
    paged = plan.optimizer_bytes if case.paged else 0
    outside = context_bytes(case.strategy, case.bit_width == 8, case.world_size)
    return float(min(1.0, (card - outside - paged) / _card_bytes()))


def _card_bytes() -> int:
    """0 without one."""
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.get_device_properties(0).total_memory)


@cache
def _shards(folder: Path, model: Path, tokens: int, held_out_blocks: int, documents: int) -> Path:
    """Made by one of the workers."""
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "being-made.lock"):
        return prepare_blocks(folder, model, tokens, held_out_blocks, documents)


def _locked_bytes() -> int:
    """The most that torch's allocator of locked memory has held."""
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))


def _restore(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.base)
    for module in model.modules():
        module._compiled_call_impl = None
    model.gradient_checkpointing_disable()  # type: ignore[operator]
    if getattr(model, "_require_grads_hooks", None) or hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()  # type: ignore[operator]


def _reset_dynamo() -> None:
    torch._dynamo.reset()
    _collect()


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _pools() -> tuple[int, int]:
    return pool_bytes() if torch.cuda.is_available() else (0, 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cases", type=Path, required=True, help="JSON")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--command", required=True, help="that asked for it")
    parser.add_argument("--world-rank", type=int, default=0)
    parser.add_argument("--init-method", default="", help="where several workers meet")
    parser.add_argument("--uncapped", action="store_true", help="on the whole card")
    return parser.parse_args()


if __name__ == "__main__":
    main()

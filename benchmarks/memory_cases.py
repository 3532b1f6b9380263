"""Random configurations of a pack worker, and what the memory model expects of each.

Pure: no torch. What cannot be (see planning/compatibility.py and packs.py) is not drawn: LLM.int8
and ZeRO train one slot, and run eagerly.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from benchmarks.models import Shape
from benchmarks.recording import Row
from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.planning.load import PackLoad
from orchestrator.planning.memory import (
    HOST_OPTIMIZER_BYTES,
    OPTIMIZER_BYTES,
    PackMemory,
    estimate_memory,
)
from orchestrator.planning.shape import BaseShape, Linear
from orchestrator.records import Device, StepProgram

BIT_WIDTHS = (4, 4, 8, 16)
RANKS = (4, 8, 16, 32, 64, 128)
SLOTS = (1, 1, 2, 4, 8, 16)
MICRO_BATCHES = (1, 1, 2, 4)
TOKENS = (256, 512, 1024, 2048, 4096)
OPTIMIZERS = tuple(name for name in OPTIMIZER_BYTES if name != "deepspeed_cpu_adam")  # on a GPU
ZERO_FRACTION, SHARED_ZERO_FRACTION = 0.2, 0.7  # of packs of one worker and of several
DOCUMENTS = (1, 4, 4)  # in a block, where it makes a difference
MAX_ZERO_PARAMS = 4e9  # its base is loaded anew for each configuration
# bitsandbytes 0.50 gives no paged state back, and several cases share a process.
MAX_PAGED_BYTES = 2**30
MAX_DRAWS = 100_000
TINY_TOKENS = (16, 32)
OUT_OF_MEMORY_EXIT = 3
"""Of a worker of several, for whoever started them."""


@dataclass(frozen=True)
class Case:
    shape: str
    bit_width: Literal[4, 8, 16]
    dequantise_once: bool
    rank: int
    slots: int
    micro_batch: int
    tokens: int
    """In a block."""
    recomputation: bool
    dropout: bool
    optimizer: str
    program: StepProgram
    zero_stage: Literal[1, 2, 3] | None
    offload_optimizer: Literal["none", "cpu"]
    offload_params: Literal["none", "cpu"]
    kept_layers: int = 0
    """The last ones, which recomputation leaves out."""
    world_size: int = 1
    documents: int = 1
    """In a block: with more than one, attention under ZeRO needs a mask."""

    @property
    def strategy(self) -> StrategyConfig:
        if self.zero_stage is None:
            return StrategyConfig()
        return StrategyConfig(
            kind="zero",
            stage=self.zero_stage,
            offload_optimizer=self.offload_optimizer,
            offload_params=self.offload_params,
        )

    @property
    def paged(self) -> bool:
        return self.optimizer.startswith("paged")

    @property
    def base(self) -> tuple[object, ...]:
        """Equal for cases that can use one loaded base."""
        return (self.zero_stage is not None, self.bit_width, self.dequantise_once)


def draw_cases(
    shapes: dict[str, Shape],
    count: int,
    seed: int,
    most_bytes: int,
    device: Device,
    world_size: int = 1,
) -> list[Case]:
    """Of each shape as many, those of one worker with one base together, as they can share it; none
    is expected to need more than `most_bytes` of a worker."""
    drawn = random.Random(seed)
    cases: list[Case] = []
    names = sorted(shapes)
    for _ in range(MAX_DRAWS):
        if len(cases) == count:
            break
        name = names[len(cases) % len(names)]
        case = _draw(drawn, name, shapes[name], device, world_size)
        plan = expected(case, shapes[name], device)
        leaks = case.paged and plan.optimizer_bytes > MAX_PAGED_BYTES
        if case not in cases and plan.total_bytes <= most_bytes and not leaks:
            cases.append(case)
    if world_size > 1:
        return cases
    return sorted(cases, key=lambda case: (case.shape, str(case.base), case.paged))


def case_of(row: Row) -> Case:
    """That a recorded row measured."""
    names = {field.name for field in fields(Case)}
    return Case(**{name: value for name, value in row.items() if name in names})


def expected(case: Case, shape: Shape, device: Device) -> PackMemory:
    return estimate_memory(base_shape(shape), load_of(case, device))


def worker_rows(rows: Path, world_rank: int) -> Path:
    """Where one worker of several writes what it measures."""
    return Path(f"{rows}.{world_rank}")


def load_of(case: Case, device: Device) -> PackLoad:
    cuda = device == "cuda"
    return PackLoad(
        quant=QuantConfig(bit_width=case.bit_width),
        dtype_bytes=2 if cuda else 4,
        num_slots=case.slots,
        max_rank=case.rank,
        target_modules="all-linear",
        optimizer_bytes=OPTIMIZER_BYTES[case.optimizer],
        host_optimizer_bytes=HOST_OPTIMIZER_BYTES[case.optimizer],
        micro_batch_size=case.micro_batch,
        evaluation_batch_size=1,
        block_length=case.tokens,
        gradient_checkpointing=case.recomputation,
        dequantise_once=case.dequantise_once,
        dropout=case.dropout,
        step_program=case.program,
        cuda=cuda,
        strategy=case.strategy,
        kept_layers=case.kept_layers,
        world_size=case.world_size,
    )


def base_shape(shape: Shape) -> BaseShape:
    """As planning/shape.py reads it from the files of such a model."""
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {
        "self_attn.q_proj": (shape.hidden, query),
        "self_attn.k_proj": (shape.hidden, key_value),
        "self_attn.v_proj": (shape.hidden, key_value),
        "self_attn.o_proj": (query, shape.hidden),
        "mlp.gate_proj": (shape.hidden, shape.intermediate),
        "mlp.up_proj": (shape.hidden, shape.intermediate),
        "mlp.down_proj": (shape.intermediate, shape.hidden),
    }
    linears = tuple(
        Linear(f"model.layers.{layer}.{name}", *size)
        for layer in range(shape.layers)
        for name, size in sizes.items()
    )
    embeddings = (1 if shape.tied else 2) * shape.vocab * shape.hidden
    return BaseShape(
        shape.layers,
        shape.hidden,
        shape.intermediate,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.vocab,
        linears,
        embeddings + (2 * shape.layers + 1) * shape.hidden,
        shape.tied,
        "silu",
    )


def _draw(drawn: random.Random, name: str, shape: Shape, device: Device, world_size: int) -> Case:
    cuda = device == "cuda"
    bit_width: Literal[4, 8, 16] = drawn.choice(BIT_WIDTHS)  # type: ignore[assignment]
    fraction = ZERO_FRACTION if world_size == 1 else SHARED_ZERO_FRACTION
    zero = shape.num_linear_params < MAX_ZERO_PARAMS and drawn.random() < fraction
    stage = drawn.choice((1, 2, 3)) if zero else None
    alone = zero or bit_width == 8
    programs: Sequence[StepProgram] = ("graph", "graph", "compiled", "eager")
    recomputation = drawn.random() < 0.35
    selective = recomputation and drawn.random() < 0.5
    return Case(
        shape=name,
        bit_width=bit_width,
        dequantise_once=bit_width == 4 and not zero and drawn.random() < 0.5,
        rank=drawn.choice(RANKS),
        slots=1 if alone else drawn.choice(SLOTS),
        micro_batch=drawn.choice(MICRO_BATCHES),
        tokens=drawn.choice(TOKENS if cuda else TINY_TOKENS),
        recomputation=recomputation,
        dropout=drawn.random() < 0.15,
        optimizer=drawn.choice(OPTIMIZERS if cuda else OPTIMIZERS[:1]),
        program="eager" if alone or not cuda else drawn.choice(programs),
        zero_stage=stage,
        offload_optimizer=drawn.choice(("none", "cpu")) if zero else "none",
        # bitsandbytes keeps int8 weights where they are, whatever DeepSpeed does.
        offload_params=drawn.choice(("none", "cpu")) if stage == 3 and bit_width != 8 else "none",
        kept_layers=drawn.randrange(1, shape.layers) if selective else 0,
        world_size=world_size,
        documents=drawn.choice(DOCUMENTS) if zero else 1,
    )

"""Predict a pack worker's peak memory in closed form, before anything is loaded.

In: the base's shape and a PackLoad. Out: a PackMemory, bytes by part. Pure, no torch.

Weights, rows and lanes follow from shapes; a pass's tensors are counted in activations.py. What is
left to measure is in `Measured`, which `python -m benchmarks.planner_memory fit` fits to its rows.
Not modelled: mixtures of experts, and attention that holds its scores (an eager one, S values a
token and head; SDPA holds none).
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.planning.activations import PassMemory, pass_memory
from orchestrator.planning.bits import base_linear_bytes
from orchestrator.planning.load import MIN_ROW_VALUE_BYTES, PackLoad
from orchestrator.planning.shape import BaseShape
from orchestrator.planning.zero_memory import zero_memory

GIB = 2**30
MIB = 2**20

# bitsandbytes has two fp32 maxima for each 256 values of an 8-bit state.
EIGHT_BIT_STATE_BYTES = 2 + 2 * 4 / 256
OPTIMIZER_BYTES = {
    "adamw": 8.0,
    "adamw_8bit": EIGHT_BIT_STATE_BYTES,
    # Paged states may leave the GPU when it is full, and are on it until then.
    "paged_adamw_8bit": EIGHT_BIT_STATE_BYTES,
    "paged_adamw_32bit": 8.0,
    "deepspeed_cpu_adam": 8.0,  # on the host, where the rules want it
}
"""Of both moments, per adapter parameter, for fp32 rows."""
# On a host bitsandbytes makes fp32 copies of moments, gradient and update, all at once: packs with
# an offloaded optimizer (planner_memory.json) held 1.7 to 2 rows more with 32-bit states, and 4
# more with 8-bit ones. With torch's AdamW they held none.
HOST_OPTIMIZER_BYTES = OPTIMIZER_BYTES | {
    "adamw_8bit": EIGHT_BIT_STATE_BYTES + 16,
    "paged_adamw_8bit": EIGHT_BIT_STATE_BYTES + 16,
    "paged_adamw_32bit": 8.0 + 8,
}
"""The same with what a step takes beside them, where both are on the host."""

# cuBLAS takes a workspace for each thread and stream that multiplies: the loop's and autograd's
# thread, and a third for cuBLASLt. A graph's warm-up and its recording have a stream of their own,
# and leave one more (packs_gpu.json); two are in reserve.
WORKSPACES, GRAPH_WORKSPACES = 3, 6
# A worker process with its libraries: on a CPU, and beside a GPU with CUDA's and DeepSpeed's.
PROCESS_BYTES, GPU_PROCESS_BYTES = GIB, 1860 * MIB


def kept_states_bytes(optimizers: Iterable[str]) -> float:
    """Of a slot whose trials have these optimizers, one after another, per adapter parameter. Paged
    states stay when their trial is over (training/optimizers.py); of others there are one trial's.
    """
    names = set(optimizers)
    paged = {name for name in names if name.startswith("paged_")}
    most = max((OPTIMIZER_BYTES[name] for name in names - paged), default=0.0)
    return most + sum(OPTIMIZER_BYTES[name] for name in paged)


@dataclass(frozen=True)
class Measured:
    """What no shape tells, for one kind of GPU."""

    context_bytes: int
    """Outside torch's allocator: CUDA's context and the kernels that are loaded."""
    workspace_bytes: int
    """Of one cuBLAS workspace."""
    pool_fraction: float
    """What a graph's memory pool holds beyond the tensors in it, as a part of them."""
    group_context_bytes: int
    """More outside torch's allocator for a process group."""
    dividing_context_bytes: int
    """More where DeepSpeed itself divides a base, LLM.int8's at stage 3."""
    partners_context_bytes: int
    """More where there are other workers in the group: NCCL's channels to them."""
    reducing_context_bytes: int
    """More for these at stages 1 and 2."""


# The workspace is torch's for Hopper (CUDABlas.cpp). The peaks of packs_gpu.json leave no more than
# a hundredth for the pool. The rest was read from H200s (planner_memory.json and
# planner_memory_workers.json): MiB outside the allocator are 740 to 850; under ZeRO 1,318, LLM.int8
# at stage 3 1,772; of two workers 1,600 to 1,660, at stages 1 and 2 2,090 to 2,160, at 3 1,804.
HOPPER = Measured(
    context_bytes=840 * MIB,
    workspace_bytes=32 * MIB,
    pool_fraction=0.03,
    group_context_bytes=480 * MIB,
    dividing_context_bytes=460 * MIB,
    partners_context_bytes=490 * MIB,
    reducing_context_bytes=340 * MIB,
)


@dataclass(frozen=True)
class PackMemory:
    """Bytes that one worker needs at its peak, by part."""

    base_bytes: int
    """Frozen weights, without those that are dequantised."""
    dequantised_bytes: int
    """Values that take the place of 4-bit codes."""
    adapters_bytes: int
    """The slots' adapters and their gradients; ZeRO's copies and buckets."""
    optimizer_bytes: int
    lanes_bytes: int
    """Copies of adapters in the arithmetic's type."""
    graph_bytes: int
    """The pool of a recorded step, held from then on: a pass's activations and gradients."""
    training_bytes: int
    """A training pass, beside the pool: activations, gradients, logits."""
    evaluation_bytes: int
    """An evaluation pass, or a batch of answers, beside the pool; not held at the same time."""
    runtime_bytes: int
    """The process, or the CUDA context, and libraries' workspaces."""
    host_bytes: int = 0
    """Of the node, for a worker on a GPU: the process, what ZeRO offloads to it, or swaps to NVMe
    through it, and the input embedding of a step in place."""

    @cached_property
    def total_bytes(self) -> int:
        parts = sum(getattr(self, field.name) for field in fields(self))
        both = min(self.training_bytes, self.evaluation_bytes) + self.host_bytes
        return int(parts) - both


def estimate_memory(shape: BaseShape, load: PackLoad, measured: Measured = HOPPER) -> PackMemory:
    targets = shape.targets(load.target_modules)
    row_length = load.max_rank * sum(t.in_features + t.out_features for t in targets)
    row_length += sum(t.out_features for t in targets) if load.dora else 0
    row_value_bytes = load.row_value_bytes
    num_values = load.num_slots * row_length
    states = round(num_values * load.optimizer_bytes * row_value_bytes / MIN_ROW_VALUE_BYTES)
    pass_ = pass_memory(shape, load)
    gradients = num_values * load.lane_value_bytes
    linear_bytes = 0 if load.resident else _linear_bytes(shape, load.quant, load.dtype_bytes)
    base = shape.num_plain_params * load.dtype_bytes + linear_bytes
    on_host = 0
    if load.zero:
        zero = zero_memory(shape, load, row_length, states, linear_bytes)
        held, step, lanes = zero.adapters_bytes, zero.step_bytes, 0
        base, on_host = zero.base_bytes, zero.host_bytes
        states = zero.optimizer_bytes
    else:
        held, step = 2 * row_value_bytes * num_values, gradients
        lanes = gradients  # a lane is as large as its gradient
    if load.in_place:
        # Each layer casts its own part of the row, which the backward pass keeps; gradients are
        # added to the row layer by layer.
        lanes = gradients * load.layers_at_once(shape.num_layers) // shape.num_layers
        gradients = step = 0
    graph, training, evaluation = _passes(pass_, load, gradients, step, measured)
    if load.generated_tokens:  # through a lane of its own
        own_lane = row_length * load.lane_value_bytes
        evaluation = max(evaluation, pass_.generation_bytes + own_lane)
    if load.in_place and load.cuda and not shape.tied_embeddings:
        on_host = shape.vocab_size * shape.hidden_size * load.dtype_bytes
        base -= on_host
    return PackMemory(
        base_bytes=base,
        dequantised_bytes=shape.num_linear_params * load.dtype_bytes if load.resident else 0,
        adapters_bytes=held,
        optimizer_bytes=states,
        lanes_bytes=lanes,
        graph_bytes=graph,
        training_bytes=training,
        evaluation_bytes=evaluation,
        runtime_bytes=_runtime_bytes(load, measured),
        # A saved adapter passes through it whole.
        host_bytes=GPU_PROCESS_BYTES + row_length * row_value_bytes + on_host if load.cuda else 0,
    )


def _passes(
    pass_: PassMemory, load: PackLoad, gradients: int, step: int, measured: Measured
) -> tuple[int, int, int]:
    """Bytes of the graph's pool, and of training and evaluation beside it."""
    # The gradients of the first layers come when the last layers' activations are gone.
    backward = max(pass_.kept_bytes, gradients) + pass_.working_bytes
    if load.graph:
        # The pool keeps its memory between replays, so the loss and an evaluation come on top.
        pool = round(backward * (1 + measured.pool_fraction))
        return pool, pass_.loss_bytes, pass_.evaluated_loss_bytes
    training = max(backward, pass_.kept_for_loss_bytes + pass_.loss_bytes, step)
    return 0, training, pass_.evaluation_bytes


@lru_cache(maxsize=256)
def _linear_bytes(shape: BaseShape, quant: QuantConfig, dtype_bytes: int) -> int:
    return base_linear_bytes(quant, shape, dtype_bytes)


def _runtime_bytes(load: PackLoad, measured: Measured) -> int:
    if not load.cuda:
        return PROCESS_BYTES
    count = GRAPH_WORKSPACES if load.graph else WORKSPACES
    context = context_bytes(load.strategy, load.quant.llm_int8, load.world_size, measured)
    return context + count * measured.workspace_bytes


def context_bytes(
    strategy: StrategyConfig, llm_int8: bool, world_size: int, measured: Measured = HOPPER
) -> int:
    """Of one worker, outside torch's allocator. DeepSpeed makes a group of one worker, too."""
    zero, shared = strategy.kind == "zero", world_size > 1
    found = measured.context_bytes + (measured.group_context_bytes if zero or shared else 0)
    if shared:
        reduces = zero and strategy.stage != 3
        found += measured.partners_context_bytes
        found += measured.reducing_context_bytes if reduces else 0
    return found + (measured.dividing_context_bytes if llm_int8 and strategy.stage == 3 else 0)

"""Predict a pack worker's peak memory in closed form, before anything is loaded.

In: the base's shape and a PackLoad. Out: a PackMemory, bytes by part. Pure, no torch.

Weights, rows and lanes follow from shapes; a pass's tensors are counted in activations.py. What is
left to measure is in `Measured`, which `python -m benchmarks.planner_memory fit` fits to its rows.
Not modelled: mixtures of experts, and attention that holds its scores (an eager one, S values a
token and head; SDPA holds none).
"""

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.planning.activations import PassMemory, pass_memory
from orchestrator.planning.bits import base_linear_bytes, linear_bytes
from orchestrator.planning.load import MIN_ROW_VALUE_BYTES, PackLoad
from orchestrator.planning.shape import BaseShape
from orchestrator.planning.zero import (
    MAX_BUCKET_ELEMENTS,
    NVME_PARAM_BUFFERS,
    nvme_buffer_bytes,
)

GIB = 2**30
MIB = 2**20

# ZeRO holds the row, the layers' flat parameters, which are the lane, the fp32 partition, and its
# gradient from a step's first pass to its last; a bucket beside them. Read from the allocator's
# history on an H200 (deepspeed 0.19.8, stage_1_and_2.py, stage3.py).
ZERO_COPIES = 4
# ZeRO-3 keeps at most this many values of offloaded parameters on the GPU: DeepSpeed's default for
# stage3_max_live_parameters.
ZERO_LIVE_VALUES = 10**9

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

# cuBLAS takes a workspace for each thread and stream that multiplies: the loop's and autograd's
# thread, and a third for cuBLASLt. A graph's warm-up and its recording have a stream of their own,
# and leave one more (packs_gpu.json); two are in reserve.
WORKSPACES, GRAPH_WORKSPACES = 3, 6
# A worker process with its libraries.
PROCESS_BYTES = GIB


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
    gathering_context_bytes: int
    """The same where stage 3 gathers the base's layers from other GPUs."""


# The workspace is torch's for Hopper (CUDABlas.cpp). The peaks of packs_gpu.json leave no more than
# a hundredth for the pool. The context was read from an H200 (0.73 to 0.83 GiB; 1.29 under ZeRO
# and 1.67 where it gathers, in groups of one worker).
HOPPER = Measured(
    context_bytes=840 * MIB,
    workspace_bytes=32 * MIB,
    pool_fraction=0.03,
    group_context_bytes=480 * MIB,
    gathering_context_bytes=870 * MIB,
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
        both: int = min(self.training_bytes, self.evaluation_bytes) + self.host_bytes
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
    if load.zero:
        held, step, offloaded = _zero_bytes(row_length, load)
        lanes = 0
    else:
        held, step, offloaded = 2 * row_value_bytes * num_values, gradients, 0
        lanes = gradients  # a lane is as large as its gradient
    optimizer_away = load.strategy.offload_optimizer != "none"
    if load.in_place:
        # Each layer casts its own part of the row, which the backward pass keeps; gradients are
        # added to the row layer by layer.
        lanes = gradients * load.layers_at_once(shape.num_layers) // shape.num_layers
        gradients = step = 0
    graph, training, evaluation = _passes(pass_, load, gradients, step, measured)
    if load.generated_tokens:  # through a lane of its own
        own_lane = row_length * load.lane_value_bytes
        evaluation = max(evaluation, pass_.generation_bytes + own_lane)
    base = shape.num_plain_params * load.dtype_bytes
    base += 0 if load.resident else _linear_bytes(shape, load.quant, load.dtype_bytes)
    if load.zero and load.strategy.stage == 3 and load.quant.llm_int8:
        # bitsandbytes' state holds the codes whole, beside the parameters that ZeRO-3 has taken.
        base += shape.num_linear_params
    base_on_host = 0
    if load.strategy.offload_params != "none":
        base, base_on_host = _offloaded_base(shape, load, base)
    if load.in_place and load.cuda and not shape.tied_embeddings:
        base_on_host = shape.vocab_size * shape.hidden_size * load.dtype_bytes
        base -= base_on_host
    states_on_host = states if load.strategy.offload_optimizer == "cpu" else 0
    host = PROCESS_BYTES + offloaded + base_on_host + states_on_host
    return PackMemory(
        base_bytes=base,
        dequantised_bytes=shape.num_linear_params * load.dtype_bytes if load.resident else 0,
        adapters_bytes=held,
        optimizer_bytes=0 if optimizer_away else states,
        lanes_bytes=lanes,
        graph_bytes=graph,
        training_bytes=training,
        evaluation_bytes=evaluation,
        runtime_bytes=_runtime_bytes(load, measured),
        host_bytes=host if load.cuda else 0,
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


def _zero_bytes(row_length: int, load: PackLoad) -> tuple[int, int, int]:
    """Of ZeRO's copies of an adapter: held, in a step beside them, and on the host."""
    row = row_length * MIN_ROW_VALUE_BYTES
    bucket = min(row_length, MAX_BUCKET_ELEMENTS) * MIN_ROW_VALUE_BYTES
    stage, offload = load.strategy.stage, load.strategy.offload_optimizer
    copies, on_host = ZERO_COPIES, 0
    if offload != "none":  # stage 1 keeps the gradient until the step all the same
        copies, on_host = copies - (1 if stage == 1 else 2), 2
    if load.strategy.offload_params != "none":  # those in use are on the GPU
        on_host += 1
    host = on_host * row
    if offload == "nvme":  # in place of the partition, buffers for a group
        host += nvme_buffer_bytes(row_length) - row
    # In a step a flat copy of the gradient; while the engine starts, the partition on its way to
    # the host. Stage 3 had neither: there it is in reserve.
    return copies * row + bucket, row, host


def _offloaded_base(shape: BaseShape, load: PackLoad, base: int) -> tuple[int, int]:
    """Bytes on the GPU, where a part of the parameters is at a time, and on the host."""
    constants = 0
    if load.quant.bit_width == 4:
        constants = (
            _linear_bytes(shape, load.quant, load.dtype_bytes) - shape.num_linear_params // 2
        )
    on_host = base - constants
    if load.strategy.offload_params == "nvme":
        largest = max(
            shape.vocab_size * shape.hidden_size * load.dtype_bytes,
            max(linear_bytes(load.quant, [linear], load.dtype_bytes) for linear in shape.linears),
        )
        buffers = min(on_host, NVME_PARAM_BUFFERS * largest)
        return buffers + constants, buffers
    live = min(on_host, ZERO_LIVE_VALUES * load.dtype_bytes)
    return live + constants, on_host


@lru_cache(maxsize=256)
def _linear_bytes(shape: BaseShape, quant: QuantConfig, dtype_bytes: int) -> int:
    return base_linear_bytes(quant, shape, dtype_bytes)


def _runtime_bytes(load: PackLoad, measured: Measured) -> int:
    if not load.cuda:
        return PROCESS_BYTES
    count = GRAPH_WORKSPACES if load.graph else WORKSPACES
    context = context_bytes(load.strategy, load.in_group, measured)
    return context + count * measured.workspace_bytes


def context_bytes(
    strategy: StrategyConfig, in_group: bool = False, measured: Measured = HOPPER
) -> int:
    """Of one worker, outside torch's allocator. DeepSpeed makes a group of one worker, too; that of
    a data-parallel pack is taken to be as large, which was not measured."""
    if strategy.kind != "zero":
        return measured.context_bytes + (measured.group_context_bytes if in_group else 0)
    if strategy.stage == 3 and strategy.offload_params == "none":
        return measured.context_bytes + measured.gathering_context_bytes
    return measured.context_bytes + measured.group_context_bytes

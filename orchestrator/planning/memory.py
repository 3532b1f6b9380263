"""Predict a pack worker's peak memory in closed form, before anything is loaded.

In: the base's shape and a PackLoad. Out: a PackMemory, bytes by part. Pure, no torch.

Bytes of weights, rows and lanes follow from shapes and are exact. Bytes of activations are an
estimate for blocks built like Llama's, and the constants for them stand at the top. Not modelled:
ZeRO, mixtures of experts, and attention that holds its scores (an eager one, S values a token and
head; SDPA holds none).
"""

from dataclasses import dataclass, fields

from orchestrator.config import QuantConfig
from orchestrator.planning.shape import BaseShape, Linear, Targets

GIB = 2**30

# Bits per weight beside the 4-bit code: a constant for each 64 weights; with double quantisation 8
# bits, and 32 more for each 256 of these (QLoRA, arXiv:2305.14314, section 3).
CONSTANT_BITS = 32 / 64
DOUBLE_QUANT_CONSTANT_BITS = 8 / 64 + 32 / (64 * 256)
INT8_SCALE_BYTES = 4  # LLM.int8: one fp32 scale for each output row

# A row's value and its gradient are fp32, and fp64 under float64; a lane holds a copy of both in
# the arithmetic's type.
MIN_ROW_VALUE_BYTES = 4
ROW_COPIES = 2
LANE_COPIES = 2

OPTIMIZER_BYTES = {
    "adamw": 8,
    "adamw_8bit": 2,
    # Paged states may leave the GPU when it is full, and are on it until then.
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 8,
}
"""Of both moments, per adapter parameter, for fp32 rows."""

# Values per token and layer that the backward pass needs, of hidden size H, intermediate size I and
# attention widths: gate, up and their product; the norms' results, which are the adapters' inputs,
# and the attention's output; q, k and v. torch.compile computes cheap ones again. On an H200 a
# compiled 8B shape kept 63 thousand (this says 66), a 0.5B shape 17.8 thousand (this says 19.3).
KEPT_HIDDEN = 4
KEPT_INTERMEDIATE = 3
KEPT_ATTENTION = 1
# Without compilation every elementwise step keeps its own input: 1.55 times as much there.
EAGER_FACTOR = 1.6
# Values per token of the low-rank path, per target layer and unit of rank: its inner product, and
# the gradient of that.
KEPT_RANK = 2
# Values per token, live at once in a pass that keeps nothing: the residual, a norm's result and
# the output beside the MLP's, of which the low-rank update is one more.
PASSING_HIDDEN = 3
PASSING_INTERMEDIATE = 4
# Bytes per input value of an adapter that drops some, beside the masked copy: the mask, a bool.
MASK_BYTES = 1
# The hash behind a mask holds three int32 tensors at once, of one adapter at a time. Where
# torch.compile fuses them they cost nothing; not measured.
HASH_BYTES = 3 * 4

# The loss makes this many rows of logits at a time. Training: they and their gradient, and in a
# CPU's plain code a float32 copy. Evaluation: they, a float32 copy and its log-softmax.
LOGITS_CHUNK_TOKENS = 2048

# The CUDA context (0.5 GiB on an H200), libraries' workspaces, and what the allocator cannot reuse.
CUDA_RUNTIME_BYTES = 3 * GIB // 2
# A worker process with its libraries.
CPU_RUNTIME_BYTES = GIB


@dataclass(frozen=True)
class PackLoad:
    """What a worker holds and computes, as far as it costs memory."""

    quant: QuantConfig
    dtype_bytes: int
    """Of the arithmetic's type."""
    num_slots: int
    max_rank: int
    target_modules: Targets
    optimizer_bytes: int
    """Per adapter parameter: see OPTIMIZER_BYTES."""
    micro_batch_size: int
    """Blocks of each slot that this worker takes through one forward pass."""
    evaluation_batch_size: int
    block_length: int
    gradient_checkpointing: bool
    dequantise_once: bool
    dropout: bool
    eager: bool
    """Whether the base's blocks run without torch.compile."""
    cuda: bool


@dataclass(frozen=True)
class PackMemory:
    """Bytes that one worker needs at its peak, by part."""

    base_bytes: int
    """Frozen weights, without those that are dequantised."""
    dequantised_bytes: int
    """Values that take the place of 4-bit codes."""
    rows_bytes: int
    """The slots' adapters, gradients and optimizer states."""
    lanes_bytes: int
    """Copies of adapters and gradients in the arithmetic's type."""
    training_bytes: int
    """Activations of a training pass."""
    evaluation_bytes: int
    """Activations of an evaluation pass; not held at the same time."""
    logits_bytes: int
    runtime_bytes: int

    @property
    def total_bytes(self) -> int:
        parts: int = sum(getattr(self, field.name) for field in fields(self))
        return parts - min(self.training_bytes, self.evaluation_bytes)


def estimate_memory(shape: BaseShape, load: PackLoad) -> PackMemory:
    targets = shape.targets(load.target_modules)
    row_length = load.max_rank * sum(t.in_features + t.out_features for t in targets)
    row_value_bytes = max(MIN_ROW_VALUE_BYTES, load.dtype_bytes)
    states_bytes = load.optimizer_bytes * row_value_bytes // MIN_ROW_VALUE_BYTES
    row_bytes = ROW_COPIES * row_value_bytes + states_bytes
    resident = load.dequantise_once and load.quant.bit_width == 4
    plain_bytes = shape.num_plain_params * load.dtype_bytes
    return PackMemory(
        base_bytes=plain_bytes + (0 if resident else _linear_bytes(shape, load)),
        dequantised_bytes=shape.num_linear_params * load.dtype_bytes if resident else 0,
        rows_bytes=load.num_slots * row_length * row_bytes,
        lanes_bytes=load.num_slots * row_length * LANE_COPIES * load.dtype_bytes,
        training_bytes=_training_bytes(shape, targets, load),
        evaluation_bytes=_evaluation_bytes(shape, load),
        logits_bytes=LOGITS_CHUNK_TOKENS * shape.vocab_size * _logit_bytes(load),
        runtime_bytes=CUDA_RUNTIME_BYTES if load.cuda else CPU_RUNTIME_BYTES,
    )


def _linear_bytes(shape: BaseShape, load: PackLoad) -> int:
    """Of the linear layers at their bit-width, constants included."""
    if load.quant.bit_width == 16:
        return shape.num_linear_params * load.dtype_bytes
    if load.quant.bit_width == 8:
        scales = sum(linear.out_features for linear in shape.linears)
        return shape.num_linear_params + scales * INT8_SCALE_BYTES
    constants = DOUBLE_QUANT_CONSTANT_BITS if load.quant.double_quant else CONSTANT_BITS
    return round(shape.num_linear_params * (4 + constants) / 8)


def _training_bytes(shape: BaseShape, targets: tuple[Linear, ...], load: PackLoad) -> int:
    tokens = load.num_slots * load.micro_batch_size * load.block_length
    layer = _kept_values(shape, targets, load)
    if load.gradient_checkpointing:  # each layer's input, and the whole of one layer at a time
        values = shape.num_layers * shape.hidden_size + layer
    else:
        values = shape.num_layers * layer
    hashes = HASH_BYTES * max(t.in_features for t in targets) if load.dropout and targets else 0
    return round(tokens * (values * load.dtype_bytes + hashes))


def _kept_values(shape: BaseShape, targets: tuple[Linear, ...], load: PackLoad) -> float:
    """Values per token that one layer's backward pass needs."""
    attention = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    values: float = (
        KEPT_HIDDEN * shape.hidden_size
        + KEPT_INTERMEDIATE * shape.intermediate_size
        + KEPT_ATTENTION * attention
    )
    values *= EAGER_FACTOR if load.eager else 1
    values += KEPT_RANK * load.max_rank * len(targets) / shape.num_layers
    if load.dropout:  # each adapter's input once more, masked, and the mask
        inputs = sum(target.in_features for target in targets) / shape.num_layers
        values += inputs * (1 + MASK_BYTES / load.dtype_bytes)
    return values


def _evaluation_bytes(shape: BaseShape, load: PackLoad) -> int:
    # A compiled program has one shape: it evaluates as many blocks as it trains.
    blocks = load.evaluation_batch_size if load.eager else load.micro_batch_size
    tokens = load.num_slots * blocks * load.block_length
    values = PASSING_HIDDEN * shape.hidden_size + PASSING_INTERMEDIATE * shape.intermediate_size
    return tokens * values * load.dtype_bytes


def _logit_bytes(load: PackLoad) -> int:
    training = 2 * load.dtype_bytes + (0 if load.cuda else 4)
    evaluation = load.dtype_bytes + 4 + 4
    return max(training, evaluation)

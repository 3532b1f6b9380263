"""Bytes of a pass's tensors, by what autograd keeps and what lives at once at its peak.

In: the base's shape and a PackLoad. Out: a PassMemory. Pure, no torch.

Counted tensor by tensor for blocks built like Llama's (transformers 5.23, torch 2.13), per token,
with H hidden size, I intermediate size, Q and KV the widths of all query and of all key and value
heads, R the rank. Attention's backward pass is left out: by then the MLP's tensors of its layer,
which are larger, are gone.
"""

from collections import Counter
from dataclasses import dataclass

from orchestrator.planning.load import PackLoad
from orchestrator.planning.shape import BaseShape, Linear

# Kept by a compiled block: its input and the residual in its middle (2 H), both norms' results
# where they are an adapter's input (H each), gate and up (2 I), and their product where it is one
# (I). AOTAutograd makes the rest again from these.
COMPILED_HIDDEN, COMPILED_INTERMEDIATE = 2, 2
# Kept by an eager block: each norm's input in fp32 (2 * 2 H), gate, its activation and up (3 I).
EAGER_HIDDEN, EAGER_INTERMEDIATE = 4, 3
# The MLP's backward pass of one layer: gradients of the product, of gate and of up, beside those of
# the residual, the last hidden states and the loss's. In eager blocks what is kept of the layer
# goes as these come: one less. Recomputed packs on an H200 held 2 I less than with one more.
BACKWARD_HIDDEN = 3
COMPILED_BACKWARD_INTERMEDIATE, EAGER_BACKWARD_INTERMEDIATE = 3, 2
# A pass that keeps nothing: residual, norm and output; base product and update of gate and of up.
PASSING_HIDDEN, PASSING_INTERMEDIATE = 3, 4
# Of MLPs whose adapters are joined, see training/gated_mlp.py: the product is not kept; three sums
# over tokens, of B of gate and of up and A of down, are fp32. Where programs share a lane, each has
# its own, and there are as many as fill a card.
JOINED_LAYERS = ("gate_proj", "up_proj", "down_proj")
JOINED_MOST_RANK = 64  # the kernels' sums for larger ones would not stay in registers
JOINED_SUM_BYTES = 3 * 4
JOINED_PARTIAL_VALUES = 2 * 4 * 132 * 64  # per rank: gated_mlp_kernels' programs and columns
# The same in attention under a mask: residual and norm (2 H); queries, keys and values repeated for
# all query heads, and the result (4 Q), beside keys and values as they were. torch's kernel makes
# values of the mask's bools, and again in rows whose length is a multiple of 16.
ATTENDING_HIDDEN, ATTENDING_QUERY, MASK_COPIES = 2, 4, 2
# While the loss is computed: the last norm's fp32 input (2 H), the hidden states, those with a
# label, and their gradient. While a loss is only evaluated: the second and the third.
LOSS_HIDDEN, EVALUATED_HIDDEN = 5, 2

# DoRA, of an adapter's output: while its gradient is made by eager code, that by the layer's output
# in the rows' type, and its product with what the factors multiply.
EAGER_DORA_WIDE = 2
# Of the product of A's rows with a frozen layer, in the rows' type: a copy of it, (A^T A) B, and
# the product of one of these with B.
LENGTHS_WIDE = 3

# LLM.int8, of a layer's input while its product is made: the input in fp16, and rounded. In a layer
# that is computed again, beside all that it keeps.
ROUNDED_BYTES = 2 + 1

# Bytes per input value of an adapter that drops some, beside the masked copy: the mask, a bool.
MASK_BYTES = 1
# The hash behind a mask holds three int32 tensors at once, of one adapter at a time.
HASH_BYTES = 3 * 4

# training/loss.py makes this many rows of logits at a time.
LOGITS_CHUNK_TOKENS = 2048
# Of a logit while it is evaluated: a copy in at least float32, and its log-softmax.
EVALUATED_COPIES = 2
# Of a logit in weighted_losses, the plain code of a CPU, beside it: exp, the labels' places in the
# same type, their difference, and the places as bools.
PLAIN_LOSS_COPIES = 3
DEQUANTISED_ABSMAX_BYTES = 4 / 64  # per value: double quantisation's constants, made again

# Adapters that read the same tensor, by the last part of a layer's name. What o_proj reads is kept
# by attention. A name that is not here is taken to have an input of its own.
INPUTS = {
    "q_proj": "norm of attention",
    "k_proj": "norm of attention",
    "v_proj": "norm of attention",
    "qkv_proj": "norm of attention",
    "gate_proj": "norm of MLP",
    "up_proj": "norm of MLP",
    "gate_up_proj": "norm of MLP",
}
KEPT_BY_ATTENTION = "o_proj"


@dataclass(frozen=True)
class PassMemory:
    """Bytes of one worker."""

    kept_bytes: int
    """What the forward pass leaves for the backward pass; where all layers are computed again,
    and of one of them."""
    kept_for_loss_bytes: int
    """The same without that one, which is not there yet while the loss is computed."""
    working_bytes: int
    """Beside it while the backward pass begins, where most is held."""
    loss_bytes: int
    """Beside it while the loss is computed."""
    evaluation_bytes: int
    """The whole of an evaluation pass."""
    evaluated_loss_bytes: int
    """Of an evaluation's loss alone."""
    generation_bytes: int
    """The whole of a batch of answers' generation; 0 where none is generated."""


def pass_memory(shape: BaseShape, load: PackLoad) -> PassMemory:
    targets = shape.targets(load.target_modules)
    tokens, value = load.training_tokens, load.dtype_bytes
    hidden, wide = shape.hidden_size, shape.intermediate_size
    backward = EAGER_BACKWARD_INTERMEDIATE if load.eager else COMPILED_BACKWARD_INTERMEDIATE
    weight = _weight_bytes(shape, load)
    working: float = tokens * value * (BACKWARD_HIDDEN * hidden + (backward - 1) * wide)
    working += max(tokens * value * wide, weight)  # not at the same time
    if load.quant.llm_int8 and load.gradient_checkpointing and load.cuda:
        working += tokens * ROUNDED_BYTES * max(linear.in_features for linear in shape.linears)
    dora_kept, dora_working = _dora_bytes(shape, targets, load) if load.dora else (0, 0)
    # A compiled block makes its masks in the kernels that use them.
    hashing = load.dropout and load.eager and targets
    hashes = HASH_BYTES * max(t.in_features for t in targets) if hashing else 0
    joined = joins_mlp(shape, load)
    if joined:
        values = max(load.num_slots * wide, JOINED_PARTIAL_VALUES)
        working += JOINED_SUM_BYTES * load.max_rank * values
    passing = PASSING_HIDDEN * hidden + PASSING_INTERMEDIATE * wide
    evaluating = passing - (wide if joined else 0)  # gate, up and their product
    evaluated = load.evaluation_tokens
    evaluated_loss = EVALUATED_HIDDEN * evaluated * hidden * value
    evaluated_loss += _chunk(evaluated) * shape.vocab_size * EVALUATED_COPIES * max(4, value)
    layers, recomputed = shape.num_layers, load.recomputed_layers(shape.num_layers)
    inputs = recomputed * hidden * value
    layer = _layer_bytes(shape, targets, load)
    return PassMemory(
        kept_bytes=round(tokens * (inputs + load.layers_at_once(layers) * layer)) + dora_kept,
        kept_for_loss_bytes=round(tokens * (inputs + (layers - recomputed) * layer)) + dora_kept,
        working_bytes=round(working + tokens * hashes) + dora_working,
        loss_bytes=LOSS_HIDDEN * tokens * hidden * value + _loss_logits_bytes(shape, load),
        evaluation_bytes=max(round(evaluated * evaluating * value + weight), evaluated_loss),
        evaluated_loss_bytes=evaluated_loss,
        generation_bytes=round(_generation_bytes(shape, load, passing)),
    )


def joins_mlp(shape: BaseShape, load: PackLoad) -> bool:
    """Whether the adapters of the base's MLPs are one operator with what is between them."""
    if load.eager or load.dora or load.dropout or not load.cuda or load.dtype_bytes != 2:
        return False
    if shape.activation != "silu" or load.max_rank > JOINED_MOST_RANK:
        return False
    targets = shape.targets(load.target_modules)
    leaves = Counter(target.name.rpartition(".")[2] for target in targets)
    return all(leaves[name] == shape.num_layers for name in JOINED_LAYERS)


def _generation_bytes(shape: BaseShape, load: PackLoad, passing: int) -> float:
    """A pass over a batch's prompts, beside the keys and values of these and of their answers
    (training/task.py). The logits of the last tokens are less than a chunk of an evaluation's."""
    if not load.generated_tokens:
        return 0.0
    length, value, batch = load.block_length, load.dtype_bytes, load.generation_batch_size
    width = shape.num_kv_heads * shape.head_dim
    # One layer's are there twice while those of a token are put at their end.
    cache = (length + load.generated_tokens) * 2 * (shape.num_layers + 1) * width * value
    token: float = passing * value
    if batch > 1:  # padded, and so masked: transformers repeats keys and values for all heads
        query = shape.num_heads * shape.head_dim
        attending = ATTENDING_HIDDEN * shape.hidden_size + ATTENDING_QUERY * query + 2 * width
        token = max(token, (attending + MASK_COPIES * length) * value) + MASK_BYTES * length
    return batch * (cache + length * token) + _weight_bytes(shape, load)


def _layer_bytes(shape: BaseShape, targets: tuple[Linear, ...], load: PackLoad) -> float:
    """Of one token in one layer."""
    query = shape.num_heads * shape.head_dim
    key_value = 2 * shape.num_kv_heads * shape.head_dim
    if not load.by_document:
        key_value = 2 * query  # transformers repeats keys and values where there is a mask
    values: float = (EAGER_HIDDEN if load.eager else COMPILED_HIDDEN) * shape.hidden_size
    values += (EAGER_INTERMEDIATE if load.eager else COMPILED_INTERMEDIATE) * (
        shape.intermediate_size
    )
    values += 2 * query + key_value  # what the flash kernel takes, and its result
    values += load.max_rank * len(targets) / shape.num_layers  # inner products
    if not load.by_document:
        values += load.block_length  # its mask, as values that are added to the scores
    if load.dora:  # what the factors multiply
        values += sum(target.out_features for target in targets) / shape.num_layers
    if load.dropout:  # each adapter's input, masked, and the mask
        read = sum(target.in_features for target in targets)
        values += read / shape.num_layers * (1 + MASK_BYTES / load.dtype_bytes)
    else:
        values += _adapter_inputs(targets) / shape.num_layers
        values -= shape.intermediate_size if joins_mlp(shape, load) else 0
    return values * load.dtype_bytes


def _dora_bytes(shape: BaseShape, targets: tuple[Linear, ...], load: PackLoad) -> tuple[int, int]:
    """Kept by a pass, beside what its tokens keep: A and B in the arithmetic's type, where that is
    not the lanes'. And the largest layer's working memory."""
    rank, wide = load.num_slots * load.max_rank, load.row_value_bytes
    layers = [t.in_features + t.out_features for t in targets]
    copies = 0
    if wide != load.dtype_bytes and layers:
        kept = 1 - load.recomputed_layers(shape.num_layers) / shape.num_layers
        copies = rank * load.dtype_bytes * max(max(layers), round(kept * sum(layers)))
    largest = max((t.out_features for t in targets), default=0)
    working = rank * largest * (load.dtype_bytes + LENGTHS_WIDE * wide)
    if load.eager:
        working += load.training_tokens * largest * EAGER_DORA_WIDE * wide
    return copies, working


def _adapter_inputs(targets: tuple[Linear, ...]) -> int:
    """Values per token of the tensors that adapters read, over all layers, each counted once."""
    widths: dict[tuple[str, str], int] = {}
    for target in targets:
        parent, _, leaf = target.name.rpartition(".")
        if leaf != KEPT_BY_ATTENTION:
            widths[parent, INPUTS.get(leaf, leaf)] = target.in_features
    return sum(widths.values())


def _weight_bytes(shape: BaseShape, load: PackLoad) -> float:
    """Of the largest layer's values, where each use makes them again (frozen.py; for LLM.int8 the
    backward pass of bitsandbytes' MatMul8bitLt)."""
    if load.resident or not (load.quant.packed or load.quant.llm_int8):
        return 0.0
    absmax = DEQUANTISED_ABSMAX_BYTES if load.quant.packed else 0.0
    largest = max((linear.num_params for linear in shape.linears), default=0)
    return largest * (load.dtype_bytes + absmax)


def _loss_logits_bytes(shape: BaseShape, load: PackLoad) -> int:
    tokens = load.training_tokens
    value = load.dtype_bytes
    # Logits and their gradient; while a second chunk is made, those of the one before as well.
    per_logit = 2 * value if tokens <= LOGITS_CHUNK_TOKENS else 3 * value
    if not load.cuda or value == 8:
        exact = max(4, value)
        per_logit += PLAIN_LOSS_COPIES * exact + (exact if value < exact else 0) + MASK_BYTES
    return _chunk(tokens) * shape.vocab_size * per_logit


def _chunk(tokens: int) -> int:
    return min(tokens, LOGITS_CHUNK_TOKENS)

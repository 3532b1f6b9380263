"""How long a step takes, in closed form: what the schedule that is forecast rests on.

In: the base's shape, a PackLoad and the GPU's rates. Out: seconds. Pure, no torch.

A pass is bound by the GPU, by the launching CPU, or both in turn. The GPU's part: products at a
part of its rate, and attention's at a smaller one; the weights, read once forward and once backward
however few tokens there are, partly while products are computed; the elementwise steps, which move
each kept activation some times; the slots' rows. The constants were fitted, within 4 %, to a run of
the 25 packs of benchmarks/results/packs_gpu.json and engine_single.json, in graphs (H200; 0.5B,
1.5B and 8B, 256 to 65,536 tokens, 16 bits and 4 dequantised once). The run recorded there now, on
another such card, they give within 4.7 %, for the same pack differs by up to 5 % from one machine
to another. Other GPUs are taken to reach the same parts of their data sheets' rates: not measured.
"""

from dataclasses import dataclass, replace

from orchestrator.planning.activations import pass_memory
from orchestrator.planning.gpus import Gpu
from orchestrator.planning.load import PackLoad
from orchestrator.planning.shape import BaseShape
from orchestrator.records import StepProgram

# Of the data sheet's 989 TFLOP/s, of which a square product reached 773 to 802.
PRODUCT_FRACTION = 0.743
ATTENTION_FRACTION = 0.28
# Products and the reading of weights are at one time where neither is much the longer: their times
# count as by a norm of this order (1: one after the other; without end: the longer one alone).
OVERLAP_ORDER = 1.36
# Times that the bytes of kept activations are moved, by all the elementwise steps of a pass.
ACTIVATION_MOVES = 14.3
# What a step takes however few tokens: launches between its graphs, small kernels in them.
GAP_S = 0.0063
# A step's work on the CPU: replaying graphs, or launching each layer's kernels one by one. The
# latter was twice as much on another machine with such a card.
GRAPH_CPU_S = 0.0079
LAYER_CPU_S: dict[StepProgram, float] = {"compiled": 0.0019, "eager": 0.0039, "in_place": 0.0039}
# Bytes moved for an adapter's value in a step, beside its optimizer's states, which are read and
# written: the value, its copy in the lane, and its gradient, which is gathered, measured, clipped.
ROW_BYTES_MOVED = 80
# Bytes moved to make one value of a 4-bit code: the code, the value written, and read again.
DEQUANTISED_BYTES_MOVED = 4.5
# LLM.int8's products and conversions, against a 16-bit product. Not measured.
INT8_FACTOR = 2.0

# From the rows' load_s and warm_up_s: a worker's start, each GB of base, and a recorded program.
START_S = 15.0
LOAD_S_PER_GB = 0.5
BUILD_S: dict[StepProgram, float] = {"eager": 1.0, "in_place": 1.0, "compiled": 8.0, "graph": 10.0}
RECOMPUTED_FORWARD = 0.5  # of a pass whose weights take no gradient: the forward half, once more


@dataclass(frozen=True)
class StepTime:
    """Of one micro-batch of all slots."""

    pass_s: float
    step_s: float
    """What the optimizer steps add where each slot's step is complete."""


def step_time(shape: BaseShape, load: PackLoad, gpu: Gpu) -> StepTime:
    tokens = load.training_tokens
    bandwidth = gpu.bandwidth_tb_per_s * 1e12
    once = 1 + RECOMPUTED_FORWARD * load.recomputed_layers(shape.num_layers) / shape.num_layers
    products = 4 * shape.num_linear_params * once * (INT8_FACTOR if _int8(load) else 1)
    products += 4 * shape.hidden_size * shape.vocab_size
    width = shape.num_heads * shape.head_dim
    attention = 6 * shape.num_layers * width * load.block_length * once
    passes = 2 * once  # forward and backward
    lengths = 0.0
    if load.dora:  # not measured: A's rows in each forward pass, and what is dropped in both
        forwards = 2 * once - 1
        lengths = 2 * shape.num_linear_params * load.num_slots * load.max_rank * forwards
        products += 4 * shape.num_linear_params * once if load.dropout else 0
        passes += forwards + (2 * once if load.dropout else 0)
    rate = gpu.tflops * 1e12
    compute_s = (tokens * products + lengths) / (PRODUCT_FRACTION * rate)
    compute_s += tokens * attention / (ATTENTION_FRACTION * rate)
    kept = pass_memory(shape, _keeping(load)).kept_bytes
    moves_s = kept * ACTIVATION_MOVES * once / bandwidth
    weights_s = passes * shape.num_linear_params * _bytes_per_weight(load) / bandwidth
    base_s = (compute_s**OVERLAP_ORDER + weights_s**OVERLAP_ORDER) ** (1 / OVERLAP_ORDER)
    gpu_s = base_s + moves_s + GAP_S
    adapter = load.max_rank * sum(
        target.in_features + target.out_features for target in shape.targets(load.target_modules)
    )
    moved = load.num_slots * adapter * (ROW_BYTES_MOVED + 2 * load.optimizer_bytes)
    return StepTime(max(gpu_s, _cpu_s(shape, load)), moved / bandwidth)


def start_time(shape: BaseShape, load: PackLoad) -> float:
    """Seconds from a pack's start until it trains."""
    gigabytes = shape.num_params * load.dtype_bytes / 1e9
    return START_S + LOAD_S_PER_GB * gigabytes + BUILD_S[load.step_program]


def tokens_per_s(shape: BaseShape, load: PackLoad, gpu: Gpu) -> float:
    """Of all slots together, each step one pass."""
    time = step_time(shape, load, gpu)
    return load.training_tokens / (time.pass_s + time.step_s)


def _cpu_s(shape: BaseShape, load: PackLoad) -> float:
    if load.step_program == "graph":
        return GRAPH_CPU_S
    return LAYER_CPU_S[load.step_program] * shape.num_layers


def _keeping(load: PackLoad) -> PackLoad:
    """What recomputation does not keep is moved all the same."""
    return replace(load, gradient_checkpointing=False)


def _bytes_per_weight(load: PackLoad) -> float:
    if load.quant.packed and not load.resident:
        return DEQUANTISED_BYTES_MOVED
    return load.dtype_bytes


def _int8(load: PackLoad) -> bool:
    return load.quant.llm_int8

"""What DeepSpeed's ZeRO holds of one worker, on its GPU and on its host, in closed form.

In: the base's shape, a PackLoad under ZeRO, and sizes that memory.py has counted. Out: a
ZeroMemory. Pure, no torch.

Counted in deepspeed 0.19.8 (stage_1_and_2.py, stage3.py, partition_parameters.py,
partitioned_param_coordinator.py). The workers of a pack divide what is called a part here. Packs of
one were measured (planner_memory.json); of two, these copies were among the live tensors on a CPU.
"""

from dataclasses import dataclass

from orchestrator.planning.bits import LLM_INT8_SCALE_BYTES
from orchestrator.planning.load import MIN_ROW_VALUE_BYTES, PackLoad
from orchestrator.planning.shape import BaseShape
from orchestrator.planning.zero import (
    MAX_BUCKET_ELEMENTS,
    NVME_PARAM_BUFFERS,
    nvme_buffer_bytes,
)

# DeepSpeed's defaults for stage3_max_live_parameters and stage3_prefetch_bucket_size. Each module
# that is entered fetches another bucket ahead, and what is used again within 10^9 values stays
# (stage3_max_reuse_distance): so the GPU has as many values gathered as it may, and one parameter
# more, which was begun below the limit. Two workers on CPUs, these scaled down to their base, held
# 4 to 10 % less than is counted by that.
LIVE_VALUES = 10**9
PREFETCH_VALUES = 5 * 10**7


@dataclass(frozen=True)
class ZeroMemory:
    """Bytes of one worker."""

    adapters_bytes: int
    """Copies of the adapter and its gradient, and a bucket."""
    step_bytes: int
    """Beside them in a step."""
    base_bytes: int
    """On the GPU."""
    optimizer_bytes: int
    """On the GPU."""
    host_bytes: int


def zero_memory(
    shape: BaseShape, load: PackLoad, row_length: int, states: int, linear_bytes: int
) -> ZeroMemory:
    """`row_length` values has the adapter, and its optimizer `states` bytes; `linear_bytes` take
    the base's linear layers at their bits."""
    row = row_length * MIN_ROW_VALUE_BYTES
    held, step = _adapter_bytes(row, load)
    constants = _constants_bytes(shape, load, linear_bytes)
    whole = shape.num_plain_params * load.dtype_bytes + linear_bytes
    base, base_on_host = _base_bytes(shape, load, whole, constants)
    offloaded = load.strategy.offload_optimizer != "none"
    return ZeroMemory(
        adapters_bytes=held,
        step_bytes=step,
        base_bytes=base,
        optimizer_bytes=0 if offloaded else _part(states, load),
        host_bytes=base_on_host + _adapter_on_host(row_length, load),
    )


def _adapter_bytes(row: int, load: PackLoad) -> tuple[int, int]:
    """Held, and in a step beside that."""
    stage, shared = load.strategy.stage, load.world_size > 1
    part, bucket = _part(row, load), min(row, MAX_BUCKET_ELEMENTS * MIN_ROW_VALUE_BYTES)
    # The slot's row, and the layers' parameters, which are the lane: flat at stages 1 and 2, as
    # they are gathered at stage 3, beside the part that they are gathered from.
    held = 2 * row
    held += part if stage == 3 and shared and load.strategy.offload_params == "none" else 0
    if load.strategy.offload_optimizer == "none":
        held += part  # in fp32, of which the optimizer makes its steps
    if stage == 1:
        held += row  # autograd's own gradient until the step
    elif load.strategy.offload_optimizer == "none":
        held += part  # the gradient's, from a step's first pass to its last
    # In a step a flat copy of the gradient's part; while the engine starts, the partition on its
    # way to the host. Stage 3 had neither in groups of one worker: there it is in reserve. Several
    # have the bucket once more while it is reduced; at stage 1 in place of the gradient.
    return held + bucket, part + (bucket if shared and stage != 1 else 0)


def _adapter_on_host(row_length: int, load: PackLoad) -> int:
    part_length = _part(row_length, load)
    part = part_length * MIN_ROW_VALUE_BYTES
    locked = _locked_bytes(part)
    on_host = {"none": 0, "nvme": part, "cpu": 2 * locked}[load.strategy.offload_params]
    if load.strategy.offload_optimizer == "nvme":  # a gradient, and buffers for a group
        return on_host + part + nvme_buffer_bytes(part_length)
    if load.strategy.offload_optimizer == "cpu":
        on_host += round(part_length * load.host_optimizer_bytes)
        if load.strategy.stage == 3:  # the partition, and locked the gradient and the passes' sum
            on_host += part + 2 * locked
        else:  # all locked; a buffer in the parameters' type, and the passes' sum at stage 2
            on_host += (3 if load.strategy.stage == 1 else 4) * locked
    return on_host


def _base_bytes(shape: BaseShape, load: PackLoad, whole: int, constants: int) -> tuple[int, int]:
    """On the GPU and on the host."""
    if load.strategy.stage != 3:
        return whole, 0
    taken, beside = whole - constants, constants
    if load.quant.llm_int8:  # bitsandbytes' state holds the codes whole, beside the parameters
        beside += shape.num_linear_params
    sizes = [_stored_bytes(linear.num_params, load) for linear in shape.linears]
    largest = max(shape.vocab_size * shape.hidden_size * load.dtype_bytes, *sizes)
    if load.strategy.offload_params == "nvme":
        buffers = min(taken, NVME_PARAM_BUFFERS * largest)
        return buffers + beside, _part(buffers, load)
    num_values = shape.num_plain_params + _num_stored(shape, load)
    value_bytes = taken / num_values
    gathered = min(taken, round(LIVE_VALUES * value_bytes) + largest)
    if load.world_size > 1:  # a bucket is gathered flat, and cut into parameters at its first use
        gathered += min(taken, round(PREFETCH_VALUES * value_bytes) + max(sizes))
    if load.strategy.offload_params == "cpu":
        plain = _part(shape.num_plain_params * load.dtype_bytes, load)
        parts = (_locked_bytes(_part(size, load)) for size in sizes)
        return gathered + beside, _locked_bytes(plain) + sum(parts)
    alone = load.world_size == 1  # then a parameter is its own partition
    held = beside + (taken if alone else _part(taken, load) + gathered)
    # LLM.int8's is loaded whole, others in parts: training/partitioner.py.
    return max(held, whole) if load.quant.llm_int8 else held, 0


def _constants_bytes(shape: BaseShape, load: PackLoad, linear_bytes: int) -> int:
    """Of quantisation, which are no parameters: nobody divides them."""
    if load.quant.llm_int8:
        return LLM_INT8_SCALE_BYTES * sum(linear.out_features for linear in shape.linears)
    if load.quant.bit_width == 4:
        return linear_bytes - shape.num_linear_params // 2
    return 0


def _stored_bytes(num_params: int, load: PackLoad) -> int:
    """Of a layer's parameter, as DeepSpeed moves it."""
    if load.quant.llm_int8:
        return num_params
    return num_params // 2 if load.quant.bit_width == 4 else num_params * load.dtype_bytes


def _num_stored(shape: BaseShape, load: PackLoad) -> int:
    """Values of the linear layers' parameters: 4-bit codes are packed into the base's type."""
    if load.quant.llm_int8:
        return shape.num_linear_params
    return _stored_bytes(shape.num_linear_params, load) // load.dtype_bytes


def _part(num_bytes: int, load: PackLoad) -> int:
    """One worker's."""
    return -(-num_bytes // load.world_size)


def _locked_bytes(num_bytes: int) -> int:
    """Of locked memory: torch takes the next power of two (CachingHostAllocator.h)."""
    return 1 << max(0, num_bytes - 1).bit_length()

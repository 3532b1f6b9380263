"""The memory model of packs under ZeRO, alone and shared by several workers."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.planning.memory import HOPPER, HOST_OPTIMIZER_BYTES, PackMemory, estimate_memory
from tests.sweeps import LLAMA_8B, LLAMA_HALF_B
from tests.unit.test_memory import EAGER

ROW = 41_943_040 * 4  # rank 16, all linear layers of Llama 3 8B, fp32
LOCKED = 2**28  # what torch locks for a row of 168 MB
EMBEDDINGS = 2 * 128_256 * 4096
LINEARS = LLAMA_8B.num_linear_params
PLAIN_BYTES = LLAMA_8B.num_plain_params * 2


def memory_of(
    stage: int,
    world_size: int = 1,
    bit_width: int = 16,
    host_optimizer_bytes: float = 8,
    **strategy: Any,
) -> PackMemory:
    load = replace(
        EAGER,
        host_optimizer_bytes=host_optimizer_bytes,
        quant=QuantConfig.model_validate({"bit_width": bit_width}),
        strategy=StrategyConfig.model_validate({"kind": "zero", "stage": stage} | strategy),
        world_size=world_size,
    )
    return estimate_memory(LLAMA_8B, load)


def test_zero_holds_copies_of_the_adapter_and_offloads_them_to_the_host() -> None:
    memory = memory_of(2)
    assert memory.adapters_bytes == 5 * ROW  # with the partition's gradient, and a bucket
    assert (memory.lanes_bytes, memory.optimizer_bytes) == (0, 2 * ROW)
    offloading = memory_of(2, offload_optimizer="cpu")
    assert (offloading.adapters_bytes, offloading.optimizer_bytes) == (3 * ROW, 0)
    # Partition, its copy in the parameters' type, gradient and the passes' sum; both moments.
    assert offloading.host_bytes - memory.host_bytes == 4 * LOCKED + 2 * ROW
    keeping = memory_of(1, offload_optimizer="cpu")
    assert keeping.adapters_bytes == 4 * ROW  # its gradient stays until the step
    gathering = memory_of(3, offload_optimizer="cpu")
    assert gathering.host_bytes - memory.host_bytes == 2 * LOCKED + 3 * ROW


@pytest.mark.parametrize(
    ("stage", "whole", "parts"),
    [
        (1, 4, 1),  # row, parameters, gradient and bucket; the fp32 partition
        (2, 3, 2),  # the gradient is divided, too
        (3, 3, 3),  # and the parameters, which are gathered all the same
    ],
)
def test_workers_of_a_pack_divide_what_their_stage_divides(
    stage: int, whole: int, parts: int
) -> None:
    memory = memory_of(stage, world_size=4)
    assert memory.adapters_bytes == whole * ROW + parts * ROW // 4
    assert memory.optimizer_bytes == 2 * ROW // 4
    offloading = memory_of(stage, world_size=4, offload_optimizer="cpu")
    left = 0 if stage == 1 else 1
    assert offloading.adapters_bytes == memory.adapters_bytes - (1 + left) * ROW // 4
    on_host = {1: 2 * ROW + 3 * LOCKED, 2: 2 * ROW + 4 * LOCKED, 3: 3 * ROW + 2 * LOCKED}[stage]
    assert offloading.host_bytes - memory.host_bytes == on_host // 4


def test_below_stage_3_every_worker_has_the_whole_base() -> None:
    assert memory_of(2, world_size=4).base_bytes == memory_of(2).base_bytes


@pytest.mark.parametrize(
    ("bit_width", "code_bytes", "beside"),
    [
        (16, 2.0, 0),
        (4, 0.5, 0.127 / 8 * LINEARS),  # constants, which are no parameters
        (8, 1.0, LINEARS + 4 * 1_343_488),  # bitsandbytes' whole codes, and a scale for each row
    ],
)
def test_at_stage_3_workers_hold_their_part_and_what_is_gathered(
    bit_width: int, code_bytes: float, beside: float
) -> None:
    two, four = (memory_of(3, count, bit_width).base_bytes for count in (2, 4))
    divided = PLAIN_BYTES + code_bytes * LINEARS
    assert two - four == pytest.approx(divided / 4, rel=1e-6)
    value_bytes = divided / (divided / 2 if bit_width != 8 else LLAMA_8B.num_params)
    bucket = 5 * 10**7 * value_bytes + 4096 * 14336 * code_bytes
    gathered = 10**9 * value_bytes + EMBEDDINGS + bucket
    assert four == pytest.approx(divided / 4 + gathered + beside, rel=1e-3)


def test_a_small_base_is_gathered_whole_and_no_more() -> None:
    strategy = StrategyConfig(kind="zero", stage=3)
    load = replace(EAGER, strategy=strategy)
    alone, pair = (
        estimate_memory(LLAMA_HALF_B, replace(load, world_size=count)).base_bytes
        for count in (1, 2)
    )
    bucket = 2 * (5 * 10**7 + max(linear.num_params for linear in LLAMA_HALF_B.linears))
    assert pair == alone + alone // 2 + bucket


def test_llm_int8s_base_is_loaded_whole_however_many_share_it() -> None:
    shared = memory_of(3, world_size=64, bit_width=8).base_bytes
    assert shared >= memory_of(2, bit_width=8).base_bytes


def test_what_a_worker_takes_outside_torchs_allocator_depends_on_its_group() -> None:
    alone = estimate_memory(LLAMA_8B, EAGER).runtime_bytes
    group, partners = HOPPER.group_context_bytes, HOPPER.partners_context_bytes
    assert [memory_of(stage).runtime_bytes - alone for stage in (1, 2, 3)] == [group] * 3
    eight = memory_of(3, bit_width=8).runtime_bytes
    assert eight - alone == group + HOPPER.dividing_context_bytes
    parallel = estimate_memory(LLAMA_8B, replace(EAGER, world_size=2)).runtime_bytes
    assert parallel - alone == memory_of(3, 2).runtime_bytes - alone == group + partners
    reducing = partners + HOPPER.reducing_context_bytes
    assert memory_of(2, 2).runtime_bytes - alone == group + reducing


def test_zero_3_holds_llm_int8s_codes_twice() -> None:
    for bit_width, more in ((8, LINEARS), (4, 0)):
        two, three = (memory_of(stage, bit_width=bit_width).base_bytes for stage in (2, 3))
        assert three - two == more


def test_offloaded_parameters_leave_a_part_of_the_base_on_the_gpu() -> None:
    offloading = memory_of(3, offload_params="cpu")
    assert offloading.base_bytes == 2 * 10**9 + EMBEDDINGS  # begun below the limit
    assert offloading.host_bytes > memory_of(3).base_bytes + 2 * LOCKED  # with the adapter's


def test_a_host_that_steps_by_bitsandbytes_holds_what_a_step_makes() -> None:
    offloading = partial(memory_of, 2, offload_optimizer="cpu")
    plain, paged, eight_bit = (
        offloading(host_optimizer_bytes=HOST_OPTIMIZER_BYTES[name]).host_bytes
        for name in ("adamw", "paged_adamw_32bit", "adamw_8bit")
    )
    assert paged - plain == 2 * ROW
    assert eight_bit - plain == pytest.approx((4 - 2 + 0.5) * ROW, rel=0.01)
    on_gpu = (memory_of(2, host_optimizer_bytes=number).host_bytes for number in (8, 18))
    assert len(set(on_gpu)) == 1


def test_nvme_keeps_buffers_on_the_host_and_neither_states_nor_the_base() -> None:
    memory = memory_of(2, bit_width=4)
    swapping = memory_of(3, bit_width=4, offload_optimizer="nvme")
    assert swapping.optimizer_bytes == 0
    assert swapping.host_bytes - memory.host_bytes == ROW + 4 * 2**23 * 4  # gradients and buffers
    swapping = memory_of(3, bit_width=4, offload_params="nvme")
    constants = memory.base_bytes - PLAIN_BYTES - LINEARS // 2
    assert swapping.base_bytes == 3 * EMBEDDINGS + constants
    assert swapping.host_bytes - memory.host_bytes == 3 * EMBEDDINGS + ROW  # with the adapter
    pair = memory_of(3, world_size=2, bit_width=4, offload_params="nvme")
    assert pair.host_bytes - memory.host_bytes == (3 * EMBEDDINGS + ROW) // 2


@given(
    stage=st.sampled_from([1, 2, 3]),
    bit_width=st.sampled_from([4, 8, 16]),
    optimizer=st.sampled_from(["none", "cpu"]),
    params=st.sampled_from(["none", "cpu"]),
    world_size=st.integers(2, 64),
)
def test_another_worker_never_makes_the_others_take_more(
    stage: int, bit_width: int, optimizer: str, params: str, world_size: int
) -> None:
    offload = {"offload_optimizer": optimizer, "offload_params": params if stage == 3 else "none"}
    fewer, more = (
        memory_of(stage, count, bit_width, **offload) for count in (world_size, world_size + 1)
    )
    assert more.total_bytes <= fewer.total_bytes
    assert more.host_bytes <= fewer.host_bytes

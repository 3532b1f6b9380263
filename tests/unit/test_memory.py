"""The memory model over a base's shape."""

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.memory_cases import base_shape
from benchmarks.models import SHAPES
from orchestrator.config import QuantConfig
from orchestrator.planning.activations import joins_mlp, pass_memory
from orchestrator.planning.load import PackLoad
from orchestrator.planning.memory import (
    EIGHT_BIT_STATE_BYTES,
    GIB,
    HOPPER,
    PackMemory,
    estimate_memory,
    kept_states_bytes,
)
from tests.recorded import recorded_packs
from tests.sweeps import LLAMA_8B, LLAMA_HALF_B

LOAD = PackLoad(
    quant=QuantConfig(),
    dtype_bytes=2,
    num_slots=1,
    max_rank=16,
    target_modules="all-linear",
    optimizer_bytes=8,
    host_optimizer_bytes=8,
    micro_batch_size=1,
    evaluation_batch_size=1,
    block_length=1024,
    gradient_checkpointing=False,
    dequantise_once=False,
    dropout=False,
    step_program="graph",
    cuda=True,
)


def test_in_place_an_embedding_that_no_head_shares_is_planned_on_the_host() -> None:
    tied, untied = (
        estimate_memory(
            replace(LLAMA_8B, tied_embeddings=is_tied), replace(LOAD, step_program="in_place")
        )
        for is_tied in (True, False)
    )
    embedding = 128_256 * 4096 * 2
    assert tied.base_bytes - untied.base_bytes == embedding
    assert untied.host_bytes - tied.host_bytes == embedding


def gib(load: PackLoad, *parts: str) -> float:
    memory = estimate_memory(LLAMA_8B, load)
    return sum(getattr(memory, part) for part in parts) / GIB


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # 6.98 billion weights in linear layers, 1.05 billion in embeddings and head.
        ({}, 5.3),
        ({"quant": QuantConfig(double_quant=False)}, 5.6),
        ({"dequantise_once": True}, 15.0),
        ({"quant": QuantConfig(bit_width=8)}, 8.5),
        ({"quant": QuantConfig(bit_width=16)}, 15.0),
        ({"quant": QuantConfig(bit_width=16), "dequantise_once": True}, 15.0),
    ],
)
def test_a_base_of_eight_billion_takes_its_known_size(
    changes: dict[str, Any], expected: float
) -> None:
    load = replace(LOAD, **changes)
    assert gib(load, "base_bytes", "dequantised_bytes") == pytest.approx(expected, abs=0.06)


def test_an_adapter_takes_its_weights_gradients_and_states_and_a_lane() -> None:
    # PEFT counts 41,943,040 trainable parameters for Llama 3 8B, r=16, all linear layers.
    memory = estimate_memory(LLAMA_8B, LOAD)
    assert memory.adapters_bytes == 41_943_040 * (4 + 4)
    assert memory.optimizer_bytes == 41_943_040 * 8
    assert memory.lanes_bytes == 41_943_040 * 2
    small = estimate_memory(LLAMA_8B, replace(LOAD, optimizer_bytes=2))
    assert small.optimizer_bytes == 41_943_040 * 2


def test_under_float64_rows_and_their_states_are_twice_as_wide() -> None:
    memory = estimate_memory(LLAMA_8B, replace(LOAD, dtype_bytes=8))
    assert memory.adapters_bytes == 41_943_040 * (8 + 8)
    assert memory.optimizer_bytes == 41_943_040 * 16


EAGER = replace(LOAD, step_program="eager", quant=QuantConfig(bit_width=16))


def training(load: PackLoad) -> int:
    """Bytes of a training pass, pool or not."""
    memory = estimate_memory(LLAMA_8B, load)
    return memory.graph_bytes + memory.training_bytes


def test_dropout_keeps_a_mask_and_a_masked_copy_of_each_adapter_input() -> None:
    plain, dropping = (pass_memory(LLAMA_8B, replace(EAGER, dropout=on)) for on in (False, True))
    inputs = 32 * (6 * 4096 + 14336)  # of a token: q, k, v, o, gate, up; down
    shared = 32 * (2 * 4096 + 14336)  # kept in any case, but for what attention keeps
    assert dropping.kept_bytes - plain.kept_bytes == 1024 * (inputs * (2 + 1) - shared * 2)
    assert dropping.working_bytes - plain.working_bytes == 1024 * 14336 * 3 * 4


def test_joined_mlps_keep_no_products_up_to_the_kernels_largest_rank() -> None:
    joined, plain = (pass_memory(LLAMA_8B, replace(LOAD, max_rank=rank)) for rank in (64, 65))
    assert plain.kept_bytes - joined.kept_bytes == 1024 * 2 * 32 * (14336 + 7)
    some = ("q_proj", "gate_proj", "down_proj")
    for change in ({"dropout": True}, {"cuda": False}, {"target_modules": some}, {"dora": True}):
        assert not joins_mlp(LLAMA_8B, replace(LOAD, **change))
    assert not joins_mlp(replace(LLAMA_8B, activation="gelu"), LOAD)


def test_answers_are_generated_by_eager_code_whatever_the_step() -> None:
    answering = replace(LOAD, generated_tokens=64, generation_batch_size=8)
    eager = replace(answering, step_program="eager")
    found = {pass_memory(LLAMA_8B, load).generation_bytes for load in (answering, eager)}
    assert len(found) == 1
    assert found.pop() > 0


def test_only_what_adapters_read_is_kept_for_them() -> None:
    def kept(*targets: str) -> int:
        narrow = replace(EAGER, micro_batch_size=8, target_modules=targets, max_rank=0)
        return training(narrow) // (8 * 1024 * 2 * 32)

    none = kept("o_proj")  # attention keeps that
    assert kept("q_proj") - none == kept("q_proj", "v_proj") - none == 4096
    assert kept("down_proj") - none == 14336
    assert kept("q_proj", "gate_proj", "up_proj") - none == 2 * 4096


@pytest.mark.parametrize(
    ("tokens", "dtype_bytes", "cuda", "expected"),
    [
        # Logits and their gradient; those of the chunk before; the copies of a CPU's plain code.
        (1024, 2, True, 4),
        (4096, 2, True, 6),
        (1024, 4, False, 8 + 3 * 4 + 1),
        (1024, 2, False, 4 + 4 * 4 + 1),
        (1024, 8, True, 16 + 3 * 8 + 1),
    ],
)
def test_the_loss_holds_the_logits_of_a_chunk(
    tokens: int, dtype_bytes: int, cuda: bool, expected: int
) -> None:
    load = replace(LOAD, block_length=tokens, dtype_bytes=dtype_bytes, cuda=cuda)
    hidden = 5 * tokens * 4096 * dtype_bytes
    beside_pool = estimate_memory(LLAMA_8B, load).training_bytes
    assert beside_pool == hidden + min(tokens, 2048) * 128_256 * expected


@pytest.mark.parametrize(("dtype_bytes", "expected"), [(2, 8), (4, 8), (8, 16)])
def test_an_evaluation_holds_logits_in_fp32_and_their_log_softmax(
    dtype_bytes: int, expected: int
) -> None:
    load = replace(LOAD, dtype_bytes=dtype_bytes)
    hidden = 2 * 1024 * 4096 * dtype_bytes
    found = estimate_memory(LLAMA_8B, load).evaluation_bytes
    assert found == hidden + 1024 * 128_256 * expected


def test_training_and_evaluation_are_not_held_at_the_same_time() -> None:
    memory = estimate_memory(LLAMA_8B, LOAD)
    parts = sum(getattr(memory, field.name) for field in fields(memory))
    less = min(memory.training_bytes, memory.evaluation_bytes) + memory.host_bytes
    assert memory.total_bytes == parts - less


@pytest.mark.parametrize("program", ["eager", "graph"])
def test_generation_keeps_keys_and_values_of_prompt_and_answer(program: Any) -> None:
    load = replace(LOAD, step_program=program, generated_tokens=100_000)
    longer = replace(load, generated_tokens=100_001)
    found, more = (estimate_memory(LLAMA_8B, one).evaluation_bytes for one in (load, longer))
    # Keys and values, layers and once more one layer's, heads, width, bytes.
    assert more - found == 2 * (32 + 1) * 8 * 128 * 2
    cache = (LOAD.block_length + 100_000) * 131_072
    assert found > cache + 41_943_040 * 2  # and the lane that it reads the adapter from
    none = estimate_memory(LLAMA_8B, replace(load, generated_tokens=0))
    short = estimate_memory(LLAMA_8B, replace(EAGER, generated_tokens=64))
    assert none.evaluation_bytes < found
    assert short.evaluation_bytes == estimate_memory(LLAMA_8B, EAGER).evaluation_bytes


def test_prompts_of_one_batch_are_masked_to_the_longest() -> None:
    def bytes_of(batch_size: int, length: int) -> int:
        load = replace(EAGER, generated_tokens=100_000, block_length=length)
        load = replace(load, generation_batch_size=batch_size)
        return estimate_memory(LLAMA_8B, load).evaluation_bytes

    one, two, three = (bytes_of(batch_size, 1024) for batch_size in (1, 2, 3))
    cache = (1024 + 100_000) * 33 * 4096  # of one question
    assert three - two == cache + 1024 * (2 * (3 * 4096 + 4 * 14_336) + 1024)
    assert two - one == three - two + 1024 * 1024  # alone it has no mask
    # For long prompts attention takes most: queries, keys, values, and the mask as values, twice.
    attending = 2 * (2 * 4096 + 4 * 4096 + 2 * 1024 + 2 * 32_768) + 32_768
    cache = (32_768 + 100_000) * 33 * 4096
    assert bytes_of(3, 32_768) - bytes_of(2, 32_768) == cache + 32_768 * attending


def test_a_recorded_step_keeps_its_pool_while_the_loss_is_computed() -> None:
    recorded = estimate_memory(LLAMA_8B, LOAD)
    compiled = estimate_memory(LLAMA_8B, replace(LOAD, step_program="compiled"))
    assert compiled.graph_bytes == 0
    assert recorded.graph_bytes > 0.9 * compiled.training_bytes
    assert recorded.total_bytes > compiled.total_bytes


def test_recomputation_keeps_a_fraction_of_the_activations() -> None:
    load = replace(EAGER, micro_batch_size=8)
    assert training(replace(load, gradient_checkpointing=True)) < training(load) / 6


@pytest.mark.parametrize("row", recorded_packs())
def test_the_model_says_what_an_h200_used(row: dict[str, Any]) -> None:
    load = replace(
        LOAD,
        quant=QuantConfig(bit_width=row["bit_width"]),
        num_slots=row["adapters"],
        block_length=row["tokens_per_adapter"],
        step_program=row["program"],
        dequantise_once=row["bit_width"] == 4,
    )
    memory = estimate_memory(base_shape(SHAPES[row["shape"]]), load)
    # The recorded peaks are torch's own count: no context, and not what a pool keeps for later.
    if load.graph:
        peak = max(while_recording(memory), while_evaluating(memory))
    else:
        peak = memory.total_bytes - HOPPER.context_bytes
    assert peak == pytest.approx(row["peak_memory_bytes"], rel=0.004)


def held(memory: PackMemory) -> int:
    return memory.base_bytes + memory.dequantised_bytes + memory.adapters_bytes + memory.lanes_bytes


# Of the cuBLAS workspaces that are planned, four are there by then.
WORKSPACES_LEFT = 4


def while_recording(memory: PackMemory) -> float:
    """Before any optimizer or loss; the last workspace comes with the loss."""
    pool = memory.graph_bytes / (1 + HOPPER.pool_fraction)
    return held(memory) + pool + (WORKSPACES_LEFT - 1) * HOPPER.workspace_bytes


def while_evaluating(memory: PackMemory) -> float:
    """After a step; of the pool, the gradients by the lanes are tensors still."""
    left = memory.optimizer_bytes + memory.lanes_bytes + memory.evaluation_bytes
    return held(memory) + left + WORKSPACES_LEFT * HOPPER.workspace_bytes


def test_a_dora_packs_rows_have_magnitudes_and_its_lanes_are_fp32() -> None:
    plain = estimate_memory(LLAMA_8B, LOAD)
    dora = estimate_memory(LLAMA_8B, replace(LOAD, dora=True))
    magnitudes = 32 * (2 * 4096 + 2 * 1024 + 2 * 14_336 + 4096)
    assert dora.adapters_bytes - plain.adapters_bytes == 2 * 4 * magnitudes
    assert dora.lanes_bytes == 4 * (41_943_040 + magnitudes)
    assert plain.lanes_bytes == 2 * 41_943_040


LOADS = st.builds(
    replace,
    st.just(LOAD),
    quant=st.sampled_from([QuantConfig(bit_width=bits) for bits in (4, 8, 16)]),
    dtype_bytes=st.sampled_from([2, 4]),
    num_slots=st.integers(1, 16),
    max_rank=st.integers(1, 256),
    micro_batch_size=st.integers(1, 32),
    evaluation_batch_size=st.integers(1, 32),
    gradient_checkpointing=st.booleans(),
    kept_layers=st.integers(1, LLAMA_HALF_B.num_layers - 2),
    dequantise_once=st.booleans(),
    dropout=st.booleans(),
    dora=st.booleans(),
    step_program=st.sampled_from(["eager", "compiled", "graph"]),
    generated_tokens=st.sampled_from([0, 64, 4096]),
    generation_batch_size=st.integers(1, 16),
)


@pytest.mark.parametrize(
    "field",
    [
        "num_slots",
        "max_rank",
        "micro_batch_size",
        "evaluation_batch_size",
        "block_length",
        "generated_tokens",
        "generation_batch_size",
        "kept_layers",
    ],
)
@given(load=LOADS)
def test_more_of_anything_never_takes_less_memory(field: str, load: PackLoad) -> None:
    more = replace(load, **{field: getattr(load, field) + 1})
    for shape in (LLAMA_8B, LLAMA_HALF_B):
        least = estimate_memory(shape, load).total_bytes
        assert least <= estimate_memory(shape, more).total_bytes


@given(load=LOADS)
def test_to_keep_all_layers_but_one_takes_less_than_no_recomputation(load: PackLoad) -> None:
    most = replace(load, gradient_checkpointing=True, kept_layers=LLAMA_8B.num_layers - 1)
    none = replace(load, gradient_checkpointing=False)
    difference = estimate_memory(LLAMA_8B, none).total_bytes
    difference -= estimate_memory(LLAMA_8B, most).total_bytes
    assert 0 <= difference
    one_layer = pass_memory(LLAMA_8B, none).kept_bytes / LLAMA_8B.num_layers
    assert difference <= 1.1 * one_layer


@given(load=LOADS)
def test_what_saves_memory_never_takes_more(load: PackLoad) -> None:
    total = estimate_memory(LLAMA_8B, load).total_bytes
    for saving in ({"gradient_checkpointing": True}, {"dequantise_once": False}):
        assert estimate_memory(LLAMA_8B, replace(load, **saving)).total_bytes <= total


def test_paged_states_stay_when_a_slots_next_trial_has_another_optimizer() -> None:
    """Those of training/optimizers.py, which has no way to free them."""
    assert kept_states_bytes(["adamw"]) == 8
    assert kept_states_bytes(["adamw", "adamw_8bit"]) == 8
    assert kept_states_bytes(["paged_adamw_32bit"]) == 8
    every = kept_states_bytes(["adamw", "paged_adamw_32bit", "paged_adamw_8bit"])
    assert every == 8 + 8 + EIGHT_BIT_STATE_BYTES

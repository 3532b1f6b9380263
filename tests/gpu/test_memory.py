"""What paged states and a full card do to training: seen on a CUDA GPU."""

import ctypes
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.sweeps import final_losses, run_or_resume
from orchestrator.config import OptimizerConfig
from orchestrator.training.optimizers import (
    HOST,
    RowOptimizers,
    optimizer_states,
    page_out_states,
)
from orchestrator.training.paged import MIN_PAGED_VALUES
from tests.sweeps import sweep_config
from tests.tiny import make_base_model, question_rows

# Of CUDA's driver interface (cuda.h): CU_POINTER_ATTRIBUTE_IS_MANAGED and
# CU_MEM_RANGE_ATTRIBUTE_LAST_PREFETCH_LOCATION.
IS_MANAGED, LAST_PREFETCH_LOCATION = 8, 4
PAGED = {"paged_adamw_8bit": 1, "paged_adamw_32bit": 4}
"""Bytes of a value's state."""


@pytest.mark.parametrize("name", PAGED)
def test_paged_states_are_managed_memory_that_each_step_prefetches(name: str) -> None:
    row = nn.Parameter(torch.ones(2**24, device="cuda"))
    row.grad = torch.ones_like(row)
    optimizer = RowOptimizers(row).begin(OptimizerConfig(name=name))
    held = torch.cuda.memory_allocated()
    optimizer.step()
    states, _ = optimizer_states(optimizer)
    moments = [states["state1"], states["state2"]]
    assert [moment.nbytes for moment in moments] == [PAGED[name] * row.numel()] * 2
    assert all(moment.dim() == 1 and is_managed(moment) for moment in moments)
    # bitsandbytes' maxima of blocks of 256 values, and tables of 256.
    assert torch.cuda.memory_allocated() - held <= 2 * 4 * (row.numel() // 256) + 2**13
    assert not any(torchs_own(moment) for moment in moments)
    page_out_states(optimizer)
    assert [last_prefetched_to(moment) for moment in moments] == [HOST, HOST]
    optimizer.step()
    assert [last_prefetched_to(moment) for moment in moments] == [row.get_device()] * 2


@pytest.mark.parametrize("name", PAGED)
def test_rows_below_bitsandbytes_threshold_are_not_paged(name: str) -> None:
    row = nn.Parameter(torch.ones(MIN_PAGED_VALUES - 1, device="cuda"))
    row.grad = torch.ones_like(row)
    optimizer = RowOptimizers(row).begin(OptimizerConfig(name=name))
    optimizer.step()
    states, _ = optimizer_states(optimizer)
    assert not any(is_managed(states[moment]) for moment in ("state1", "state2"))


def test_a_sweep_that_runs_out_of_the_gpus_memory_ends_as_one_with_room(tmp_path: Path) -> None:
    """Others hold most of the card, which no plan knows of: the first pack meets CUDA's own
    error."""
    base = make_base_model(tmp_path / "base", hidden_size=512, num_layers=4)
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in question_rows(2000)))
    config = sweep_config(
        base_model__source=str(base),
        data={"train": str(rows), "block_length": 256},
        trial={"steps": 2, "batch_size": 64, "micro_batch_size": 64},
        search__space={"adapter.rank": [4, 8, 12, 16]},
        resources__step_program="eager",
        max_restarts=0,
    )
    with_room, _ = run_or_resume(config, tmp_path / "with-room")
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    taken = max(result.peak_memory_bytes for result in with_room.results)
    held = torch.empty(free - int(0.6 * taken), dtype=torch.uint8, device="cuda")
    store, _ = run_or_resume(config, tmp_path / "without")
    del held
    learned = [row for row in store.decisions if row["action"] == "plan_less_memory"]
    assert learned
    assert [result.state for result in store.results] == ["finished"] * 4
    assert {r.tokens for r in store.results} == {r.tokens for r in with_room.results}
    assert final_losses(store) == pytest.approx(final_losses(with_room), abs=0.01)


def is_managed(tensor: Tensor) -> bool:
    found, place = ctypes.c_int(0), ctypes.c_uint64(tensor.data_ptr())
    code = _driver().cuPointerGetAttribute(ctypes.byref(found), IS_MANAGED, place)
    return code == 0 and bool(found.value)


def last_prefetched_to(tensor: Tensor) -> int:
    """A GPU's number, or HOST."""
    found, place = ctypes.c_int(-100), ctypes.c_uint64(tensor.data_ptr())
    size = ctypes.c_size_t(tensor.nbytes)
    code = _driver().cuMemRangeGetAttribute(
        ctypes.byref(found), ctypes.c_size_t(4), LAST_PREFETCH_LOCATION, place, size
    )
    assert code == 0
    return found.value


def torchs_own(tensor: Tensor) -> bool:
    """Whether it lies in a segment of torch's allocator."""
    return any(
        segment["address"] <= tensor.data_ptr() < segment["address"] + segment["total_size"]
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    )


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")

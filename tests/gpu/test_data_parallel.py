"""Two ranks on GPUs, or on one where there is but one, train a pack as one worker does."""

import logging
import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks.children import rank_environment
from orchestrator.config import QuantConfig
from orchestrator.records import GroupPlace
from orchestrator.training.replicas import join
from tests.training.conftest import MakeSpec
from tests.training.test_data_parallel import TRIALS, check_pair, outcomes, train_together
from tests.training.test_pack import train
from tests.training.test_replicas import run_pair

PATIENCE_S, LATE_S = 10.0, 40.0


def test_two_ranks_train_a_pack_as_one_worker_does(make_spec: MakeSpec, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    spec = make_spec(device="cuda", micro_batch_size=1)
    check_pair(spec, spec, tmp_path, tolerance=1e-4)


def test_two_ranks_with_recorded_programs_reach_the_losses_of_one_worker(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    quant = QuantConfig(bit_width=4, compute_dtype="bfloat16").model_dump()
    spec = make_spec(device="cuda", micro_batch_size=1, quant=quant, step_program="graph")
    _, alone = train(spec, TRIALS, tmp_path / "alone")
    (_, events), _ = train_together(spec, TRIALS, tmp_path / "pair")
    assert outcomes(events) == pytest.approx(outcomes(alone), abs=0.05)


def test_a_rank_whose_gpu_waits_in_vain_says_for_whom_and_ends(tmp_path: Path) -> None:
    """Its own thread hangs in the collective, which nothing can interrupt."""
    waited, late = run_pair(wait_in_vain, tmp_path)
    assert late == "late"
    assert waited == "world_rank 1 did not come to where world_rank 0 waits: ending this process\n"


def wait_in_vain(place: GroupPlace, file: Path) -> None:
    os.environ |= rank_environment(place.world_rank, min(2, torch.cuda.device_count()))
    replicas = join(place, "cuda", PATIENCE_S)
    together = torch.ones(1, device="cuda")
    replicas.sum(together)
    assert float(together) == 2.0
    if place.world_rank == 1:
        file.write_text("late")
        time.sleep(LATE_S)
        os._exit(0)  # without a partner there is nothing to close
    logging.basicConfig(filename=file, format="%(message)s", level=logging.CRITICAL)
    replicas.sum(together)
    torch.cuda.synchronize()

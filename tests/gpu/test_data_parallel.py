"""Two ranks on GPUs, or on one where there is but one, train a pack as one worker does."""

from pathlib import Path

import pytest
import torch

from orchestrator.config import QuantConfig
from tests.training.conftest import MakeSpec
from tests.training.test_data_parallel import TRIALS, check_pair, outcomes, train_together
from tests.training.test_pack import train


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

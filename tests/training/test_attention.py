"""Attention by documents' extents, by the plain code that the kernels are compared with on GPUs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.records import BaseModel
from orchestrator.training.attention import BY_DOCUMENT, document_extents, set_attention
from orchestrator.training.base_model import load_base_model


def test_each_token_knows_where_its_document_starts_and_ends() -> None:
    position_ids = np.array([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3], [0, 1, 2, 3, 4]])
    starts, ends = document_extents(position_ids)
    assert starts.tolist() == [[0, 0, 0, 3, 3], [0, 1, 1, 1, 1], [0] * 5]
    assert ends.tolist() == [[3, 3, 3, 5, 5], [1, 5, 5, 5, 5], [5] * 5]


@torch.no_grad()
def test_by_extents_a_model_computes_what_it_does_under_masks(base_folder: Path) -> None:
    quant = QuantConfig.model_validate({"bit_width": 16, "compute_dtype": "float32"})
    record = BaseModel("tiny", None, str(base_folder), "digest")
    base = load_base_model(record, quant, "cpu", StrategyConfig())
    words = torch.randint(260, (2, 24), generator=torch.Generator().manual_seed(0))
    lengths = [[1, 9, 14], [23, 1]]
    positions = torch.tensor([[place for n in row for place in range(n)] for row in lengths])
    masked = base.hidden(words, positions)
    set_attention(base.model, BY_DOCUMENT)
    by_extents = replace(base, why_not_by_document="").hidden(words, positions)
    torch.testing.assert_close(by_extents, masked, rtol=1e-4, atol=1e-5)

"""Which MLPs are joined with their adapters. The kernels are tested on a GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.training.gated_mlp import GatedMlp, join_gated_mlps
from tests.training.test_families import load, make_family


@pytest.mark.parametrize("bit_width", [4, 16])
def test_gated_mlps_are_joined_and_keep_their_layers_names_and_values(
    tmp_path: Path, bit_width: int
) -> None:
    base = load(make_family("llama", tmp_path), bit_width, "bfloat16")
    names = set(base.model.state_dict())
    words, positions = torch.tensor([[5, 6, 7, 8]]), torch.from_numpy(np.arange(4)[None])
    expected = base.hidden(words, positions)
    assert join_gated_mlps(base) == base.model.config.num_hidden_layers  # type: ignore[union-attr]
    assert join_gated_mlps(base) == 0, "all are already"
    assert set(base.model.state_dict()) == names
    assert torch.equal(base.hidden(words, positions), expected)


@pytest.mark.parametrize("family", ["cohere", "gemma2", "gpt_neox", "mixtral", "phi"])
def test_only_mlps_that_compute_what_a_gated_one_does_are_joined(
    tmp_path: Path, family: str
) -> None:
    base = load(make_family(family, tmp_path), dtype="bfloat16")
    joined = join_gated_mlps(base)
    found = [part for part in base.model.modules() if isinstance(part, GatedMlp)]
    assert joined == len(found) == (2 if family == "cohere" else 0)  # the others': GELU, experts


def test_an_mlp_that_clamps_what_is_between_its_layers_is_left_alone(tmp_path: Path) -> None:
    base = load(make_family("llama", tmp_path), dtype="bfloat16")

    class Clamping(type(base.model.model.layers[0].mlp)):  # type: ignore[misc, union-attr, index]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = self.gate_proj(x).clamp(max=10)
            return self.down_proj(self.act_fn(gate) * self.up_proj(x))  # type: ignore[no-any-return]

    for block in base.model.model.layers:  # type: ignore[union-attr]
        block.mlp.__class__ = Clamping
    assert join_gated_mlps(base) == 0


def test_a_base_in_float32_has_nothing_to_gain(tmp_path: Path) -> None:
    assert join_gated_mlps(load(make_family("llama", tmp_path))) == 0

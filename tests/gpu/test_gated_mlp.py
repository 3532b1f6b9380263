"""The kernels of joined MLPs against their reference in float32, and against themselves."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from orchestrator.config import QuantConfig
from orchestrator.training.gated_mlp import updated_product
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_pack import train

# Tokens and widths that fill tiles and do not; ranks below and above what a tensor core multiplies.
SHAPES = [(1, 8, 16, 1), (2, 50, 200, 8), (3, 70, 136, 33), (16, 1024, 4864, 16), (1, 300, 512, 64)]


def inputs(lanes: int, tokens: int, width: int, rank: int) -> list[Tensor]:
    """As the operator takes them; weights lie in rows that are longer, as a lane's do."""
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    size = rank * width
    rows = random(lanes, 3 * size + 24) * 0.3
    parts = [rows[:, part * size : (part + 1) * size] for part in range(3)]
    return [
        *(random(lanes, tokens, width) for _ in range(2)),
        *(random(lanes, tokens, rank) for _ in range(2)),
        *(part.view(lanes, rank, width) for part in parts[:2]),
        parts[2].view(lanes, width, rank),
    ]


def gradients(
    outputs: tuple[Tensor, Tensor], leaves: list[Tensor], given: tuple[Tensor, Tensor]
) -> list[Tensor]:
    found = torch.autograd.grad(outputs, leaves, [part.to(outputs[0]) for part in given])
    return [*(part.detach() for part in outputs), *found]


def joined(tensors: list[Tensor], given: tuple[Tensor, Tensor]) -> list[Tensor]:
    leaves = [part.detach().requires_grad_() for part in tensors]
    return gradients(torch.ops.orchestrator.gated_product(*leaves), leaves, given)


def reference(tensors: list[Tensor], given: tuple[Tensor, Tensor]) -> list[Tensor]:
    leaves = [part.detach().float().requires_grad_() for part in tensors]
    product = updated_product(*leaves[:-1])
    return gradients((product, product @ leaves[-1]), leaves, given)


@pytest.mark.parametrize(("lanes", "tokens", "width", "rank"), SHAPES)
def test_a_joined_mlp_has_the_values_and_gradients_of_its_parts(
    lanes: int, tokens: int, width: int, rank: int
) -> None:
    tensors = inputs(lanes, tokens, width, rank)
    like = tensors[0], tensors[2]
    given = torch.randn_like(like[0]), torch.randn_like(like[1])
    found, expected = joined(tensors, given), reference(tensors, given)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 0.02 * other.abs().max()
    for one, again in zip(found, joined(tensors, given), strict=True):
        assert torch.equal(one, again)


def test_compiled_blocks_use_the_kernels(make_spec: MakeSpec, tmp_path: Path) -> None:
    quant = QuantConfig(compute_dtype="bfloat16").model_dump()
    spec = make_spec(device="cuda", quant=quant, step_program="compiled")
    with torch.profiler.profile() as profile:
        train(spec, [trial_config(steps=2)], tmp_path)
    called = {event.key for event in profile.key_averages()}
    assert {"orchestrator::gated_product", "orchestrator::gated_product_backward"} <= called

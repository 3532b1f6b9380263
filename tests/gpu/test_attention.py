"""Attention's kernels against their reference in float32, and against themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.records import BaseModel
from orchestrator.training.attention import attend, document_extents
from orchestrator.training.base_model import LoadedBase, load_base_model

Lengths = list[list[int]]
SMALL: Lengths = [[20, 30, 14], [64], [1, 62, 1]]
# Over many tiles, and no multiple of one; one token; from one tile's border to another's; padding.
LARGE: Lengths = [[1000], [1, 1, 998], [128, 256, 64, 552], [300, 5, 1, 200, 494], [1] * 1000]
WHOLE: Lengths = [[1024], [512, 512], [700, 324]]


def positions(lengths: Lengths) -> np.ndarray:
    return np.array([np.concatenate([np.arange(n) for n in row]) for row in lengths])


def inputs(lengths: Lengths, heads: int, key_heads: int, width: int) -> list[Tensor]:
    """Query, key, value as projections leave them; extents; the output's gradient."""
    torch.manual_seed(0)
    shape = (len(lengths), sum(lengths[0]))

    def random(count: int) -> Tensor:
        return torch.randn(*shape, count, width, device="cuda", dtype=torch.bfloat16)

    query, key, value = (random(count).transpose(1, 2) for count in (heads, key_heads, key_heads))
    extents = torch.from_numpy(document_extents(positions(lengths))).cuda()
    return [query, key, value, extents, random(heads)]


def run(
    query: Tensor, key: Tensor, value: Tensor, extents: Tensor, gradient: Tensor
) -> list[Tensor]:
    """Output, and gradients by query, key and value."""
    leaves = [part.detach().requires_grad_() for part in (query, key, value)]
    output, _ = torch.ops.orchestrator.attention_by_document(
        *leaves, extents, query.shape[-1] ** -0.5
    )
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def expected(
    query: Tensor, key: Tensor, value: Tensor, extents: Tensor, gradient: Tensor
) -> list[Tensor]:
    leaves = [part.detach().float().requires_grad_() for part in (query, key, value)]
    output = attend(*leaves, extents, query.shape[-1] ** -0.5)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient.float())]


@pytest.mark.parametrize(
    ("lengths", "heads", "key_heads", "width"),
    [
        (SMALL, 4, 4, 16),
        (SMALL, 4, 2, 24),
        (LARGE, 4, 2, 64),
        (LARGE, 3, 3, 80),
        (LARGE, 4, 1, 128),
        (LARGE, 2, 1, 256),
        (WHOLE, 14, 2, 64),
        (WHOLE, 32, 8, 128),
        (WHOLE * 12, 8, 8, 128),  # heads are not shared out among programs
    ],
)
def test_outputs_and_gradients_are_the_references(
    lengths: Lengths, heads: int, key_heads: int, width: int
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    given = inputs(lengths, heads, key_heads, width)
    for found, plain in zip(run(*given), expected(*given), strict=True):
        assert found.dtype == torch.bfloat16
        assert found.shape == plain.shape
        assert float((found - plain).norm() / plain.norm()) < 1e-2
        # No row is wrong where most are right; rows that cancel out are all rounding.
        wrong = (found - plain).norm(dim=-1)
        assert bool((wrong < 0.05 * plain.norm(dim=-1) + 0.05).all())


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(14, 2, 64), (32, 8, 128)])
@pytest.mark.parametrize("lengths", [LARGE, WHOLE * 4])
def test_the_same_inputs_give_the_same_bits(
    lengths: Lengths, heads: int, key_heads: int, width: int
) -> None:
    given = inputs(lengths, heads, key_heads, width)
    first = run(*given)
    for _ in range(5):
        dirt = [torch.full((1 << 22,), torch.nan, device="cuda") for _ in range(40)]
        del dirt  # what the allocator gives out next
        for again, part in zip(run(*given), first, strict=True):
            assert torch.equal(again, part)


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(14, 2, 64), (32, 8, 128)])
def test_other_blocks_change_no_bit_of_a_block(heads: int, key_heads: int, width: int) -> None:
    query, key, value, extents, gradient = inputs(LARGE, heads, key_heads, width)
    found = run(query, key, value, extents, gradient)
    # The first block as it was; the others' values, and which documents they are of, turned round.
    order = torch.tensor([0, *range(len(LARGE) - 1, 0, -1)], device="cuda")
    moved = run(query[order], key[order], value[order], extents[:, order], gradient[order])
    for changed, part in zip(moved, found, strict=True):
        assert torch.equal(changed[0], part[0])
        assert torch.equal(changed[order], part)


def test_a_document_does_not_see_its_neighbours() -> None:
    query, key, value, extents, gradient = inputs([[300, 424, 300]], 8, 2, 64)
    found = run(query, key, value, extents, gradient)
    middle = slice(300, 724)
    for part in (query, key, value):
        kept = part[:, :, middle].clone()
        part.mul_(3)
        part[:, :, middle] = kept
    changed = run(query, key, value, extents, gradient)
    assert torch.equal(changed[0][:, middle], found[0][:, middle])
    for after, before in zip(changed[1:], found[1:], strict=True):
        assert torch.equal(after[:, :, middle], before[:, :, middle])


def test_recorded_in_a_graph_it_follows_new_inputs_as_the_eager_one_does() -> None:
    fixed = inputs(LARGE, 8, 2, 128)
    run(*fixed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(*fixed)
    other = inputs(LARGE[::-1], 8, 2, 128)
    for place, tensor in zip(fixed, other, strict=True):
        place.copy_(tensor.flip(0) if tensor.dtype == torch.bfloat16 else tensor)
    graph.replay()
    for found, eager in zip(recorded, run(*fixed), strict=True):
        assert torch.equal(found, eager)


def test_compiled_it_is_the_eager_one() -> None:
    query, key, value, extents, gradient = inputs(SMALL, 4, 2, 64)

    def doubled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = torch.ops.orchestrator.attention_by_document(
            query * 2, key, value, extents, 0.125
        )[0]
        return output.flatten(2)

    leaves = [part.requires_grad_() for part in (query, key, value)]
    compiled = torch.compile(doubled)(*leaves)
    eager = doubled(*leaves)
    assert torch.equal(compiled, eager)
    found, plain = (
        torch.autograd.grad(output, leaves, gradient.flatten(2)) for output in (compiled, eager)
    )
    for part, other in zip(found, plain, strict=True):
        assert torch.equal(part, other)


def load(folder: Path, dtype: str) -> LoadedBase:
    quant = QuantConfig.model_validate({"bit_width": 16, "compute_dtype": dtype})
    base = BaseModel("tiny", None, str(folder), "digest")
    return load_base_model(base, quant, "cuda", StrategyConfig())


def test_a_model_with_attention_by_document_is_the_one_under_masks(base_folder: Path) -> None:
    by_document, masked = load(base_folder, "bfloat16"), load(base_folder, "float32")
    assert by_document.why_not_by_document == ""
    assert "bfloat16" in masked.why_not_by_document
    words = torch.randint(260, (3, 64), device="cuda")
    places = torch.from_numpy(positions(SMALL)).cuda()
    found, plain = by_document.hidden(words, places), masked.hidden(words, places)
    assert float((found.float() - plain).norm() / plain.norm()) < 2e-2

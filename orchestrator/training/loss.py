"""Cross entropy over a large vocabulary that never holds all logits.

The gradient is computed in the forward pass, chunk by chunk, since the output head is frozen: what
is kept for the backward pass is one hidden-sized tensor, not a vocabulary-sized one (the idea of
Liger's fused linear cross entropy, arXiv:2410.10989, without its .item() calls).

Shapes: N tokens with a label, H hidden size, V vocabulary, k slots.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Head = Callable[[Tensor], Tensor]  # [n, H] -> logits [n, V]

# 1,024 rows of a 150,000-word vocabulary in fp32 are 0.6 GB, and one such matmul fills a GPU.
CHUNK_TOKENS = 1024


class _SlotLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,  # [N, H]
        labels: Tensor,  # [N]
        slots: Tensor,  # [N], 0..k-1
        weights: Tensor,  # [k]
        head: Head,
    ) -> Tensor:  # [k]
        losses = torch.zeros_like(weights)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            with torch.enable_grad():
                inputs = hidden[part].detach().requires_grad_()
                nll = functional.cross_entropy(head(inputs).float(), labels[part], reduction="none")
                weighted = nll * weights[slots[part]]
                (gradient[part],) = torch.autograd.grad(weighted.sum(), inputs)
            losses.index_add_(0, slots[part], weighted.detach())
        ctx.save_for_backward(gradient, slots)
        return losses

    @staticmethod
    def backward(ctx, grad_losses: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[no-untyped-def]
        gradient, slots = ctx.saved_tensors
        scale = grad_losses[slots].to(gradient.dtype)
        return gradient * scale[:, None], None, None, None, None


def slot_losses(
    hidden: Tensor, labels: Tensor, slots: Tensor, weights: Tensor, head: Head
) -> Tensor:
    """Each slot's weighted sum of token losses, [k], with gradients to `hidden`.

    With weights[i] = 1 / (slot i's tokens in the whole step), micro-batches add up to the mean.
    """
    result: Tensor = _SlotLosses.apply(hidden, labels, slots, weights, head)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def token_losses(hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Negative log likelihood of each label, [N], fp32."""
    losses = [
        functional.cross_entropy(
            head(hidden[start : start + CHUNK_TOKENS]).float(),
            labels[start : start + CHUNK_TOKENS],
            reduction="none",
        )
        for start in range(0, len(hidden), CHUNK_TOKENS)
    ]
    return torch.cat(losses) if losses else torch.zeros(0, device=hidden.device)

"""Cross entropy over a large vocabulary that never holds all logits.

The gradient is computed in the forward pass, chunk by chunk, since the output head is frozen: what
is kept for the backward pass is one hidden-sized tensor, not a vocabulary-sized one (the idea of
Liger's fused linear cross entropy, arXiv:2410.10989, without its .item() calls).

Shapes: N tokens with a label, H hidden size, V vocabulary, n lanes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Head = Callable[[Tensor], Tensor]  # [m, H] -> logits [m, V]
Losses = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# 2,048 rows of a 150,000-word vocabulary in bfloat16 are 0.6 GB, and one such matmul fills a GPU.
CHUNK_TOKENS = 2048


@torch.no_grad()
def losses_and_gradient(
    hidden: Tensor,
    labels: Tensor,
    lanes: Tensor,
    weights: Tensor,
    head: Head,
    least_chunks: int = 0,
) -> tuple[Tensor, Tensor]:
    """Each lane's weighted sum of token losses, [n], and the gradient of their sum by `hidden`.

    hidden [N, H]; labels and lanes [N]; weights [n]. With weights[i] = 1 / (lane i's labels in the
    whole step), micro-batches add up to the mean. The head is called at least `least_chunks` times.
    """
    losses = torch.zeros_like(weights)
    gradient = torch.empty_like(hidden)
    for part in _chunks(len(hidden), least_chunks):
        factors = weights[lanes[part]]
        with torch.enable_grad():
            inputs = hidden[part].detach().requires_grad_()
            logits = head(inputs)
        nll, by_logits = _fastest(logits)(logits.detach(), labels[part], factors)
        (gradient[part],) = torch.autograd.grad(logits, inputs, by_logits)
        losses.index_add_(0, lanes[part], nll)
    return losses, gradient


@torch.no_grad()
def token_losses(hidden: Tensor, labels: Tensor, head: Head, least_chunks: int = 0) -> Tensor:
    """Negative log likelihood of each label, [N], in fp32 (fp64 under fp64 arithmetic)."""
    losses = [
        torch.nn.functional.cross_entropy(
            _upcast(head(hidden[part])), labels[part], reduction="none"
        )
        for part in _chunks(len(hidden), least_chunks)
    ]
    return torch.cat(losses) if losses else torch.zeros(0, device=hidden.device)


def num_chunks(tokens: int) -> int:
    return -(-tokens // CHUNK_TOKENS)


def _chunks(tokens: int, least: int) -> list[slice]:
    """The last of them may be empty."""
    count = max(least, num_chunks(tokens))
    return [slice(n * CHUNK_TOKENS, (n + 1) * CHUNK_TOKENS) for n in range(count)]


def _fastest(logits: Tensor) -> Losses:
    if not logits.is_cuda or logits.dtype == torch.float64:
        return weighted_losses
    from orchestrator.training import kernels

    return kernels.weighted_losses


def weighted_losses(logits: Tensor, labels: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted losses [m], and the gradient of their sum by the logits [m, V]."""
    wide = _upcast(logits)
    normaliser = torch.logsumexp(wide, dim=-1, keepdim=True)
    nll = (normaliser - wide.gather(1, labels[:, None]))[:, 0] * factors
    is_label = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    gradient = (torch.exp(wide - normaliser) - is_label.to(wide.dtype)) * factors[:, None]
    return nll, gradient.to(logits.dtype)


def _upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()

"""How alike two models are on held-out blocks: loss, and the tokens that they would say.

In: models that transformers made, and a BlockReader. Out: Measured and Parity records.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from orchestrator.data.reader import IGNORED, BlockReader
from orchestrator.training.loss import token_losses


@dataclass(frozen=True)
class Measured:
    """At the labelled places of all blocks, in order."""

    losses: NDArray[np.float64]
    tokens: NDArray[np.int64]
    """The likeliest ones."""


@dataclass(frozen=True)
class Parity:
    reference_loss: float
    """Nats per token, of the adapter on the base it was trained on."""
    loss: float
    loss_increase: float
    agreement_fraction: float
    """Places where both have the same likeliest token."""
    max_token_loss_change: float
    num_tokens: int


@torch.no_grad()
def measure(model: nn.Module, reader: BlockReader, batch_size: int = 1) -> Measured:
    """Packed blocks, whose positions tell transformers where documents begin."""
    device = next(model.parameters()).device
    losses, tokens = [], []
    for start in range(0, reader.num_blocks, batch_size):
        batch = reader.blocks(range(start, min(start + batch_size, reader.num_blocks)))
        call: Any = model
        logits = call(
            input_ids=torch.from_numpy(batch.input_ids).to(device),
            position_ids=torch.from_numpy(batch.position_ids).to(device),
            attention_mask=None,
            use_cache=False,
        ).logits
        blocks, places = np.nonzero(batch.labels != IGNORED)
        labelled = logits[blocks, places]
        targets = torch.from_numpy(batch.labels[blocks, places]).to(device)
        losses.append(token_losses(labelled, targets, lambda rows: rows).double().cpu().numpy())
        tokens.append(labelled.argmax(dim=-1).cpu().numpy())
    return Measured(np.concatenate(losses), np.concatenate(tokens))


def compare(reference: Measured, other: Measured) -> Parity:
    first, second = float(reference.losses.mean()), float(other.losses.mean())
    return Parity(
        reference_loss=first,
        loss=second,
        loss_increase=second - first,
        agreement_fraction=float((reference.tokens == other.tokens).mean()),
        max_token_loss_change=float(np.abs(other.losses - reference.losses).max()),
        num_tokens=len(other.losses),
    )

"""Held-out loss of slots, or of the base alone, on the very base they are trained on.

Every example's own loss is kept, so that two adapters can be compared example by example later.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.data.reader import BlockReader
from orchestrator.data.tokenizing import IGNORED
from orchestrator.training.base_model import LoadedBase
from orchestrator.training.engine import Engine
from orchestrator.training.loss import token_losses
from orchestrator.training.slots import Slots


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean negative log likelihood per label, in nats."""
    example_nll: npt.NDArray[np.float64]
    """Sum over each example's labels, by document number."""
    example_labels: npt.NDArray[np.int64]

    def to_json(self, reader: BlockReader) -> dict[str, Any]:
        return {
            "manifest": reader.manifest.digest,
            "eval_loss": self.loss,
            "examples": list(reader.document_keys),
            "nll": [round(float(value), 6) for value in self.example_nll],
            "labels": [int(value) for value in self.example_labels],
        }


@torch.no_grad()
def evaluate(
    base: LoadedBase,
    engine: Engine,
    slots: Slots,
    members: Sequence[tuple[int, float]],
    reader: BlockReader,
    batch_size: int,
) -> list[Evaluation]:
    """One Evaluation for each (slot number, scaling); one of the base alone without members."""
    if members:
        slots.activate([number for number, _ in members], [scale for _, scale in members])
    else:
        slots.deactivate()
    copies = max(1, len(members))
    num_examples = len(reader.document_keys)
    nll = np.zeros((copies, num_examples))
    labels = np.zeros((copies, num_examples), dtype=np.int64)
    base.model.eval()
    for start in range(0, reader.num_blocks, batch_size):
        indices = np.arange(start, min(start + batch_size, reader.num_blocks))
        engine.forward(partial(_add_batch, base, reader, indices, nll, labels))
    base.model.train()
    return [
        Evaluation(float(nll[i].sum() / max(1, labels[i].sum())), nll[i], labels[i])
        for i in range(copies)
    ]


def _add_batch(
    base: LoadedBase,
    reader: BlockReader,
    indices: npt.NDArray[np.int64],
    nll: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int64],
) -> None:
    copies = len(nll)
    batch = reader.blocks(indices)
    device = base.device
    input_ids = torch.from_numpy(batch.input_ids).long().to(device).repeat(copies, 1)
    position_ids = torch.from_numpy(batch.position_ids).long().to(device).repeat(copies, 1)
    hidden = base.hidden(input_ids, position_ids)  # [copies*b, S, H]
    kept = batch.labels != IGNORED  # [b, S]
    targets = torch.from_numpy(batch.labels[kept]).long().to(device)
    rows = hidden.view(copies, *batch.labels.shape, -1)[:, torch.from_numpy(kept).to(device)]
    examples = batch.document_ids[kept]
    for copy in range(copies):
        losses = token_losses(rows[copy], targets, base.head).double().cpu().numpy()
        np.add.at(nll[copy], examples, losses)
        np.add.at(labels[copy], examples, 1)

"""Held-out loss of slots, or of the base alone, on the very base they are trained on.

Every example's own loss is kept, so that two adapters can be compared example by example later. The
work is (slot, blocks) pairs, put onto lanes as they come: one slot alone fills all lanes too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.data.reader import IGNORED, BlockReader
from orchestrator.training.base_model import LoadedBase
from orchestrator.training.engine import Engine
from orchestrator.training.lanes import Served
from orchestrator.training.loss import num_chunks, token_losses
from orchestrator.training.replicas import Replicas

Indices = npt.NDArray[np.int64]


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
            "examples_digest": reader.examples_digest,
            "eval_loss": self.loss,
            "examples": list(reader.document_keys),
            "nll": [round(float(value), 6) for value in self.example_nll],
            "labels": [int(value) for value in self.example_labels],
        }


@torch.no_grad()
def evaluate(
    base: LoadedBase,
    engine: Engine,
    replicas: Replicas,
    members: Sequence[Served],
    reader: BlockReader,
    batch_size: int,
) -> list[Evaluation]:
    """One Evaluation for each member. Workers share the blocks, and all get the same result.

    `batch_size` blocks of a member are evaluated at once, where the program leaves that open.
    """
    program = engine.program
    size = program.blocks_per_lane or _even_part(reader.num_blocks, batch_size)
    # Under ZeRO-3 all workers gather a layer's parameters together, so all make as many passes: one
    # that has no block left makes an empty part of them.
    passes = range(0, reader.num_blocks, replicas.world_size * size)
    starts = [start + replicas.world_rank * size for start in passes]
    work = [
        (member, np.arange(start, min(start + size, reader.num_blocks)))
        for start in starts
        for member in range(len(members))
    ]
    totals = np.zeros((2, len(members), len(reader.document_keys)))  # losses, labels
    num_lanes = program.num_lanes or len(members)
    base.model.eval()
    for first in range(0, len(work), num_lanes):
        group = work[first : first + num_lanes]
        program.serve([members[member] for member, _ in group])
        engine.forward(partial(_add_group, base, engine, reader, group, size, totals))
    base.model.train()
    if replicas.world_size > 1:
        shared = base.on_device(totals)
        replicas.sum(shared)
        totals = shared.cpu().numpy()
    labels = totals[1].astype(np.int64)
    return [
        Evaluation(float(nll.sum() / max(1, count.sum())), nll, count)
        for nll, count in zip(totals[0], labels, strict=True)
    ]


def _even_part(total: int, most: int) -> int:
    """Blocks at once, at most `most`, such that the last part is about as large as the others."""
    return -(-total // -(-total // most)) if total else 1


def _add_group(
    base: LoadedBase,
    engine: Engine,
    reader: BlockReader,
    group: Sequence[tuple[int, Indices]],
    size: int,
    totals: npt.NDArray[np.float64],
) -> None:
    # A part is filled up with blocks whose results are dropped.
    padded = [np.pad(indices, (0, size - len(indices))) for _, indices in group]
    batch = reader.blocks(np.concatenate(padded))
    counts = np.concatenate([np.arange(size) < len(indices) for _, indices in group])
    hidden = engine.program.hidden(batch)  # [lanes*size, S, H]
    blocks, places = np.nonzero((batch.labels != IGNORED) & counts[:, None])
    targets = base.on_device(batch.labels[blocks, places])
    at = base.on_device(blocks * batch.labels.shape[1] + places)
    least_chunks = num_chunks(batch.labels.size) if engine.in_step else 0
    nll = token_losses(hidden.flatten(0, 1)[at], targets, base.head, least_chunks)
    losses = nll.double().cpu().numpy()
    member = np.repeat([member for member, _ in group], size)[blocks]
    examples = batch.document_ids[blocks, places]
    np.add.at(totals[0], (member, examples), losses)
    np.add.at(totals[1], (member, examples), 1)

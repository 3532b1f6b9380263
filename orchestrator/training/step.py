"""One micro-batch of every member of a pack: forward, losses, backward, and the steps it completes.

Everything up to the gradients' norms is queued on the GPU without waiting for it, and torch's AdamW
steps as well; meanwhile the CPU gathers the next blocks. Then the losses and norms are read once,
and the other optimizers are stepped.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from orchestrator.data.reader import IGNORED, Batch
from orchestrator.training.base_model import LoadedBase
from orchestrator.training.engine import Engine
from orchestrator.training.loss import losses_and_gradient, num_chunks
from orchestrator.training.replicas import Replicas
from orchestrator.training.slot import Slot

Parts = Sequence[tuple[Batch, float]]


@dataclass(frozen=True)
class Outcome:
    """Of each member, in order."""

    losses: Sequence[float]
    """Its micro-batch's part of its step's mean loss, of all workers together."""
    grad_norms: Sequence[float | None]
    """Before clipping; None where its step goes on."""
    flag: bool
    """Whether any worker raised it."""
    round_s: float
    """Seconds of the round before, the mean of all workers: the same number for each of them."""


class StepRunner:
    def __init__(self, base: LoadedBase, engine: Engine, replicas: Replicas) -> None:
        self._base = base
        self._engine = engine
        self._replicas = replicas
        self._round_s = 0.0

    def run(self, members: Sequence[Slot], flag: bool) -> Outcome:
        """Train the members' next micro-batches. All workers of the pack run the same ones."""
        started = time.monotonic()
        parts = [member.next_micro_batch() for member in members]
        fresh = [member.begins_step for member in members]
        self._engine.program.serve([member.trained for member in members])
        losses, hidden, gradient = self._engine.forward(lambda: self._losses(parts))
        self._engine.backward(hidden, gradient, fresh)
        # Not new_tensor, which waits for all that was queued.
        own = self._base.on_device(np.array([float(flag), self._round_s]))
        told = torch.cat([losses, own.to(losses.dtype)])
        self._replicas.sum(told)
        for member in members:
            member.read_ahead()
        rates = {member.number: member.rate_of_step for member in members if member.completes_step}
        norms = dict(zip(rates, self._engine.step(rates), strict=True)) if rates else {}
        *values, raised, round_s = told.tolist()
        self._round_s = time.monotonic() - started
        return Outcome(
            values,
            [norms.get(member.number) for member in members],
            raised > 0,
            round_s / self._replicas.world_size,
        )

    def _losses(self, parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
        """Each member's loss [k]; all last hidden states, and the gradient by them."""
        batch = Batch.concatenate([part for part, _ in parts])
        hidden = self._engine.program.hidden(batch)  # [k*b, S, H]
        kept = np.flatnonzero(batch.labels != IGNORED)
        lane_size = batch.labels.size // len(parts)
        places = self._base.on_device(kept)
        weights = torch.tensor([weight for _, weight in parts], dtype=self._base.wide_dtype)
        flat = hidden.detach().flatten(0, 1)
        losses, by_kept = losses_and_gradient(
            flat[places],
            self._base.on_device(batch.labels.ravel()[kept]),
            self._base.on_device(kept // lane_size),
            weights.to(self._base.device, non_blocking=True),
            self._base.head,
            num_chunks(batch.labels.size) if self._engine.in_step else 0,
        )
        gradient = torch.zeros_like(flat).index_copy_(0, places, by_kept)
        return losses, hidden, gradient.view_as(hidden)

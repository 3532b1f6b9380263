"""One slot of a pack while it trains a trial: its data position, optimizer, schedule, counters.

A slot advances one micro-batch at a time, independently of its neighbours: when the micro-batches
of its step are through, it clips its own gradient and steps its own optimizer.
"""

import math
from pathlib import Path

import numpy as np
from torch import Tensor

from orchestrator.config import TrialConfig
from orchestrator.data.order import step_block_indices
from orchestrator.data.packing import NO_DOCUMENT
from orchestrator.data.reader import Batch, BlockReader
from orchestrator.data.tokenizing import IGNORED
from orchestrator.errors import TrialFailed
from orchestrator.files import record_digest
from orchestrator.records import SlotTask
from orchestrator.training.checkpoints import Checkpoint, latest_checkpoint, save_checkpoint
from orchestrator.training.engine import Engine
from orchestrator.training.optimizers import learning_rate
from orchestrator.training.slots import DropoutKey, Slots, mix, scaling


class Slot:
    """The trial in one place of a pack."""

    def __init__(
        self, number: int, task: SlotTask, slots: Slots, engine: Engine, reader: BlockReader
    ) -> None:
        self.number = number
        self.task = task
        self.trial: TrialConfig = task.config
        self.scaling = scaling(task.config.adapter)
        self.step = 0
        self.tokens = 0
        self.train_s = 0.0
        self.learning_rate = 0.0
        self.grad_norm = math.nan
        self.step_loss = 0.0
        self._slots = slots
        self._reader = reader
        self._micro = 0
        self._batch: Batch | None = None
        slots.open(number, task.config.adapter, task.config.seed)
        self._stepper = engine.stepper(number, task.config.optimizer)
        self.refused_checkpoints = self._restore()

    @property
    def done(self) -> bool:
        return self.step >= self.trial.steps

    @property
    def micro_batch_size(self) -> int:
        return self.trial.micro_batch_size or self.trial.batch_size

    @property
    def dropout(self) -> DropoutKey:
        seed = mix(mix(self.trial.seed, self.step), self._micro)
        return DropoutKey(self.trial.adapter.dropout, seed)

    def next_micro_batch(self) -> tuple[Batch, float]:
        """The next blocks, and the weight of each of their labels: 1 / labels in the whole step."""
        if self._batch is None:
            indices = step_block_indices(
                self.trial.seed, self.step, self.trial.batch_size, self._reader.num_blocks
            )
            self._batch = self._reader.blocks(indices)
            self.step_loss = 0.0
        start = self._micro * self.micro_batch_size
        part = self._batch.part(start, start + self.micro_batch_size)
        num_labels = int(np.count_nonzero(self._batch.labels != IGNORED))
        return part, 1.0 / max(1, num_labels)

    def finish_micro_batch(self, loss: float) -> bool:
        """Count the micro-batch whose gradients are in; True when it completed a step.

        Raises:
            TrialFailed: the loss or the gradient is not finite. The slot is unusable after it.
        """
        assert self._batch is not None
        self.step_loss += loss
        self._micro += 1
        if self._micro * self.micro_batch_size < self.trial.batch_size:
            return False
        self._optimizer_step()
        self.tokens += int(np.count_nonzero(self._batch.document_ids != NO_DOCUMENT))
        self.step += 1
        self._micro = 0
        self._batch = None
        return True

    def close(self) -> None:
        self._slots.clear(self.number)

    def adapter_tensors(self) -> dict[str, Tensor]:
        self._stepper.gather()
        return self._slots.adapter_tensors(self.number, self.trial.adapter)

    def state_bytes_per_param(self) -> float:
        """Bytes of weight, gradient and optimizer states per adapter parameter."""
        tensors, _ = self._stepper.states()
        state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        row = self._slots.rows[self.number]
        return self._stepper.copies * row.element_size() + state_bytes / row.numel()

    def save(self) -> Path:
        checkpoint = Checkpoint(
            self.step,
            self.tokens,
            self.train_s,
            self._stepper.gather(),
            self._stepper.states(),
        )
        return save_checkpoint(
            Path(self.task.attempt_dir),
            checkpoint,
            self._config_digest(),
            self._slots.layout_key(),
        )

    def _optimizer_step(self) -> None:
        self.learning_rate = learning_rate(
            self.step,
            self.trial.steps,
            self.trial.optimizer.learning_rate,
            self.trial.schedule,
        )
        self.grad_norm = self._stepper.step(self.learning_rate)
        if not (math.isfinite(self.step_loss) and math.isfinite(self.grad_norm)):
            raise TrialFailed(
                "loss_not_finite",
                f"step {self.step + 1}: loss {self.step_loss}, gradient norm {self.grad_norm}: "
                "lower optimizer.learning_rate or raise schedule.warmup_steps",
            )

    def _restore(self) -> list[str]:
        folders = [Path(folder) for folder in self.task.checkpoint_dirs]
        checkpoint, refused = latest_checkpoint(
            folders, self._config_digest(), self._slots.layout_key()
        )
        if checkpoint is not None:
            self._slots.rows[self.number].copy_(checkpoint.row)
            self._stepper.scatter()
            self._stepper.restore(checkpoint.optimizer)
            self.step = checkpoint.step
            self.tokens = checkpoint.tokens
            self.train_s = checkpoint.train_s
        return refused

    def _config_digest(self) -> str:
        return record_digest(self.trial.model_dump(mode="json"))

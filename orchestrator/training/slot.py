"""One slot of a pack while it trains a trial: its data position, optimizer, schedule, counters.

A slot advances one micro-batch at a time, independently of its neighbours: when the micro-batches
of its step are through, it clips its own gradient and steps its own optimizer.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from orchestrator.config import AdapterConfig, TrialConfig
from orchestrator.data.reader import Batch
from orchestrator.errors import TrialFailed
from orchestrator.files import record_digest
from orchestrator.records import SlotTask
from orchestrator.training.checkpoints import Checkpoint, latest_checkpoint, save_checkpoint
from orchestrator.training.dropout import Drops
from orchestrator.training.engine import Engine
from orchestrator.training.feed import Feed, ReadAhead, StepBlocks
from orchestrator.training.lanes import Served
from orchestrator.training.libraries import library_versions
from orchestrator.training.optimizers import learning_rate
from orchestrator.training.slots import Slots, mix


class Slot:
    """The trial in one place of a pack."""

    def __init__(
        self,
        number: int,
        task: SlotTask,
        slots: Slots,
        engine: Engine,
        feed: Feed,
        program: Callable[[], str],
        check: Callable[[int], None],
    ) -> None:
        """`program` says what the numbers depend on at the time: a pack's lanes come and go.
        `check` is given the step of the checkpoint before it is put in place, 0 without one."""
        self.number = number
        self.task = task
        self.trial: TrialConfig = task.config
        self.step = 0
        self.tokens = 0
        self.train_s = 0.0
        self.learning_rate = 0.0
        self.grad_norm = math.nan
        self.step_loss = 0.0
        self._slots = slots
        self._feed = feed
        self._program = program
        self.note = ""
        self._scaling = slots.scalings(task.config.adapter)
        self._micro = 0
        self._blocks: StepBlocks | None = None
        self._ahead = ReadAhead(feed, task.config)
        slots.open(number, task.config.adapter, task.config.seed)
        self._stepper = engine.stepper(number, task.config.optimizer)
        self.refused_checkpoints = self._restore(check)

    @property
    def done(self) -> bool:
        return self.step >= self.trial.steps

    @property
    def completes_step(self) -> bool:
        """Whether the micro-batch in progress is the last of its step."""
        return (self._micro + 1) * self._feed.micro_batch_size >= self._feed.share(self.trial)

    @property
    def rounds_left(self) -> int:
        """Micro-batches until its last step is done."""
        per_step = self._feed.share(self.trial) // self._feed.micro_batch_size
        return (self.trial.steps - self.step) * per_step - self._micro

    @property
    def begins_step(self) -> bool:
        return self._micro == 0

    @property
    def trained(self) -> Served:
        """What a lane needs to know for the next micro-batch."""
        seed = mix(self.trial.seed, self.step)
        seeds = tuple(mix(seed, place) for place in self._feed.places(self._micro))
        return Served(self.number, self._scaling, Drops(self.trial.adapter.dropout, seeds))

    @property
    def evaluated(self) -> Served:
        return Served(self.number, self._scaling)

    @property
    def rate_of_step(self) -> float:
        peak = self.trial.optimizer.learning_rate
        return learning_rate(self.step, self.trial.steps, peak, self.trial.schedule)

    def next_micro_batch(self) -> tuple[Batch, float]:
        """The next blocks, and the weight of each of their labels: 1 / labels in the whole step."""
        if self._blocks is None:
            self._blocks = self._ahead.take(self.step)
            self.step_loss = 0.0
        part = self._feed.part(self._blocks.batch, self._micro)
        return part, 1.0 / max(1, self._blocks.num_labels)

    def read_ahead(self) -> None:
        """Have the next steps' blocks gathered while the GPU is at work on this one."""
        self._ahead.fill(self.step)

    def finish_micro_batch(self, loss: float, grad_norm: float | None) -> None:
        """Count the micro-batch whose gradients are in; with the norm, the step that it completed.

        Raises:
            TrialFailed: the loss or the gradient is not finite. The slot is unusable after it.
        """
        assert self._blocks is not None
        self.step_loss += loss
        self._micro += 1
        if grad_norm is None:
            return
        self.learning_rate, self.grad_norm = self.rate_of_step, grad_norm
        if not (math.isfinite(self.step_loss) and math.isfinite(grad_norm)):
            raise TrialFailed(
                "loss_not_finite",
                f"step {self.step + 1} ({self._blocks.words}): loss {self.step_loss}, gradient "
                f"norm {grad_norm}: lower optimizer.learning_rate or raise schedule.warmup_steps",
            )
        self.tokens += self._blocks.num_tokens
        self.step += 1
        self._micro = 0
        self._blocks = None

    def close(self) -> None:
        self._ahead.close()
        self._slots.clear(self.number)

    def adapter_tensors(self) -> dict[str, Tensor]:
        self._stepper.gather()
        return self._slots.adapter_tensors(self.number, self.trial.adapter)

    def state_bytes_per_param(self) -> float:
        """Bytes of weight, gradient and optimizer states per adapter parameter."""
        row = self._slots.rows[self.number]
        return self._stepper.copies * row.element_size() + self._stepper.state_bytes() / row.numel()

    def save(self, writes: bool) -> Path | None:
        """All workers of the pack must call this; one `writes`, and returns the folder."""
        row, (tensors, numbers) = self._stepper.gather(), self._stepper.states()
        if not writes:
            return None
        on_host = {name: tensor.cpu() for name, tensor in tensors.items()}
        row, tensors = self._converted(self._slots.values, row.cpu(), on_host)
        checkpoint = Checkpoint(
            self.step,
            self.tokens,
            self.train_s,
            row,
            (tensors, numbers),
            self._program(),
            library_versions(),
        )
        return save_checkpoint(
            Path(self.task.attempt_dir), checkpoint, self._config_digest(), self._layout()
        )

    def _restore(self, check: Callable[[int], None]) -> list[str]:
        folders = [Path(folder) for folder in self.task.checkpoint_dirs]
        checkpoint, refused = latest_checkpoint(folders, self._config_digest(), self._layout())
        check(checkpoint.step if checkpoint is not None else 0)
        if checkpoint is not None:
            saved, numbers = checkpoint.optimizer
            row, tensors = self._converted(self._slots.laid_out, checkpoint.row, saved)
            self._slots.rows[self.number].copy_(row)
            self._stepper.scatter()
            self._stepper.restore((tensors, numbers))
            self.step = checkpoint.step
            self.tokens = checkpoint.tokens
            self.train_s = checkpoint.train_s
            self.note = other_computation(
                (checkpoint.program, checkpoint.versions), (self._program(), library_versions())
            )
        return refused

    def _converted(
        self,
        convert: Callable[[Tensor, AdapterConfig], Tensor],
        row: Tensor,
        states: dict[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The row, and the states that have a value for each of its own; where they have not, as it
        is."""
        if self._stepper.layout:
            return row, states
        adapter, size = self.trial.adapter, row.numel()
        return convert(row, adapter), {
            name: convert(tensor, adapter) if tensor.numel() == size else tensor
            for name, tensor in states.items()
        }

    def _layout(self) -> str:
        own = self._stepper.layout
        return f"{self._slots.layout_key()}; {own}" if own else "the adapter's own values"

    def _config_digest(self) -> str:
        return record_digest(self.trial.model_dump(mode="json"))


def other_computation(
    before: tuple[str, Mapping[str, str]], now: tuple[str, Mapping[str, str]]
) -> str:
    """What differs between two programs with the versions of their libraries, as a trial's note;
    empty where steps are equal to the bit. A library that only one of them knows says nothing."""
    (program, versions), (new_program, new_versions) = before, now
    shared = [name for name in versions if new_versions.get(name, versions[name]) != versions[name]]
    old = [f"{name} {versions[name]}" for name in shared]
    new = [f"{name} {new_versions[name]}" for name in shared]
    if program != new_program:
        old, new = [program, *old], [new_program, *new]
    if not old:
        return ""
    return (
        f"trained with {', '.join(old)} so far, now with {', '.join(new)}: equal up to rounding, "
        "not to the bit"
    )

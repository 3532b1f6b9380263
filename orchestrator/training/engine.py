"""The seam between the training loop and how gradients are made and applied.

A pack has one Engine, which runs forward passes and the one backward pass of all slots. Each
occupied slot has one Stepper, which applies that slot's gradient. Here both work on the rows of
`Slots`; the other pair is DeepSpeed's, in zero.py.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor, nn

from orchestrator.config import OptimizerConfig
from orchestrator.training.optimizers import (
    States,
    build_optimizer,
    clip_and_step,
    optimizer_states,
    restore_optimizer,
)
from orchestrator.training.slots import Slots

Result = TypeVar("Result")


class Stepper(Protocol):
    """Owns the optimizer of the trial in one slot."""

    copies: int
    """fp32 values that each adapter parameter takes, optimizer states apart."""

    def step(self, rate: float) -> float:
        """Clip the gradient, apply it and clear it; returns its norm before. A gradient that is not
        finite is not applied."""
        ...

    def gather(self) -> Tensor:
        """The slot's row of `Slots.rows`, holding the adapter's present values."""
        ...

    def scatter(self) -> None:
        """Take the slot's row of `Slots.rows` as the adapter's values."""
        ...

    def states(self) -> States: ...

    def restore(self, states: States) -> None: ...


class Engine(Protocol):
    def forward(self, run: Callable[[], Result]) -> Result:
        """What `run` returns; every use of the base model happens inside such a call."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients to those of the steps in progress."""
        ...

    def stepper(self, slot: int, config: OptimizerConfig) -> Stepper:
        """For the trial that was just opened in this slot."""
        ...

    def close(self) -> None: ...


class RowEngine:
    """Autograd adds gradients into the slots' rows; any number of slots."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    def forward(self, run: Callable[[], Result]) -> Result:
        return run()

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def stepper(self, slot: int, config: OptimizerConfig) -> Stepper:
        return RowStepper(self._slots.rows[slot], self._slots.gradients[slot], config)

    def close(self) -> None:
        pass


class RowStepper:
    copies = 2  # the row and its gradient

    def __init__(self, row: Tensor, gradient: Tensor, config: OptimizerConfig) -> None:
        self._row = nn.Parameter(row)
        self._row.grad = self._gradient = gradient
        self._optimizer = build_optimizer(self._row, config)
        self._max_norm = config.max_grad_norm

    def step(self, rate: float) -> float:
        norm = clip_and_step(self._optimizer, self._gradient, self._max_norm, rate)
        self._gradient.zero_()
        return norm

    def gather(self) -> Tensor:
        return self._row.data

    def scatter(self) -> None:
        pass

    def states(self) -> States:
        return optimizer_states(self._optimizer)

    def restore(self, states: States) -> None:
        restore_optimizer(self._optimizer, states)

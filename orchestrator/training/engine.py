"""The seam between the training loop and how gradients are made and applied.

A pack has one Engine, which runs forward passes and the one backward pass of all members. Each
occupied slot has one Stepper, which owns that slot's optimizer. Here both work on the rows of
`Slots`; the other pair is DeepSpeed's, in zero.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from orchestrator.config import OptimizerConfig
from orchestrator.training.lanes import staged
from orchestrator.training.optimizers import (
    ELEMENTWISE,
    RowOptimizers,
    States,
    clip_and_step,
    clipping,
    clips_itself,
    num_state_bytes,
    optimizer_states,
    page_out_states,
    queue_step,
    restore_optimizer,
)
from orchestrator.training.program import Program
from orchestrator.training.replicas import Replicas
from orchestrator.training.slots import Slots

Result = TypeVar("Result")


class Stepper(Protocol):
    """The optimizer of the trial in one slot, and its adapter's values."""

    copies: int
    """fp32 values that each adapter parameter takes, optimizer states apart."""
    layout: str
    """How the states lie, where not each belongs to one value of the row: then they can be restored
    in the same row alone."""

    def gather(self) -> Tensor:
        """The slot's row of `Slots.rows`, holding the adapter's present values. All workers of the
        pack must call this, and `states`."""
        ...

    def scatter(self) -> None:
        """Take the slot's row of `Slots.rows` as the adapter's values."""
        ...

    def states(self) -> States: ...

    def state_bytes(self) -> int:
        """On this worker."""
        ...

    def restore(self, states: States) -> None: ...


class Engine(Protocol):
    program: Program
    """May be replaced between steps."""
    in_step: bool
    """Whether all workers must call each of the model's modules equally often, as under ZeRO-3,
    where they gather its parameters together."""

    def forward(self, run: Callable[[], Result]) -> Result:
        """What `run` returns; every use of the base model happens inside such a call."""
        ...

    def backward(self, hidden: Tensor, gradient: Tensor, fresh: Sequence[bool]) -> None:
        """Add to the gradients of the steps in progress; a fresh lane's step begins with it."""
        ...

    def stepper(self, slot: int, config: OptimizerConfig) -> Stepper:
        """For the trial that was just opened in this slot."""
        ...

    def step(self, rates: dict[int, float]) -> list[float]:
        """Clip and apply the gradients of these slots, each at its learning rate.

        Returns the norms before clipping, in order. A gradient that is not finite is not applied.
        """
        ...

    def close(self) -> None: ...


class RowEngine:
    """Autograd's gradients go into the slots' rows; any number of slots."""

    in_step = False

    def __init__(self, slots: Slots, program: Program, replicas: Replicas) -> None:
        self.program = program
        self._slots = slots
        self._replicas = replicas
        self._steppers: dict[int, RowStepper] = {}
        self._optimizers = [RowOptimizers(nn.Parameter(row)) for row in slots.rows]

    def forward(self, run: Callable[[], Result]) -> Result:
        return run()

    def backward(self, hidden: Tensor, gradient: Tensor, fresh: Sequence[bool]) -> None:
        self.program.backward(hidden, gradient, fresh)

    def stepper(self, slot: int, config: OptimizerConfig) -> Stepper:
        stepper = RowStepper(self._optimizers[slot], self._slots.gradients[slot], config)
        self._steppers[slot] = stepper
        return stepper

    def step(self, rates: dict[int, float]) -> list[float]:
        for slot in rates:
            # Each row by itself: three workers or more add in an order that goes by an element's
            # place in the buffer, which its neighbours must not change.
            self._replicas.sum(self._slots.gradients[slot])
        steppers = [self._steppers[slot] for slot in rates]
        gradients = [self._slots.gradients[slot] for slot in rates]
        norms = torch.stack([*map(torch.linalg.vector_norm, gradients)])
        frugal = self.program.frugal and gradients[0].is_cuda
        if not frugal:
            self._queue(steppers, norms, list(rates.values()))
        found: list[float] = norms.tolist()  # the one place where the CPU waits for the GPU
        if frugal:  # paged states come to where the activations were, and go again
            torch.cuda.empty_cache()
        for stepper, norm, rate in zip(steppers, found, rates.values(), strict=True):
            if math.isfinite(norm) and (frugal or not stepper.clips_itself):
                stepper.apply(norm, rate, frugal)
        return found

    def _queue(
        self, steppers: Sequence["RowStepper"], norms: Tensor, rates: Sequence[float]
    ) -> None:
        """The steps that need not know their gradient's norm."""
        if not any(stepper.clips_itself for stepper in steppers):
            return
        limits = staged(norms, [stepper.max_norm for stepper in steppers])
        limits = limits.to(norms.device, non_blocking=True)
        divisors, lost = clipping(norms, limits)
        numbers = zip(steppers, rates, divisors.unbind(), lost.unbind(), strict=True)
        for stepper, rate, divisor, is_lost in numbers:
            if stepper.clips_itself:
                stepper.queue(rate, divisor, is_lost)

    def close(self) -> None:
        pass


class RowStepper:
    copies = 2  # the row and its gradient

    def __init__(
        self, optimizers: RowOptimizers, gradient: Tensor, config: OptimizerConfig
    ) -> None:
        self.layout = "" if config.name in ELEMENTWISE else "blocks of states along the row"
        self._row = optimizers.row
        self._row.grad = self._gradient = gradient
        self._optimizer = optimizers.begin(config)
        self.max_norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
        self.clips_itself = clips_itself(self._optimizer, self._row)

    def queue(self, rate: float, divisor: Tensor, is_lost: Tensor) -> None:
        queue_step(self._optimizer, divisor, is_lost, rate)

    def apply(self, norm: float, rate: float, page_out: bool) -> None:
        clip_and_step(self._optimizer, self._gradient, norm, self.max_norm, rate)
        if page_out:
            page_out_states(self._optimizer)

    def gather(self) -> Tensor:
        return self._row.data

    def scatter(self) -> None:
        pass

    def states(self) -> States:
        return optimizer_states(self._optimizer)

    def state_bytes(self) -> int:
        return num_state_bytes(self._optimizer)

    def restore(self, states: States) -> None:
        restore_optimizer(self._optimizer, states)

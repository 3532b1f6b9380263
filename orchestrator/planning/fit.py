"""Which of its options a pack takes, from the memory that its worker has, each with its reason.

In: Premises and a PackWish. Out: a Fit. Pure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orchestrator.planning.memory import GIB, PackLoad, PackMemory, estimate_memory
from orchestrator.planning.options import (
    MAX_AUTO_SLOTS_CPU,
    PackWish,
    Premises,
    balanced_slots,
    max_slots,
    pack_loads,
    step_program,
)
from orchestrator.planning.shape import UnknownShape
from orchestrator.records import StepProgram

# The estimate's error, and what else there is on the device.
BUDGET_FRACTION = 0.9


@dataclass(frozen=True)
class Fit:
    """How a pack uses its workers."""

    num_slots: int
    micro_batch_size: int
    """Blocks of each slot in one forward pass of one worker."""
    dequantise_once: bool
    gradient_checkpointing: bool
    step_program: StepProgram
    memory: PackMemory | None
    """Expected of one worker; None where it is not estimated."""
    budget_bytes: int
    """0 where it is unknown."""
    reasons: tuple[str, ...]


def fit(premises: Premises, wish: PackWish) -> Fit:
    """The most wanted option that the memory holds, or the one that needs least if none does."""
    shape, unknown = premises.shape, _why_unknown(premises, wish)
    if unknown or isinstance(shape, UnknownShape):
        return _without_estimate(premises, wish, unknown)
    budget_bytes = int(BUDGET_FRACTION * premises.worker_memory_bytes)
    options = [(load, estimate_memory(shape, load)) for load in pack_loads(premises, wish)]
    holding = [option for option in options if option[1].total_bytes <= budget_bytes]
    load, memory = holding[0] if holding else min(options, key=lambda option: option[1].total_bytes)
    why = _Reasons(premises, wish, load, options)
    verdict = "expects" if holding else "does not fit, the least is"
    budget = f"{verdict} {_gib(memory.total_bytes)} of {_gib(budget_bytes)}"
    return Fit(
        load.num_slots,
        load.micro_batch_size,
        load.dequantise_once,
        load.gradient_checkpointing,
        step_program(premises, wish),
        memory,
        budget_bytes,
        (
            why.slots(),
            why.micro_batch(),
            *why.residency(),
            why.recomputation(),
            _program_reason(premises, wish),
            *why.evaluation(memory),
            budget,
        ),
    )


def _why_unknown(premises: Premises, wish: PackWish) -> str:
    if wish.zero:
        return "it is not estimated for DeepSpeed"
    if isinstance(premises.shape, UnknownShape):
        return premises.shape.reason
    if not premises.worker_memory_bytes:
        return f"the size of the {premises.device} worker's memory cannot be read"
    return ""


def _without_estimate(premises: Premises, wish: PackWish, unknown: str) -> Fit:
    """What needs least work, the memory's size left to the user's settings."""
    num_slots = wish.num_slots or balanced_slots(wish.share, MAX_AUTO_SLOTS_CPU)[0]
    micro = wish.micro_batch_size or wish.worker_blocks
    resident = wish.can_be_resident and bool(premises.resources.dequantise_once)
    recomputes = bool(wish.gradient_checkpointing)
    reasons = (
        _set_slots(wish) or f"{_slots(num_slots)} for {wish.share} (at most {MAX_AUTO_SLOTS_CPU})",
        f"{_blocks(micro)} in a pass",
        *(["dequantised once, as set"] if resident else []),
        *(["recomputation, as set"] if recomputes else []),
        _program_reason(premises, wish),
        f"memory unknown: {unknown}",
    )
    program = step_program(premises, wish)
    return Fit(num_slots, micro, resident, recomputes, program, None, 0, reasons)


@dataclass(frozen=True)
class _Reasons:
    """Says of each choice whether it was set, wanted, or forced by the memory."""

    premises: Premises
    wish: PackWish
    chosen: PackLoad
    options: Sequence[tuple[PackLoad, PackMemory]]

    def slots(self) -> str:
        if words := _set_slots(self.wish):
            return words
        wanted = self.options[0][0]
        count = self.chosen.num_slots
        if count < wanted.num_slots:
            more = min(load.num_slots for load, _ in self.options if load.num_slots > count)
            needed = self._least(lambda load: load.num_slots == more)
            return f"{_slots(count)} for {self.wish.share}: {more} need {needed}"
        most = max_slots(self.premises, wanted.micro_batch_size)
        return f"{_slots(count)} for {self.wish.share} (at most {most})"

    def micro_batch(self) -> str:
        micro = self.chosen.micro_batch_size
        if self.wish.micro_batch_size is not None:
            return f"{_blocks(micro)} in a pass, as set"
        if micro == self.wish.worker_blocks:
            return f"all {_blocks(micro)} in one pass"
        words = f"{micro} of {_blocks(self.wish.worker_blocks)} in a pass"
        if micro == self.options[0][0].micro_batch_size:
            return f"{words}, which fill the GPU"
        sizes = {load.micro_batch_size for load, _ in self.options}
        more = min(size for size in sizes if size > micro)
        needed = self._least(
            lambda load: (load.num_slots, load.micro_batch_size) == (self.chosen.num_slots, more)
        )
        return f"{words}: {more} need {needed}"

    def residency(self) -> list[str]:
        if not self.wish.can_be_resident:
            return []
        words = "dequantised once" if self.chosen.dequantise_once else "dequantised at every use"
        if self.premises.resources.dequantise_once is not None:
            return [f"{words}, as set"]
        if self.chosen.dequantise_once:
            return [words]
        needed = self._least(lambda load: load == replace(self.chosen, dequantise_once=True))
        return [f"{words}: once needs {needed}"]

    def recomputation(self) -> str:
        words = "recomputation" if self.chosen.gradient_checkpointing else "no recomputation"
        if self.wish.gradient_checkpointing is not None:
            return f"{words}, as set"
        if not self.chosen.gradient_checkpointing:
            return words
        needed = self._least(
            lambda load: (
                load.num_slots == self.chosen.num_slots
                and load.micro_batch_size == self.chosen.micro_batch_size
                and not load.gradient_checkpointing
            )
        )
        return f"{words}: without it {needed}"

    def evaluation(self, memory: PackMemory) -> list[str]:
        """Where less was chosen for the sake of evaluation, which the user can change alone."""
        if self.chosen == self.options[0][0] or memory.evaluation_bytes <= memory.training_bytes:
            return []
        return [
            f"evaluation.batch_size={self.chosen.evaluation_batch_size} takes "
            f"{_gib(memory.evaluation_bytes)}, a training pass {_gib(memory.training_bytes)}"
        ]

    def _least(self, matches: Callable[[PackLoad], bool]) -> str:
        return _gib(min(memory.total_bytes for load, memory in self.options if matches(load)))


def _set_slots(wish: PackWish) -> str:
    if wish.alone:
        return f"alone, for {wish.alone}"
    return f"{_slots(wish.num_slots)}, as set" if wish.num_slots is not None else ""


def _program_reason(premises: Premises, wish: PackWish) -> str:
    program = step_program(premises, wish)
    if wish.only_eager:
        return f"step program {program}, for {wish.only_eager}"
    as_set = "" if premises.resources.step_program == "auto" else ", as set"
    return f"step program {program}{as_set}"


def _slots(count: int) -> str:
    return "1 slot" if count == 1 else f"{count} slots"


def _blocks(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"

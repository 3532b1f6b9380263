"""Which of its options a pack takes, from the memory that its worker has, each with its reason.

In: Premises and a PackWish. Out: a Fit. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from orchestrator.planning.load import PackLoad
from orchestrator.planning.memory import GIB, PackMemory, estimate_memory
from orchestrator.planning.options import (
    PackWish,
    Premises,
    balanced_slots,
    max_slots,
    pack_loads,
    step_program,
)
from orchestrator.planning.shape import BaseShape, UnknownShape
from orchestrator.records import StepProgram
from orchestrator.wording import counted

# The estimate's error, and what else there is on the device.
BUDGET_FRACTION = 0.9
# Of the memory that a lost pack was expected to need, what the next ones may.
OUT_OF_MEMORY_FACTOR = 0.8

Choices = tuple[int | bool, ...]
"""(slots, micro-batch, recomputation, dequantised once, in place), or the beginning of it."""


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

    @property
    def fits(self) -> bool:
        """As far as is known."""
        return self.memory is None or self.memory.total_bytes <= self.budget_bytes


@lru_cache(maxsize=4096)
def fit(premises: Premises, wish: PackWish) -> Fit:
    """The most wanted option that the memory holds, or the one that needs least if none does."""
    shape, unknown = premises.shape, _why_unknown(premises, wish)
    if unknown or isinstance(shape, UnknownShape):
        return _without_estimate(premises, wish, unknown)
    budget_bytes = int(BUDGET_FRACTION * premises.worker_memory_bytes)
    loads = list(pack_loads(premises, wish))
    load, memory, rejected = _first_that_fits(shape, loads, budget_bytes)
    verdict = "expects" if memory.total_bytes <= budget_bytes else "does not fit, the least is"
    why = _Reasons(premises, wish, loads[0], load, rejected)
    return Fit(
        load.num_slots,
        load.micro_batch_size,
        load.dequantise_once,
        load.gradient_checkpointing,
        load.step_program,
        memory,
        budget_bytes,
        (
            why.slots(),
            why.micro_batch(),
            *why.residency(),
            why.recomputation(),
            why.program(),
            *why.evaluation(shape, memory),
            f"{verdict} {_gib(memory.total_bytes)} of {_gib(budget_bytes)}",
        ),
    )


def after_out_of_memory(
    premises: Premises, wish: PackWish, lost: Fit
) -> tuple[Premises, str] | None:
    """What the planner goes by once a pack ran out of memory, and why; None where the pack could
    give up nothing more. The worker held less than was expected of it: plans need a fifth less."""
    if lost.memory is None:
        most = min(premises.max_slots_unknown, max(1, lost.num_slots // 2))
        known = replace(premises, max_slots_unknown=most)
        reason = f"{counted(lost.num_slots, 'slot')} ran out of memory: at most {most} from now on"
    else:
        expected = lost.memory.total_bytes
        held = int(OUT_OF_MEMORY_FACTOR * expected / BUDGET_FRACTION)
        known = replace(premises, worker_memory_bytes=min(premises.worker_memory_bytes, held))
        budget = _gib(int(BUDGET_FRACTION * known.worker_memory_bytes))
        reason = f"{_gib(expected)} were expected and not there: plans take {budget} from now on"
    return (known, reason) if _choices(fit(known, wish)) != _choices(lost) else None


def _first_that_fits(
    shape: BaseShape, loads: Sequence[PackLoad], budget_bytes: int
) -> tuple[PackLoad, PackMemory, dict[Choices, int]]:
    """The first load that the budget holds, else the least. And of those rejected the least bytes,
    by the beginnings of their choices."""
    rejected: dict[Choices, int] = {}
    options = []
    for load in loads:
        memory = estimate_memory(shape, load)
        if memory.total_bytes <= budget_bytes:
            return load, memory, rejected
        options.append((load, memory))
        choices = _choices(load)
        for length in range(1, len(choices) + 1):
            least = rejected.get(choices[:length], memory.total_bytes)
            rejected[choices[:length]] = min(least, memory.total_bytes)
    return *min(options, key=lambda option: option[1].total_bytes), rejected


def _choices(chosen: PackLoad | Fit) -> Choices:
    return (
        chosen.num_slots,
        chosen.micro_batch_size,
        chosen.gradient_checkpointing,
        chosen.dequantise_once,
        chosen.step_program == "in_place",
    )


def _why_unknown(premises: Premises, wish: PackWish) -> str:
    if isinstance(premises.shape, UnknownShape):
        return premises.shape.reason
    if not premises.worker_memory_bytes:
        return f"the size of the {premises.device} worker's memory cannot be read"
    return ""


def _without_estimate(premises: Premises, wish: PackWish, unknown: str) -> Fit:
    """On a GPU what takes little memory, on a CPU what needs least work."""
    num_slots = wish.num_slots or balanced_slots(wish.share, premises.max_slots_unknown)[0]
    careful = premises.device == "cuda"
    micro = wish.micro_batch_size or (1 if careful else wish.worker_blocks)
    resident = wish.can_be_resident and bool(premises.resources.dequantise_once)
    recomputes = careful if wish.gradient_checkpointing is None else wish.gradient_checkpointing
    why = ", as the memory is unknown" if careful else ""
    reasons = (
        _set_slots(wish)
        or f"{counted(num_slots, 'slot')} for {wish.share} (at most {premises.max_slots_unknown})",
        f"{counted(micro, 'block')} in a pass"
        + (why if wish.micro_batch_size is None else f", {wish.as_set}"),
        *(["dequantised once, as set"] if resident else []),
        _set_recomputation(wish) or (f"recomputation{why}" if recomputes else "no recomputation"),
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
    wanted: PackLoad
    chosen: PackLoad
    rejected: Mapping[Choices, int]

    def slots(self) -> str:
        if words := _set_slots(self.wish):
            return words
        words = f"{counted(self.chosen.num_slots, 'slot')} for {self.wish.share}"
        if self.chosen.num_slots == self.wanted.num_slots:
            most = max_slots(self.premises, self.wanted.micro_batch_size)
            return f"{words} (at most {most})"
        return f"{words}: {self._next_more()}"

    def micro_batch(self) -> str:
        micro = self.chosen.micro_batch_size
        if self.wish.micro_batch_size is not None:
            return f"{counted(micro, 'block')} in a pass, {self.wish.as_set}"
        if micro == self.wish.worker_blocks:
            return f"all {counted(micro, 'block')} in one pass"
        words = f"{micro} of {counted(self.wish.worker_blocks, 'block')} in a pass"
        if micro == self.wanted.micro_batch_size:
            return f"{words}, which fill the GPU"
        recomputes = self.chosen.gradient_checkpointing or self.wish.gradient_checkpointing is False
        condition = "" if recomputes else " without recomputation"
        return f"{words}: {self._next_more(self.chosen.num_slots)}{condition}"

    def residency(self) -> list[str]:
        if not self.wish.can_be_resident:
            return []
        words = "dequantised once" if self.chosen.dequantise_once else "dequantised at every use"
        if self.premises.resources.dequantise_once is not None:
            return [f"{words}, as set"]
        if self.chosen.dequantise_once:
            return [words]
        needed = self.rejected[(*_choices(self.chosen)[:3], True)]
        return [f"{words}: once needs {_gib(needed)}"]

    def recomputation(self) -> str:
        if words := _set_recomputation(self.wish):
            return words
        if not self.chosen.gradient_checkpointing:
            return "no recomputation"
        needed = self.rejected[(*_choices(self.chosen)[:2], False)]
        return f"recomputation: without it {_gib(needed)}"

    def program(self) -> str:
        if self.chosen.step_program == self.wanted.step_program:
            return _program_reason(self.premises, self.wish)
        needed = self.rejected[(*_choices(self.chosen)[:4], False)]
        return f"step program in_place: {self.wanted.step_program} needs {_gib(needed)}"

    def evaluation(self, shape: BaseShape, memory: PackMemory) -> list[str]:
        """Where less was chosen for the sake of evaluation, which the user can change alone."""
        chosen = self.chosen
        if chosen == self.wanted or memory.evaluation_bytes <= memory.training_bytes:
            return []
        without = estimate_memory(shape, replace(chosen, generated_tokens=0))
        if memory.evaluation_bytes > without.evaluation_bytes:
            words = f"evaluation.task.batch_size={chosen.generation_batch_size}"
        elif chosen.eager:
            words = f"evaluation.batch_size={chosen.evaluation_batch_size}"
        else:
            return []
        return [
            f"{words} takes {_gib(memory.evaluation_bytes)}, a training pass "
            f"{_gib(memory.training_bytes)}"
        ]

    def _next_more(self, *given: int) -> str:
        """What the next larger number needs, with the choices before it `given`."""
        place = len(given)
        count = _choices(self.chosen)[place]
        needs = {key[place]: size for key, size in self.rejected.items() if key[:-1] == given}
        more = min(other for other in needs if other > count)
        return f"{more} need {_gib(needs[more])}"


def _set_slots(wish: PackWish) -> str:
    if wish.alone:
        return f"alone, for {wish.alone}"
    return f"{counted(wish.num_slots, 'slot')}, as set" if wish.num_slots is not None else ""


def _set_recomputation(wish: PackWish) -> str:
    if wish.gradient_checkpointing is None:
        return ""
    words = "recomputation" if wish.gradient_checkpointing else "no recomputation"
    return f"{words}, {wish.as_set}"


def _program_reason(premises: Premises, wish: PackWish) -> str:
    program = step_program(premises, wish)
    if wish.only_eager:
        return f"step program {program}, for {wish.only_eager}"
    as_set = "" if premises.resources.step_program == "auto" else ", as set"
    return f"step program {program}{as_set}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"

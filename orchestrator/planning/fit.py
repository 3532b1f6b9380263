"""What a pack takes of its worker, each choice with its reason.

In: Premises and a PackWish. Out: a Fit. Pure.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from orchestrator.planning.choice import EQUALLY_FAST, Choice, choose
from orchestrator.planning.memory import GIB, PackMemory, estimate_memory
from orchestrator.planning.options import (
    MIN_PASS_TOKENS,
    Option,
    PackWish,
    Premises,
    balanced_slots,
    max_slots,
    step_program,
)
from orchestrator.planning.shape import BaseShape, UnknownShape
from orchestrator.records import StepProgram
from orchestrator.wording import counted

# The estimate's error, and what else there is on the device.
BUDGET_FRACTION = 0.9
# Of the memory that a lost pack was expected to need, what the next ones may.
OUT_OF_MEMORY_FACTOR = 0.8


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
    kept_layers: int = 0
    """The base's last ones, which gradient_checkpointing leaves out."""

    @property
    def fits(self) -> bool:
        """As far as is known."""
        return self.memory is None or self.memory.total_bytes <= self.budget_bytes


@lru_cache(maxsize=4096)
def fit(premises: Premises, wish: PackWish) -> Fit:
    """The option that trains soonest of those that the memory holds; where none fits, the least."""
    shape, unknown = premises.shape, _why_unknown(premises, wish)
    if unknown or isinstance(shape, UnknownShape):
        return _without_estimate(premises, wish, unknown)
    budget_bytes = int(BUDGET_FRACTION * premises.worker_memory_bytes)
    choice = choose(premises, wish, shape, budget_bytes)
    option = choice.option
    memory = choice.costs.memory(option)
    verdict = "expects" if choice.fits(option) else "does not fit, the least is"
    why = _Reasons(premises, wish, choice)
    return Fit(
        option.num_slots,
        option.micro_batch_size,
        option.dequantise_once,
        option.gradient_checkpointing,
        choice.costs.load(option).step_program,
        memory,
        budget_bytes,
        (
            why.slots(),
            why.micro_batch(),
            *why.residency(),
            why.recomputation(shape),
            why.program(),
            *why.evaluation(shape, memory),
            f"{verdict} {_gib(memory.total_bytes)} of {_gib(budget_bytes)}",
        ),
        option.kept_layers,
    )


def after_out_of_memory(
    premises: Premises, wish: PackWish, lost: Fit
) -> tuple[Premises, str] | None:
    """What the planner goes by for such packs once one ran out of memory, and why; None where it
    could give up nothing more. The worker held less than was expected of it: plans need a fifth
    less."""
    if lost.memory is None:
        most = min(premises.max_slots_unknown, max(1, lost.num_slots // 2))
        known = replace(premises, max_slots_unknown=most)
        reason = f"{counted(lost.num_slots, 'slot')} ran out of memory: at most {most} from now on"
    else:
        expected = lost.memory.total_bytes
        held = int(OUT_OF_MEMORY_FACTOR * expected / BUDGET_FRACTION)
        known = replace(premises, worker_memory_bytes=min(premises.worker_memory_bytes, held))
        budget = _gib(int(BUDGET_FRACTION * known.worker_memory_bytes))
        reason = (
            f"{_gib(expected)} were expected and not there: such packs take {budget} from now on"
        )
    return (known, reason) if _choices(fit(known, wish)) != _choices(lost) else None


def _choices(chosen: Fit) -> tuple[object, ...]:
    return (
        chosen.num_slots,
        chosen.micro_batch_size,
        chosen.gradient_checkpointing,
        chosen.kept_layers,
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
    set_by_user = wish.gradient_checkpointing
    recomputes = careful if set_by_user is None else bool(set_by_user)
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
    kept = wish.kept_layers or 0
    return Fit(num_slots, micro, resident, recomputes, program, None, 0, reasons, kept)


@dataclass(frozen=True)
class _Reasons:
    """Says of each choice whether it was set, wanted, forced by the memory, or the faster one."""

    premises: Premises
    wish: PackWish
    choice: Choice

    @property
    def chosen(self) -> Option:
        return self.choice.option

    def slots(self) -> str:
        if words := _set_slots(self.wish):
            return words
        chosen, wanted = self.chosen, self.choice.wanted
        words = f"{counted(chosen.num_slots, 'slot')} for {self.wish.share}"
        more = [
            option
            for option in self._recorded()
            if option.num_slots > chosen.num_slots
            and (
                option.num_slots <= wanted.num_slots
                or option.micro_batch_size == chosen.micro_batch_size
            )
        ]
        if not more or chosen[:2] == wanted[:2]:
            same = chosen.num_slots == wanted.num_slots
            micro = (wanted if same else chosen).micro_batch_size
            return f"{words} (at most {max_slots(self.premises, micro)})"
        next_more = min(option.num_slots for option in more)
        least = self._least([option for option in more if option.num_slots == next_more])
        return f"{words}: {self._why_not_more(more, f'{next_more} need {_gib(least)}')}"

    def micro_batch(self) -> str:
        chosen, blocks = self.chosen, self.wish.worker_blocks
        micro = chosen.micro_batch_size
        if self.wish.micro_batch_size is not None:
            return f"{counted(micro, 'block')} in a pass, {self.wish.as_set}"
        if micro == blocks:
            return f"all {counted(micro, 'block')} in one pass"
        words = f"{micro} of {counted(blocks, 'block')} in a pass"
        if micro == self.choice.wanted.micro_batch_size:
            return f"{words}, which fill the GPU"
        more = [
            option
            for option in self._recorded()
            if option.micro_batch_size > micro
            and option.gradient_checkpointing == chosen.gradient_checkpointing
        ]
        more = [option for option in more if option.num_slots == chosen.num_slots] or more
        next_more = min(option.micro_batch_size for option in more)
        least = self._least([option for option in more if option.micro_batch_size == next_more])
        free = not chosen.gradient_checkpointing and self.wish.gradient_checkpointing is None
        condition = " without recomputation" if free else ""
        return f"{words}: {self._why_not_more(more, f'{next_more} need {_gib(least)}{condition}')}"

    def residency(self) -> list[str]:
        if not self.wish.can_be_resident:
            return []
        chosen = self.chosen
        words = "dequantised once" if chosen.dequantise_once else "dequantised at every use"
        if self.premises.resources.dequantise_once is not None:
            return [f"{words}, as set"]
        if chosen.dequantise_once:
            return [words]
        resident = self._but(dequantise_once=True)
        how_long = self._how_long(resident)
        if how_long and resident in self.choice.options and self.choice.fits(resident):
            return [f"{words}: {self._in_words(resident)} would take {how_long}"]
        return [f"{words}: once needs {_gib(self.choice.costs.needed(resident))}"]

    def recomputation(self, shape: BaseShape) -> str:
        chosen, wish = self.chosen, self.wish
        if wish.gradient_checkpointing is not None and not wish.may_keep_layers:
            return _set_recomputation(wish)
        if not chosen.gradient_checkpointing:
            return "no recomputation"
        recomputed = shape.num_layers - chosen.kept_layers
        words = f"recomputation in {recomputed} of {counted(shape.num_layers, 'layer')}"
        if wish.gradient_checkpointing is not None:
            return f"{words}, {wish.as_set}"
        without = [option for option in self._recorded() if not option.gradient_checkpointing]
        same = [option for option in without if option[:2] == chosen[:2]]
        words += f": without it {_gib(self._least(same))}"
        if (best := self.choice.best_of(without)) is None:
            return words
        how_long = self._how_long(best)
        why = f"a pass of less than {MIN_PASS_TOKENS:,} tokens"
        why = f"which would take {how_long}" if how_long else why
        return f"{words}, or {self._in_words(best)}, {why}"

    def program(self) -> str:
        if not self.chosen.in_place:
            return _program_reason(self.premises, self.wish)
        needed = self.choice.costs.needed(self._but(in_place=False))
        program = step_program(self.premises, self.wish)
        return f"step program in_place: {program} needs {_gib(needed)}"

    def evaluation(self, shape: BaseShape, memory: PackMemory) -> list[str]:
        """Where less was chosen for the sake of evaluation, which the user can change alone."""
        if self.chosen == self.choice.wanted or memory.evaluation_bytes <= memory.training_bytes:
            return []
        load = self.choice.costs.load(self.chosen)
        without = replace(load, generated_tokens=0)
        answers = load != without and estimate_memory(shape, without).evaluation_bytes
        if answers and memory.evaluation_bytes > answers:
            words = f"evaluation.task.batch_size={load.generation_batch_size}"
        elif load.eager:
            words = f"evaluation.batch_size={load.evaluation_batch_size}"
        else:
            return []
        return [
            f"{words} takes {_gib(memory.evaluation_bytes)}, a training pass "
            f"{_gib(memory.training_bytes)}"
        ]

    def _but(self, **changes: bool) -> Option:
        """The option that differs from the chosen one in this, and in layers that are kept."""
        wanted = self.chosen._replace(kept_layers=0, **changes)
        options = self.choice.options
        return next((o for o in options if o._replace(kept_layers=0) == wanted), wanted)

    def _recorded(self) -> list[Option]:
        """All but the last resort."""
        return [option for option in self.choice.options if not option.in_place]

    def _least(self, options: list[Option]) -> int:
        return min(self.choice.costs.needed(option) for option in options)

    def _why_not_more(self, more: list[Option], needs: str) -> str:
        """`needs` where none of these fits, else what the best that does would have meant."""
        if (best := self.choice.best_of(more)) is None:
            return needs
        if (how_long := self._how_long(best)) is None:
            return f"more would mean {self._in_words(best)}"
        return f"{self._in_words(best)} would take {how_long}"

    def _how_long(self, option: Option) -> str | None:
        times = self.choice.times_as_long(option)
        if times is None:
            return None
        return "as long" if times <= EQUALLY_FAST else f"{times:.2f} times as long"

    def _in_words(self, option: Option) -> str:
        """How it differs from what was chosen."""
        chosen, words = self.chosen, []
        if option.num_slots != chosen.num_slots:
            words.append(counted(option.num_slots, "slot"))
        if option.micro_batch_size != chosen.micro_batch_size:
            words.append(f"{counted(option.micro_batch_size, 'block')} in a pass")
        if option.gradient_checkpointing and not chosen.gradient_checkpointing:
            words.append("with recomputation")
        elif option.gradient_checkpointing and option.kept_layers < chosen.kept_layers:
            words.append("with recomputation in more layers")
        if option.dequantise_once != chosen.dequantise_once:
            words.append("dequantised " + ("once" if option.dequantise_once else "at every use"))
        return ", ".join(words).replace(", with", " with")


def _set_slots(wish: PackWish) -> str:
    if wish.alone:
        return f"alone, for {wish.alone}"
    return f"{counted(wish.num_slots, 'slot')}, as set" if wish.num_slots is not None else ""


def _set_recomputation(wish: PackWish) -> str:
    if wish.gradient_checkpointing is None:
        return ""
    words = "recomputation" if wish.gradient_checkpointing else "no recomputation"
    words += f" but in {counted(wish.kept_layers, 'layer')}" if wish.kept_layers else ""
    return f"{words}, {wish.as_set}"


def _program_reason(premises: Premises, wish: PackWish) -> str:
    program = step_program(premises, wish)
    if wish.only_eager:
        return f"step program {program}, for {wish.only_eager}"
    as_set = "" if premises.resources.step_program == "auto" else ", as set"
    return f"step program {program}{as_set}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"

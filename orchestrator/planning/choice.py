"""Which of its options a pack takes: of those that the memory holds, the one that trains soonest.

In: Premises and a PackWish. Out: a Choice. Pure, no torch.

What counts is the time for a step of all trials that the pack will train: rounds of full slots and
the rest, each step its passes and the optimizer's part, by speed.py. Where the GPU's rates are not
known, and for ZeRO, whose traffic speed.py leaves out, the order of options.py decides. Activations
are computed again in as many of the base's first layers as the memory asks for.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from orchestrator.planning.lanes import fewest_lanes
from orchestrator.planning.load import PackLoad
from orchestrator.planning.memory import PackMemory, estimate_memory
from orchestrator.planning.options import (
    Option,
    PackWish,
    Premises,
    pack_load,
    pack_options,
    step_program,
)
from orchestrator.planning.shape import BaseShape
from orchestrator.planning.speed import StepTime, step_time

# Options whose times differ by less count as equally fast. speed.py is within 4 % of recorded
# packs; what two options share of that error does not change their order.
EQUALLY_FAST = 1.01


class Costs:
    """What options need and take, for packs that differ in nothing but their share. Each is worked
    out once: a sweep plans hundreds of packs of few sizes."""

    def __init__(self, premises: Premises, wish: PackWish, shape: BaseShape) -> None:
        self._premises, self._wish, self._shape = premises, wish, shape
        self._eager = step_program(premises, wish) in ("eager", "in_place")
        self._needed: dict[Option, int] = {}
        self._times: dict[Option, StepTime] = {}

    def load(self, option: Option) -> PackLoad:
        return pack_load(self._premises, self._wish, option)

    def memory(self, option: Option) -> PackMemory:
        return estimate_memory(self._shape, self.load(option))

    def needed(self, option: Option) -> int:
        """Bytes."""
        if option not in self._needed:
            self._needed[option] = self.memory(option).total_bytes
        return self._needed[option]

    @property
    def predicted(self) -> bool:
        """Whether anybody can say how long an option takes."""
        return self._premises.gpu is not None and not self._wish.zero

    def seconds(self, option: Option, share: int) -> float:
        """For a step of each of `share` trials, where it is predicted."""
        rounds, rest = divmod(share, option.num_slots)
        total = rounds * self._step_s(option, option.num_slots) if rounds else 0.0
        return total + self._step_s(option, rest) if rest else total

    def _step_s(self, option: Option, occupied: int) -> float:
        eager = self._eager or option.in_place
        lanes = occupied if eager else fewest_lanes(occupied, option.num_slots)
        used = option if lanes == option.num_slots else option._replace(num_slots=lanes)
        if used not in self._times:
            assert self._premises.gpu is not None
            self._times[used] = step_time(self._shape, self.load(used), self._premises.gpu)
        time = self._times[used]
        return self._wish.worker_blocks / option.micro_batch_size * time.pass_s + time.step_s


@dataclass(frozen=True)
class Choice:
    """The option that is taken, and what there is to say of the others."""

    option: Option
    options: tuple[Option, ...]
    """All, the most wanted first."""
    costs: Costs
    share: int
    budget_bytes: int

    @property
    def wanted(self) -> Option:
        return self.options[0]

    def fits(self, option: Option) -> bool:
        return self.costs.needed(option) <= self.budget_bytes

    def times_as_long(self, option: Option) -> float | None:
        """As the one that is taken; None where nobody can say."""
        if not self.costs.predicted:
            return None
        own = self.costs.seconds(self.option, self.share)
        return self.costs.seconds(option, self.share) / own

    def best_of(self, options: Iterable[Option]) -> Option | None:
        """Of those that fit; None if none does."""
        fitting = [option for option in options if self.fits(option)]
        return _soonest(fitting, self.costs, self.share) if fitting else None


def choose(premises: Premises, wish: PackWish, shape: BaseShape, budget_bytes: int) -> Choice:
    """The option that trains soonest of those that fit, a step in place only where no other does;
    else the one that needs least."""
    costs = _costs(premises, replace(wish, share=1), shape)
    options = tuple(
        _keeping_most(option, costs, shape.num_layers, budget_bytes)
        if option.gradient_checkpointing and wish.may_keep_layers
        else option
        for option in pack_options(premises, wish)
    )
    taken = _taken(options, costs, wish.share, budget_bytes)
    return Choice(taken, options, costs, wish.share, budget_bytes)


def _keeping_most(option: Option, costs: Costs, num_layers: int, budget_bytes: int) -> Option:
    """With activations computed again in as few layers as the memory asks for."""

    def too_large(kept: int) -> bool:
        return costs.needed(option._replace(kept_layers=kept)) > budget_bytes

    kept = bisect_left(range(1, num_layers), True, key=too_large)
    return option._replace(kept_layers=kept)


def _taken(options: Sequence[Option], costs: Costs, share: int, budget_bytes: int) -> Option:
    fitting = [option for option in options if costs.needed(option) <= budget_bytes]
    if fitting:
        recorded = [option for option in fitting if not option.in_place]
        return _soonest(recorded or fitting, costs, share)
    return min(options, key=costs.needed)


def _soonest(options: Sequence[Option], costs: Costs, share: int) -> Option:
    """The first of those that are equally fast."""
    if not costs.predicted:
        return options[0]
    seconds = [costs.seconds(option, share) for option in options]
    most = EQUALLY_FAST * min(seconds)
    return next(option for option, own in zip(options, seconds, strict=True) if own <= most)


@lru_cache(maxsize=256)
def _costs(premises: Premises, wish: PackWish, shape: BaseShape) -> Costs:
    return Costs(premises, wish, shape)

"""The trials that wait, indexed by the pack that can train them, so that a decision costs what it
changes and not what waits.

Waiting is kept by whoever runs a sweep, and is read by decisions. Lines is what one decision has
not given out yet of it. Pure: no torch, no Ray.
"""

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from orchestrator.config import QuantConfig, Recomputation, StrategyConfig, TrialConfig
from orchestrator.files import record_digest
from orchestrator.planning.compatibility import problems
from orchestrator.planning.options import Premises
from orchestrator.records import Arithmetic, TrialSpec

Kept = Mapping[int, Arithmetic]
"""Of half-trained trials, by number."""
FRESH: Kept = {}

Place = tuple[int, int]
"""(minus the work, number) of a trial."""


@dataclass(frozen=True)
class PackKey:
    """Trials with an equal key can share a pack: one base, one program."""

    quant: QuantConfig
    strategy: tuple[tuple[str, Any], ...]
    micro_batch_size: int | None
    """As set; then batch sizes may differ, and a slot with more passes steps less often."""
    batch_size: int | None
    """Where no micro-batch is set: the planner then divides this one."""
    gradient_checkpointing: Recomputation | None
    """As set."""
    dora: bool
    """Its members have magnitudes, all or none: others' programs stay as they are."""
    alone: str
    """Not empty for a trial that cannot share: says why."""
    max_slots: int | None = None
    """Of trials whose pack raised an error: they are parted until the one at fault is found."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Made once: a decision looks up a thousand packs by their keys."""
        return hash((self.quant, self.strategy, self.micro_batch_size, self.batch_size))

    @property
    def digest(self) -> str:
        """Its name in records."""
        return record_digest(repr(self))[:16]

    @property
    def title(self) -> str:
        return f"{self.quant.title}, DoRA" if self.dora else self.quant.title

    @property
    def zero(self) -> bool:
        return bool(dict(self.strategy)["kind"] == "zero")

    @property
    def unlimited(self) -> "PackKey":
        """Of all trials on the same base with the same program."""
        return replace(self, max_slots=None)


def pack_key(trial: TrialConfig, max_slots: int | None = None) -> PackKey:
    batch_size = trial.batch_size if trial.micro_batch_size is None else None
    return _pack_key(
        trial.quant,
        trial.strategy,
        trial.micro_batch_size,
        batch_size,
        trial.gradient_checkpointing,
        trial.adapter.use_dora,
        max_slots,
    )


@lru_cache(maxsize=4096)
def _pack_key(
    quant: QuantConfig,
    strategy: StrategyConfig,
    micro_batch_size: int | None,
    batch_size: int | None,
    gradient_checkpointing: Recomputation | None,
    dora: bool,
    max_slots: int | None,
) -> PackKey:
    return PackKey(
        quant,
        tuple(sorted(strategy.model_dump().items())),
        micro_batch_size,
        batch_size,
        gradient_checkpointing,
        dora,
        _why_alone(quant, strategy),
        max_slots,
    )


def _why_alone(quant: QuantConfig, strategy: StrategyConfig) -> str:
    if strategy.kind == "zero":
        return "strategy.kind: zero gives each trial a DeepSpeed engine of its own"
    if quant.llm_int8:
        # bitsandbytes 0.50 finds outlier columns over the whole batch, neighbours included.
        return "LLM.int8 treats a batch as one: neighbours would change each other's numbers"
    return ""


def work(trial: TrialConfig) -> int:
    """Blocks that it trains."""
    return trial.steps * trial.batch_size


class Waiting(Sequence[TrialSpec]):
    """Trials without problems, each key's in the order in which they should start: the longest
    first, since one that is begun last would be waited for, or all in the order of their numbers.
    """

    def __init__(self, trials: Iterable[TrialSpec] = (), in_turn: bool = False) -> None:
        self.in_turn = in_turn
        self._trials: dict[int, TrialSpec] = {}
        self._places: dict[PackKey, list[Place]] = {}
        self._batches: dict[PackKey, Counter[int]] = {}
        self._work: Counter[PackKey] = Counter()
        self.all_work = 0
        """Blocks that all of them train."""
        self._max_slots: dict[int, int] = {}
        for trial in trials:
            self.add(trial)

    def key(self, trial: TrialSpec) -> PackKey:
        return pack_key(trial.config, self._max_slots.get(trial.number))

    def limit(self, number: int, max_slots: int) -> None:
        """From now on this trial, which may be under way, waits for packs of so many slots."""
        waits = self._trials.get(number)
        if waits is not None:
            self.remove(number)
        self._max_slots[number] = max_slots
        if waits is not None:
            self.add(waits)

    def add(self, trial: TrialSpec) -> None:
        key = self.key(trial)
        self._trials[trial.number] = trial
        insort(self._places.setdefault(key, []), _place(trial), key=self._order)
        self._batches.setdefault(key, Counter())[trial.config.batch_size] += 1
        self._work[key] += work(trial.config)
        self.all_work += work(trial.config)

    def remove(self, number: int) -> None:
        trial = self._trials.pop(number)
        key = self.key(trial)
        places = self._places[key]
        del places[bisect_left(places, self._order(_place(trial)), key=self._order)]
        self._batches[key][trial.config.batch_size] -= 1
        self._work[key] -= work(trial.config)
        self.all_work -= work(trial.config)
        if not places:
            del self._places[key], self._batches[key], self._work[key]

    def _order(self, place: Place) -> Place:
        return (0, place[1]) if self.in_turn else place

    def keep_to(self, numbers: AbstractSet[int], trials: Mapping[int, TrialSpec]) -> None:
        """Make these the trials that wait, at the cost of what has changed."""
        for number in self._trials.keys() - numbers:
            self.remove(number)
        for number in sorted(numbers - self._trials.keys()):
            self.add(trials[number])

    @property
    def keys(self) -> Iterable[PackKey]:
        return self._places

    def places(self, key: PackKey) -> Sequence[Place]:
        return self._places.get(key, ())

    def batches(self, key: PackKey) -> Counter[int]:
        """Trials of a key by their batch."""
        return self._batches.get(key, Counter())

    def work(self, key: PackKey) -> int:
        """Blocks that all trials of a key train."""
        return self._work[key]

    def trial(self, number: int) -> TrialSpec:
        return self._trials[number]

    def among(self, numbers: Iterable[int]) -> list[TrialSpec]:
        """Those that wait, by number."""
        found = self._trials.keys() & numbers
        return [self._trials[number] for number in sorted(found)]

    def __contains__(self, number: object) -> bool:
        return number in self._trials

    def __len__(self) -> int:
        return len(self._trials)

    def __iter__(self) -> Iterator[TrialSpec]:
        return iter(self._trials.values())

    def __getitem__(self, index: Any) -> Any:
        return list(self._trials.values())[index]


def indexed(trials: Sequence[TrialSpec], premises: Premises) -> Waiting:
    """Without those that cannot be trained: a pack for them would be started and released for
    ever."""
    if isinstance(trials, Waiting):
        return trials
    workers = premises.resources.workers_per_pack
    able = (trial for trial in trials if not problems(trial.config, workers))
    return Waiting(able, premises.in_turn)


class Lines:
    """The half-trained come first: a fresh trial can take any slot that they leave."""

    def __init__(self, waiting: Waiting, kept: Kept) -> None:
        self._waiting = waiting
        self._kept = kept
        self._half: dict[PackKey, list[TrialSpec]] = {}
        for trial in waiting.among(kept):
            self._half.setdefault(waiting.key(trial), []).append(trial)
        self._taken: set[int] = set()
        self._first: dict[PackKey, int] = {}
        """Of each key's places, that before which all are taken."""
        self._fresh: dict[PackKey, Counter[int]] = {}
        self._num_taken: Counter[PackKey] = Counter()
        self._work_taken: Counter[PackKey] = Counter()

    @property
    def keys(self) -> list[PackKey]:
        """Of those that some trial is left for."""
        return [key for key in self._waiting.keys if self.left(key)]

    def left(self, key: PackKey) -> int:
        return len(self._waiting.places(key)) - self._num_taken[key]

    def work_left(self, key: PackKey) -> int:
        return self._waiting.work(key) - self._work_taken[key]

    @property
    def all_work_left(self) -> int:
        return self._waiting.all_work - self._work_taken.total()

    def shortest(self, key: PackKey) -> int:
        """Work of the shortest trial that is left of a key, which has some; 0 where one is
        half-trained, as that goes first."""
        if any(trial.number not in self._taken for trial in self._half.get(key, ())):
            return 0
        places = self._waiting.places(key)
        left = (-work for work, number in reversed(places) if number not in self._taken)
        return min(left) if self._waiting.in_turn else next(left)

    @property
    def all_left(self) -> int:
        return len(self._waiting) - len(self._taken)

    def half_trained(self, key: PackKey, most_workers: int) -> Arithmetic | None:
        """What the next pack has to keep: of the first such trial that the workers allow."""
        had = (self._kept[t.number] for t in self._half.get(key, ()) if t.number not in self._taken)
        return next((one for one in had if one.world_size <= most_workers), None)

    def count(self, key: PackKey, arithmetic: Arithmetic | None) -> int:
        """Trials that a pack with it can train; None: the fresh ones."""
        fresh = self._fresh_batches(key)
        if arithmetic is None:
            return fresh.total()
        blocks = arithmetic.pass_blocks
        half = sum(
            self._kept[trial.number] == arithmetic
            for trial in self._half.get(key, ())
            if trial.number not in self._taken
        )
        return half + sum(number for size, number in fresh.items() if size % blocks == 0)

    def parts(self, key: PackKey) -> int:
        """Most workers that can share a step of each fresh trial."""
        return math.gcd(
            *(
                size // (key.micro_batch_size or 1)
                for size, number in self._fresh_batches(key).items()
                if number
            )
        )

    def take(
        self, key: PackKey, arithmetic: Arithmetic, most: int, longest: float = math.inf
    ) -> list[TrialSpec]:
        """The next trials for a pack, which it can train; they are given out with this. None has
        more work than `longest`, unless it is half-trained."""
        half = [t for t in self._half.get(key, ()) if t.number not in self._taken]
        found = [trial for trial in half if can_train(arithmetic, trial, self._kept)][:most]
        for trial in found:
            self._work_taken[key] += work(trial.config)
        fresh = self._fresh_places(key, arithmetic, most - len(found), longest)
        self._work_taken[key] -= sum(place[0] for place in fresh)
        found += [self._waiting.trial(number) for _, number in fresh]
        self._taken.update(trial.number for trial in found)
        self._num_taken[key] += len(found)
        if fresh:
            sizes = (trial.config.batch_size for trial in found[-len(fresh) :])
            self._fresh_batches(key).subtract(sizes)
        return found

    def _fresh_places(
        self, key: PackKey, arithmetic: Arithmetic, most: int, longest: float
    ) -> list[Place]:
        """A decision may go through a thousand of them: what they have in common is looked up
        once."""
        places, taken, kept = self._waiting.places(key), self._taken, self._kept
        first = self._first.get(key, 0)
        while first < len(places) and (places[first][1] in taken or places[first][1] in kept):
            first += 1
        self._first[key] = first
        alike = key.batch_size is not None
        if most < 1 or (key.batch_size or 0) % arithmetic.pass_blocks:
            return []
        if not self._waiting.in_turn:
            first = max(first, bisect_left(places, (-longest,)))
        found = []
        for index in range(first, len(places)):
            blocks, number = -places[index][0], places[index][1]
            if number in taken or number in kept or blocks > longest:
                continue
            if alike or can_train(arithmetic, self._waiting.trial(number), kept):
                found.append(places[index])
                if len(found) == most:
                    break
        return found

    def _fresh_batches(self, key: PackKey) -> Counter[int]:
        if key not in self._fresh:
            fresh = self._waiting.batches(key).copy()
            fresh.subtract(trial.config.batch_size for trial in self._half.get(key, ()))
            self._fresh[key] = fresh
        return self._fresh[key]


def can_train(arithmetic: Arithmetic, trial: TrialSpec, kept: Kept) -> bool:
    """Whether a pack of the trial's key can. Trials that set a micro-batch may differ in their
    batch, and workers share one evenly."""
    if trial.number in kept:
        return kept[trial.number] == arithmetic
    return trial.config.batch_size % arithmetic.pass_blocks == 0


def _place(trial: TrialSpec) -> Place:
    return -work(trial.config), trial.number

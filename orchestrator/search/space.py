"""The search space and its trials: which points there are, and which is trained next.

In: a SweepConfig, and the trials so far. Out: TrialSpecs, or a ConfigError that lists what cannot
work. `ask` is a function of its arguments, see samplers.py, so a resumed sweep asks what an
undisturbed one would have asked for at that point. KnownPoints only saves doing it all again.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.config import SweepConfig, TrialConfig
from orchestrator.errors import ConfigError
from orchestrator.loading import trial_with
from orchestrator.planning.compatibility import RULED_FIELDS, problems
from orchestrator.planning.ranks import largest_rank, saved_bytes
from orchestrator.planning.shape import BaseShape, UnknownShape
from orchestrator.planning.sweep_rules import sweep_problems
from orchestrator.planning.unread import unread
from orchestrator.records import TrialResult, TrialSpec
from orchestrator.search.objectives import MB
from orchestrator.search.samplers import STARTUP_TRIALS, Draw, Point, draw, point_set
from orchestrator.search_config import Choice, RangeConfig, SearchConfig, Values, encoded

NOT_READ = UnknownShape("its config is not read")

MAX_LISTED_PROBLEMS = 20


@dataclass(frozen=True)
class Bounds:
    """The extremes that all slots of a sweep must have room for."""

    max_rank: int
    target_modules: tuple[str, ...] | Literal["all-linear"]
    dropout: bool
    """Whether any trial drops inputs of its adapter."""
    optimizers: tuple[str, ...]
    """All that a trial may use."""
    loftq: bool = False
    """Whether any trial begins with the base's quantisation error."""


def num_trials(search: SearchConfig) -> int:
    """How many trials the whole sweep has, unless its grid is widened later."""
    if search.sampler != "grid":
        assert search.num_trials is not None
        return search.num_trials
    if search.all_conditions:
        return sum(1 for _ in grid_points(search))
    combinations = 1
    for values in search.space.values():
        assert isinstance(values, tuple)
        combinations *= len(values)
    return min(search.num_trials or combinations, combinations)


def first_batch(search: SearchConfig) -> int:
    """How many trials can be asked for before any result is in."""
    total = num_trials(search)
    return min(total, STARTUP_TRIALS.get(search.sampler, total))


def check_space(config: SweepConfig) -> None:
    """Refuse a grid with combinations that cannot work, and a sampler that can only draw such; a
    pruner without a rung; and what cannot work for any trial.

    Raises:
        ConfigError: lists the problems of every refused trial.
    """
    if found := sweep_problems(config):
        raise ConfigError("\n".join(found))
    _check_rungs(config)
    refused = _refused_of_grid if config.search.sampler == "grid" else _refused_of_sampler
    lines = (f"{name}: {problem}" for name, found in refused(config) for problem in found)
    listed = list(itertools.islice(lines, MAX_LISTED_PROBLEMS))
    more = sum(1 for _ in lines)
    if more:
        listed.append(f"and {more} more")
    if listed:
        raise ConfigError("\n".join(listed))


def _check_rungs(config: SweepConfig) -> None:
    search, pruner = config.search, config.search.pruner
    if pruner.kind == "none":
        return
    rungs = pruner.rungs or (pruner.min_steps or 1,)
    longest = int(_highest(search.values_of("steps", config.trial.steps)))
    searched = "steps" in search.space
    # Where lengths are searched, a rung may lie beyond the end of the shorter trials.
    late = [step for step in rungs if step >= longest]
    if len(late) > (len(rungs) - 1 if searched else 0):
        name = "the longest of search.space.steps" if searched else "trial.steps"
        raise ConfigError(
            f"search.pruner needs rungs before the end of a trial, but got {late[0]} steps, "
            f"{name}={longest}: lower search.pruner.rungs or min_steps, or set pruner: none"
        )


def next_trial(
    config: SweepConfig,
    known: Sequence[TrialSpec],
    results: Sequence[TrialResult],
    most_under_way: int,
    points: "KnownPoints | None" = None,
) -> TrialSpec | None:
    """The next trial; None when there is none, or a sampler that learns waits for results.

    `most_under_way`: trials that such a sampler has under way at most, where search.ahead does not
    say which results it waits for. `points`: kept from call to call, they save going through all
    trials, and the grid, anew.
    """
    search = config.search
    number = len(known)
    if search.num_trials is not None and number >= search.num_trials:
        return None
    if search.sampler == "grid":
        params = (points or KnownPoints(config)).next_of_grid(known)
        return None if params is None else _spec(config, number, Draw(params))
    if number >= first_batch(search):
        if search.ahead is not None:
            results = [result for result in results if result.number <= number - search.ahead]
            if len(results) <= number - search.ahead:
                return None
        elif number - len(results) >= most_under_way:
            return None
    elif search.sampler in STARTUP_TRIALS:
        results = ()  # as they were drawn had they all been asked for at once
    return ask(config, known, results, points)


def first_trials(
    config: SweepConfig, shape: BaseShape | UnknownShape = NOT_READ
) -> list[TrialSpec]:
    """Those that are known before any result is in."""
    trials: list[TrialSpec] = []
    points = KnownPoints(config, shape)
    while len(trials) < first_batch(config.search):
        trials.append(ask(config, trials, (), points))
    return trials


def has_new_point(
    config: SweepConfig, known: Sequence[TrialSpec], results: Sequence[TrialResult]
) -> bool:
    """Whether a trial can be added that is none of the known ones again."""
    if config.search.sampler == "grid":
        return next_trial(config, known, results, most_under_way=1) is not None
    points = KnownPoints(config)
    drawn = ask(config, known, results, points).params  # where there is no new one, it repeats one
    return point_set(drawn) not in points.taken(known) and not _problems(config, drawn)


def ask(
    config: SweepConfig,
    known: Sequence[TrialSpec],
    results: Sequence[TrialResult],
    points: "KnownPoints | None" = None,
) -> TrialSpec:
    """What the sampler draws next, given all trials asked so far and those that are over.

    A sampler that finds none but combinations that cannot work, or whose adapters are larger than
    allowed, draws such a one: see `problems` of its config, and the constraints.

    Raises:
        ConfigError: a value of the space is not allowed.
    """
    search, points = config.search, points or KnownPoints(config)
    if search.sampler == "grid":
        params = points.next_of_grid(known)
        assert params is not None, "every point of the grid is known"
        return _spec(config, len(known), Draw(params))

    def suggest(choose: Callable[[str, Values], Choice]) -> dict[str, Choice]:
        return chosen(search, choose)

    def searched(trial: TrialSpec) -> dict[str, Choice] | None:
        return point_of(config, trial)

    def refused(params: dict[str, Choice]) -> bool:
        return bool(_problems(config, params)) or points.is_too_large(params)

    def taken() -> AbstractSet[Point]:
        return points.taken(known)

    drawn = draw(search, known, results, suggest, searched, refused, taken, points.all)
    return _spec(config, len(known), drawn)


def chosen(search: SearchConfig, choose: Callable[[str, Values], Choice]) -> dict[str, Choice]:
    """A point, field by field: those that others depend on come first, and what a condition
    excludes is left out."""
    point: dict[str, Choice] = {}
    for field in ordered_fields(search):
        if is_searched(search, field, point):
            point[field] = choose(field, search.space[field])
    return point


def point_of(config: SweepConfig, trial: TrialSpec) -> dict[str, Choice] | None:
    """Where a trial lies in the space, also one that was asked for in another space: what was asked
    for, and elsewhere what is written under `trial`, which no resume changes. None where it had
    another value of a field that is not searched there now. The trial's own config will not do: of
    bit_width auto it holds what was chosen, not what was asked for."""

    def value(field: str, _: Values) -> Choice:
        if field in trial.params:
            return trial.params[field]
        return _value_at(config.trial, field)

    point = chosen(config.search, value)
    lies_in_space = all(
        field in point or encoded(asked) == encoded(_value_at(config.trial, field))
        for field, asked in trial.params.items()
    )
    return point if lies_in_space else None


class KnownPoints:
    """The points that trials have, and a grid's next one. A widened grid holds those of the narrow
    one, too: the next is the first that no trial has. `known` goes on from what it was in the call
    before, so that each call costs what is new."""

    def __init__(self, config: SweepConfig, shape: BaseShape | UnknownShape = NOT_READ) -> None:
        self._config = config
        self._shape = shape
        self._points = _all_points(config.search)
        self._point: dict[str, Choice] | None = None
        """The first that may be free. None until one is asked for, which other samplers never do:
        their ranges have no points."""
        self._taken: set[Point] = set()
        self._num_known = 0

    def taken(self, known: Sequence[TrialSpec]) -> AbstractSet[Point]:
        new = known[self._num_known :]
        known_points = (point_of(self._config, trial) for trial in new)
        self._taken.update(point_set(point) for point in known_points if point is not None)
        self._num_known = len(known)
        return self._taken

    @property
    def all(self) -> Iterator[dict[str, Choice]]:
        """None where ranges are continuous."""
        search = self._config.search
        return iter(()) if search.continuous_fields else _all_points(search)

    def is_too_large(self, params: dict[str, Choice]) -> bool:
        """Whether the adapter would be larger than allowed, of a point that can work."""
        most_mb, shape = self._config.search.constraints.adapter_mb, self._shape
        if most_mb is None or isinstance(shape, UnknownShape):
            return False
        trial = trial_with(self._config.trial, params)
        return saved_bytes(trial.adapter, shape) > most_mb * MB

    def next_of_grid(self, known: Sequence[TrialSpec]) -> dict[str, Choice] | None:
        """None where all points are taken."""
        taken = self.taken(known)
        while self._point is None or point_set(self._point) in taken:
            if (point := next(self._points, None)) is None:
                return None
            self._point = point
        return self._point


def ordered_fields(search: SearchConfig) -> list[str]:
    """Each after those that its condition names, else by name: a run folder's JSON does not keep
    the order in which they were written. In a grid the bit-width changes last of those that are
    free to: a worker keeps its base model while it goes on."""
    grid = search.sampler == "grid"
    todo = sorted(search.space, key=lambda name: (grid and name != "quant.bit_width", name))
    conditions = search.all_conditions
    ordered: list[str] = []
    while todo:
        field = next(name for name in todo if set(conditions.get(name, ())) <= set(ordered))
        ordered.append(field)
        todo.remove(field)
    return ordered


def is_searched(search: SearchConfig, field: str, point: Mapping[str, Choice]) -> bool:
    """Whether the field's condition holds at a point whose earlier fields are known."""
    needs = search.all_conditions.get(field, {})
    return all(name in point and point[name] in wanted for name, wanted in needs.items())


def grid_points(search: SearchConfig) -> Iterator[dict[str, Choice]]:
    return itertools.islice(_all_points(search), search.num_trials)


def bounds(trial: TrialConfig, search: SearchConfig, asked: Iterable[TrialConfig] = ()) -> Bounds:
    """Of the space and of trials `asked` for while it may have been another one."""
    asked = list(asked)
    adapters = [one.adapter for one in asked]
    targets = search.values_of("adapter.target_modules", trial.adapter.target_modules)
    dropouts = search.values_of("adapter.dropout", trial.adapter.dropout)
    inits = search.values_of("adapter.init", trial.adapter.init)
    optimizers = search.values_of("optimizer.name", trial.optimizer.name)
    return Bounds(
        max_rank=max([_max_rank(trial, search), *map(largest_rank, adapters)]),
        target_modules=_all_targets([*targets, *(adapter.target_modules for adapter in adapters)]),
        dropout=_highest(dropouts) > 0 or any(adapter.dropout > 0 for adapter in adapters),
        optimizers=tuple(dict.fromkeys([*optimizers, *(one.optimizer.name for one in asked)])),
        loftq="loftq" in (*inits, *(adapter.init for adapter in adapters)),
    )


def _max_rank(trial: TrialConfig, search: SearchConfig) -> int:
    ranks = search.values_of("adapter.rank", trial.adapter.rank)
    patterns = search.values_of("adapter.rank_pattern", {**trial.adapter.rank_pattern})
    single = [rank for one in patterns if isinstance(one, dict) for rank in one.values()]
    return int(max(_highest(ranks), *single, 0))


def _highest(values: Iterable[Choice]) -> float:
    return max(value for value in values if isinstance(value, int | float))


def _all_targets(choices: Iterable[Choice]) -> tuple[str, ...] | Literal["all-linear"]:
    choices = list(choices)
    if "all-linear" in choices:
        return "all-linear"
    names = (name for choice in choices if isinstance(choice, tuple) for name in choice)
    return tuple(dict.fromkeys(names))


def _refused_of_grid(config: SweepConfig) -> Iterator[tuple[str, list[str]]]:
    """The trials that the rules refuse, by title."""
    found: dict[str, list[str]] = {}
    for number, params in enumerate(grid_points(config.search)):
        # A big grid varies few fields that a rule reads: each combination of those is tried once.
        ruled = {name: value for name, value in params.items() if name.startswith(RULED_FIELDS)}
        key = repr(ruled)
        if key not in found:
            found[key] = _problems(config, ruled)
            found[key] = found[key] or unread(trial_with(config.trial, ruled).quant, ruled)
        if found[key]:
            yield _title(number, params), found[key]


def _refused_of_sampler(config: SweepConfig) -> Iterator[tuple[str, list[str]]]:
    """The trials of the first batch, if the rules refuse all of them."""
    known: list[TrialSpec] = []
    refused = []
    while len(known) < first_batch(config.search):
        trial = ask(config, known, ())
        found = _problems(config, trial.params)
        if not found:
            return
        known.append(trial)
        refused.append((_title(trial.number, trial.params), found))
    yield from refused


def _problems(config: SweepConfig, params: dict[str, Choice]) -> list[str]:
    """Why a point cannot work."""
    try:
        trial = trial_with(config.trial, params)
    except ConfigError as error:
        return [str(error)]
    return problems(trial, config.resources.workers_per_pack)


def _title(number: int, params: Mapping[str, Choice]) -> str:
    combination = ", ".join(f"{name}={_written(value)}" for name, value in params.items())
    return f"trial {number} ({combination})" if params else "trial"


def _written(value: Choice) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, list | tuple) else str(value)


def _all_points(search: SearchConfig) -> Iterator[dict[str, Choice]]:
    return _points(search, ordered_fields(search), {})


def _points(
    search: SearchConfig, fields: Sequence[str], point: dict[str, Choice]
) -> Iterator[dict[str, Choice]]:
    if not fields:
        yield point
    elif not is_searched(search, fields[0], point):
        yield from _points(search, fields[1:], point)
    else:
        values: Values | range = search.space[fields[0]]
        if isinstance(values, RangeConfig):
            assert values.integer, f"{fields[0]} has no end"
            values = range(int(values.low), int(values.high) + 1)  # of any length: not listed
        for value in values:
            yield from _points(search, fields[1:], point | {fields[0]: value})


def _spec(config: SweepConfig, number: int, draw: Draw) -> TrialSpec:
    return TrialSpec(number, draw.params, trial_with(config.trial, draw.params), draw.notes)


def _value_at(trial: TrialConfig, field: str) -> Choice:
    place: Any = trial
    for part in field.split("."):
        place = getattr(place, part)
    value: Choice = place
    return value

"""How samplers draw: an Optuna study in memory, rebuilt from the run folder's records each time.

In: trials and results. Out: a Draw. One sampler is made per trial, seeded by the trial's number, so
that the n-th draw does not depend on how many were made by this process. Optuna is imported inside
functions.

Optuna 5.0 hears of a trial what each sampler can use: TPE learns from finished and pruned trials,
and takes those under way for bad ones (constant_liar); GP and NSGA-II learn from finished trials
only, and fields that a condition may leave out they draw at random.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.records import TrialResult, TrialSpec
from orchestrator.search.objectives import OBJECTIVES, overshoots
from orchestrator.search_config import Choice, RangeConfig, Scalar, SearchConfig, Values, encoded

if TYPE_CHECKING:
    import optuna

# Optuna's 50 is more than most sweeps have trials; no figure of ours says that 12 is best.
NSGA2_POPULATION = 12
NSGA2_GENERATION = "NSGAIISampler:generation"
# Trials that a sampler draws at random, before it learns: Optuna's defaults, and NSGA-II's first
# generation.
STARTUP_TRIALS = {"tpe": 10, "gp": 10, "nsga2": NSGA2_POPULATION}
# Of a trial, until its point is a new one that the rules allow. Then the points are gone through,
# where the space has an end, as far as so many that are refused; else the first draw counts.
MAX_DRAWS = 100
MAX_REFUSED = 1000
# Of these, NSGA-II's own, by other seeds: a child is nearer to what it found good than any point.
NSGA2_DRAWS = 20


@dataclass(frozen=True)
class Draw:
    params: dict[str, Choice]
    notes: dict[str, Any] = field(default_factory=dict)
    """What the sampler will want to know of this trial: NSGA-II its generation."""


Suggest = Callable[[Callable[[str, Values], Choice]], dict[str, Choice]]
"""Makes a point, given what draws one field."""
Searched = Callable[[TrialSpec], dict[str, Choice] | None]
"""Where a trial lies in the space as it is now, if it does."""
Refused = Callable[[dict[str, Choice]], bool]
"""Whether a point cannot work."""
Point = frozenset[tuple[str, Scalar]]
"""Of a point's fields."""


def draw(
    search: SearchConfig,
    known: Sequence[TrialSpec],
    results: Sequence[TrialResult],
    suggest: Suggest,
    searched: Searched,
    refused: Refused,
    taken: Callable[[], AbstractSet[Point]],
    points: Iterable[dict[str, Choice]],
) -> Draw:
    """Trial number len(known). Not for the grid. Points that are refused are drawn again, for TPE
    does not learn from trials that failed and would go on to draw them. So are those that are
    `taken` by the known trials, for theirs would end with the very same adapters. `points`: all of
    the space, or none where it has no end."""
    import optuna

    place = len(known)
    sampler = SAMPLERS[search.sampler](_seed(search.seed, place))
    # No two draws from a continuous range are alike; one that learns may draw an end of it again.
    everywhere = search.continuous_fields - search.all_conditions.keys()
    unlike = search.sampler == "random" and bool(everywhere)
    barred: AbstractSet[Point] = frozenset() if unlike else taken()
    if search.sampler == "random":  # looks at no earlier trial, and adding a thousand takes long
        known = ()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = [OBJECTIVES[name].direction for name in search.objectives]
    study = optuna.create_study(directions=directions, sampler=sampler)
    by_number = {result.number: result for result in results}
    for spec in known:
        for trial in _frozen(search, spec, by_number.get(spec.number), searched(spec)):
            study.add_trial(trial)

    def choose(name: str, values: Values) -> Choice:
        if not isinstance(values, RangeConfig):
            choices = [encoded(value) for value in values]
            return _decoded(trial.suggest_categorical(name, choices), values)
        if not values.integer:
            return float(trial.suggest_float(name, values.low, values.high, log=values.log))
        return int(trial.suggest_int(name, int(values.low), int(values.high), log=values.log))

    by_generations = search.sampler == "nsga2"
    draws: list[Draw] = []
    not_again: set[Point] = set()
    for number in range(MAX_DRAWS):
        if number:  # one that learns may insist on what it found best
            again = "nsga2" if number < NSGA2_DRAWS and by_generations else "random"
            study.sampler = SAMPLERS[again](_seed(search.seed, place, number))
        trial = study.ask()
        params = suggest(choose)
        notes = dict(study.get_trials(deepcopy=False)[-1].system_attrs)
        if draws and by_generations:  # one that is drawn at random is of this generation, too
            notes = draws[0].notes | notes
        draws.append(Draw(params, notes))
        point = point_set(params)
        if point not in barred and point not in not_again and not refused(params):
            return draws[-1]
        not_again.add(point)
    tried = barred | not_again
    left = (params for params in points if point_set(params) not in tried)
    allowed = (params for params in itertools.islice(left, MAX_REFUSED) if not refused(params))
    return next((Draw(params, draws[0].notes) for params in allowed), draws[0])


def _seed(*parts: int) -> int:
    """Sums would make the trials of one seed those of the seed before, one later."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def point_set(point: Mapping[str, Choice]) -> Point:
    """For which 16 and 16.0 are one: fields turn what is written into their type."""
    return frozenset((name, encoded(value)) for name, value in point.items())


def _distribution(values: Values) -> Any:
    import optuna

    if not isinstance(values, RangeConfig):
        return optuna.distributions.CategoricalDistribution([encoded(value) for value in values])
    if values.integer:
        return optuna.distributions.IntDistribution(
            int(values.low), int(values.high), log=values.log
        )
    return optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)


def _frozen(
    search: SearchConfig,
    spec: TrialSpec,
    result: TrialResult | None,
    point: Mapping[str, Choice] | None,
) -> "Iterator[optuna.trial.FrozenTrial]":
    """The trial as Optuna knows trials; nothing where it lies outside the space as it is now."""
    import optuna

    if point is None:
        return
    if not all(_contains(search.space[name], value) for name, value in point.items()):
        return
    state, values = optuna.trial.TrialState.RUNNING, None
    constraints: dict[str, float] = {}
    if result is not None:
        constraints = overshoots(search.constraints, result)
        measured = [OBJECTIVES[name].value(result) for name in search.objectives]
        if result.state == "finished" and all(map(math.isfinite, measured)):
            state, values = optuna.trial.TrialState.COMPLETE, measured
        elif result.state == "pruned" or result.reason == "constraint":
            state = optuna.trial.TrialState.PRUNED
        else:
            state = optuna.trial.TrialState.FAIL
    notes = dict(spec.notes)
    if search.sampler == "nsga2":  # of another sampler's trials it takes for its first generation
        notes.setdefault(NSGA2_GENERATION, 0)
    at_rung = result is not None and result.state == "pruned" and result.eval_loss is not None
    yield optuna.trial.create_trial(
        params={name: encoded(value) for name, value in point.items()},
        distributions={name: _distribution(search.space[name]) for name in point},
        state=state,
        values=values,
        intermediate_values={result.steps: result.eval_loss} if result and at_rung else {},
        constraints=constraints,
        system_attrs=notes,
    )


def _contains(values: Values, value: Choice) -> bool:
    if isinstance(values, RangeConfig):
        if not isinstance(value, int | float) or (values.integer and value % 1):
            return False
        return values.low <= value <= values.high
    return value in values


def _decoded(value: Scalar, values: tuple[Choice, ...]) -> Choice:
    texts = (choice for choice in values if isinstance(choice, tuple | dict))
    return next((choice for choice in texts if encoded(choice) == value), value)


def _random(seed: int) -> "optuna.samplers.BaseSampler":
    import optuna

    return optuna.samplers.RandomSampler(seed=seed)


def _tpe(seed: int) -> "optuna.samplers.BaseSampler":
    import optuna

    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=STARTUP_TRIALS["tpe"], constant_liar=True
    )


def _gp(seed: int) -> "optuna.samplers.BaseSampler":
    import optuna

    return optuna.samplers.GPSampler(
        seed=seed, n_startup_trials=STARTUP_TRIALS["gp"], warn_independent_sampling=False
    )


def _nsga2(seed: int) -> "optuna.samplers.BaseSampler":
    import optuna

    return optuna.samplers.NSGAIISampler(seed=seed, population_size=NSGA2_POPULATION)


SAMPLERS: dict[str, Callable[[int], "optuna.samplers.BaseSampler"]] = {
    "random": _random,
    "tpe": _tpe,
    "gp": _gp,
    "nsga2": _nsga2,
}

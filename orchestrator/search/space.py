"""The search space and its trials: which points are asked for, over Optuna's ask/tell.

In: a SweepConfig, and the trials so far. Out: TrialSpecs, or a ConfigError that lists what cannot
work. `ask` is a function of its arguments: the Optuna study is rebuilt from the run folder's
records each time, so a resumed sweep asks what an undisturbed one would have asked. Optuna is
imported only for sampling.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.config import (
    Choice,
    RangeConfig,
    Scalar,
    SearchConfig,
    SweepConfig,
    TrialConfig,
)
from orchestrator.errors import ConfigError
from orchestrator.loading import trial_with
from orchestrator.planning.compatibility import RULED_FIELDS, problems
from orchestrator.records import TrialResult, TrialSpec

if TYPE_CHECKING:
    import optuna

# Optuna's default for TPE: this many trials are drawn at random before the model is used.
TPE_STARTUP_TRIALS = 10
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
    """How many trials the whole sweep has."""
    if search.sampler != "grid":
        assert search.num_trials is not None
        return search.num_trials
    combinations = 1
    for values in search.space.values():
        assert isinstance(values, tuple)
        combinations *= len(values)
    return min(search.num_trials or combinations, combinations)


def first_batch(search: SearchConfig) -> int:
    """How many trials can be asked for before any result is in."""
    total = num_trials(search)
    return min(total, TPE_STARTUP_TRIALS) if search.sampler == "tpe" else total


def check_space(config: SweepConfig) -> None:
    """Refuse a grid with combinations that cannot work, and a sampler that can only draw such.

    Raises:
        ConfigError: lists the problems of every refused trial.
    """
    refused = _refused_of_grid if config.search.sampler == "grid" else _refused_of_sampler
    lines = (f"{name}: {problem}" for name, found in refused(config) for problem in found)
    listed = list(itertools.islice(lines, MAX_LISTED_PROBLEMS))
    more = sum(1 for _ in lines)
    if more:
        listed.append(f"and {more} more")
    if listed:
        raise ConfigError("\n".join(listed))


def ask(
    config: SweepConfig, known: Sequence[TrialSpec], results: Sequence[TrialResult]
) -> TrialSpec:
    """The next trial, given all trials asked so far and those that are over.

    A sampler may draw a combination that cannot work: see `problems` of its config.

    Raises:
        ConfigError: a value of the space is not allowed.
    """
    params = SAMPLERS[config.search.sampler](config.search, known, results)
    return TrialSpec(len(known), params, trial_with(config.trial, params))


def bounds(trial: TrialConfig, search: SearchConfig) -> Bounds:
    return Bounds(
        max_rank=_max_rank(trial, search),
        target_modules=_target_modules(trial, search),
        dropout=_highest(search.space.get("adapter.dropout", (trial.adapter.dropout,))) > 0,
        optimizers=_optimizers(trial, search),
        loftq="loftq" in _choices(search, "adapter.init", trial.adapter.init),
    )


def _max_rank(trial: TrialConfig, search: SearchConfig) -> int:
    ranks = search.space.get("adapter.rank", (trial.adapter.rank,))
    patterns = _choices(search, "adapter.rank_pattern", trial.adapter.rank_pattern)
    single = [rank for one in patterns if isinstance(one, dict) for rank in one.values()]
    return int(max(_highest(ranks), *single, 0))


def _choices(search: SearchConfig, field: str, written: Choice) -> tuple[Choice, ...]:
    values = search.space.get(field, (written,))
    assert isinstance(values, tuple), f"{field} is no number"
    return values


def _highest(values: tuple[Choice, ...] | RangeConfig) -> float:
    if isinstance(values, RangeConfig):
        return values.high
    return max(value for value in values if isinstance(value, int | float))


def _optimizers(trial: TrialConfig, search: SearchConfig) -> tuple[str, ...]:
    choices = search.space.get("optimizer.name", (trial.optimizer.name,))
    assert isinstance(choices, tuple)
    return tuple(choice for choice in choices if isinstance(choice, str))


def _target_modules(
    trial: TrialConfig, search: SearchConfig
) -> tuple[str, ...] | Literal["all-linear"]:
    choices = search.space.get("adapter.target_modules", (trial.adapter.target_modules,))
    assert isinstance(choices, tuple)
    if "all-linear" in choices:
        return "all-linear"
    names = (name for choice in choices if isinstance(choice, tuple) for name in choice)
    return tuple(dict.fromkeys(names))


def _refused_of_grid(config: SweepConfig) -> Iterator[tuple[str, list[str]]]:
    """The trials that the rules refuse, by title."""
    found: dict[str, list[str]] = {}
    for number, params in enumerate(_grid_points(config.search)):
        # A big grid varies few fields that a rule reads: each combination of those is tried once.
        ruled = {name: value for name, value in params.items() if name.startswith(RULED_FIELDS)}
        key = repr(ruled)
        if key not in found:
            found[key] = problems(
                trial_with(config.trial, ruled), config.resources.workers_per_pack
            )
        if found[key]:
            yield _title(number, params), found[key]


def _refused_of_sampler(config: SweepConfig) -> Iterator[tuple[str, list[str]]]:
    """The trials of the first batch, if the rules refuse all of them."""
    known: list[TrialSpec] = []
    refused = []
    while len(known) < first_batch(config.search):
        trial = ask(config, known, [])
        found = problems(trial.config, config.resources.workers_per_pack)
        if not found:
            return
        known.append(trial)
        refused.append((_title(trial.number, trial.params), found))
    yield from refused


def _title(number: int, params: Mapping[str, Choice]) -> str:
    combination = ", ".join(f"{name}={_written(value)}" for name, value in params.items())
    return f"trial {number} ({combination})" if params else "trial"


def _written(value: Choice) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, list | tuple) else str(value)


def _grid(
    search: SearchConfig, known: Sequence[TrialSpec], results: Sequence[TrialResult]
) -> dict[str, Choice]:
    return next(itertools.islice(_grid_points(search), len(known), None))


def _grid_points(search: SearchConfig) -> Iterator[dict[str, Choice]]:
    # Bit-width is the slowest to change: a worker keeps its base model while it goes on.
    names = sorted(search.space, key=lambda name: name != "quant.bit_width")
    lists = [values for name in names if isinstance(values := search.space[name], tuple)]
    for point in itertools.islice(itertools.product(*lists), num_trials(search)):
        yield dict(zip(names, point, strict=True))


def _random(
    search: SearchConfig, known: Sequence[TrialSpec], results: Sequence[TrialResult]
) -> dict[str, Choice]:
    import optuna

    # One sampler per trial number, so that the n-th trial does not depend on how many were asked
    # by this process. It looks at no earlier trial, and adding a thousand to a study takes long.
    sampler = optuna.samplers.RandomSampler(seed=search.seed + len(known))
    return _optuna_params(search, sampler, [], [])


def _tpe(
    search: SearchConfig, known: Sequence[TrialSpec], results: Sequence[TrialResult]
) -> dict[str, Choice]:
    import optuna

    sampler = optuna.samplers.TPESampler(
        seed=search.seed + len(known), n_startup_trials=TPE_STARTUP_TRIALS, constant_liar=True
    )
    return _optuna_params(search, sampler, known, results)


def _optuna_params(
    search: SearchConfig,
    sampler: "optuna.samplers.BaseSampler",
    known: Sequence[TrialSpec],
    results: Sequence[TrialResult],
) -> dict[str, Choice]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    distributions = {name: _distribution(values) for name, values in search.space.items()}
    by_number = {result.number: result for result in results}
    for spec in known:
        study.add_trial(_frozen(spec, by_number.get(spec.number), distributions))
    drawn = study.ask(distributions).params
    return {name: _decoded(value, search.space[name]) for name, value in drawn.items()}


def _distribution(values: tuple[Choice, ...] | RangeConfig) -> Any:
    import optuna

    if not isinstance(values, RangeConfig):
        return optuna.distributions.CategoricalDistribution([_encoded(value) for value in values])
    if values.integer:
        return optuna.distributions.IntDistribution(
            int(values.low), int(values.high), log=values.log
        )
    return optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)


def _frozen(spec: TrialSpec, result: TrialResult | None, distributions: dict[str, Any]) -> Any:
    import optuna

    if result is None:
        state, value = optuna.trial.TrialState.RUNNING, None
    elif result.state == "finished":
        state, value = optuna.trial.TrialState.COMPLETE, result.eval_loss
    else:
        state, value = optuna.trial.TrialState.FAIL, None
    return optuna.trial.create_trial(
        params={name: _encoded(value) for name, value in spec.params.items()},
        distributions=distributions,
        state=state,
        value=value,
    )


def _encoded(choice: Choice) -> Scalar:
    """Optuna's categories are scalars: a list of names or a mapping becomes text."""
    if isinstance(choice, dict):
        return json.dumps(choice, sort_keys=True)
    return json.dumps(choice) if isinstance(choice, list | tuple) else choice


def _decoded(value: Scalar, values: tuple[Choice, ...] | RangeConfig) -> Choice:
    if isinstance(values, RangeConfig):
        return value
    texts = (choice for choice in values if isinstance(choice, tuple | dict))
    return next((choice for choice in texts if _encoded(choice) == value), value)


SAMPLERS = {"grid": _grid, "random": _random, "tpe": _tpe}

"""The search space and its trials: which points are asked for, over Optuna's ask/tell.

In: the concrete trial, SearchConfig, and the finished trials so far. Out: TrialSpecs. `ask` is a
function of its arguments: the Optuna study is rebuilt from the run folder's records each time, so a
resumed sweep asks what an undisturbed one would have asked. Optuna is imported only for sampling.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.config import RangeConfig, Scalar, SearchConfig, SweepConfig, TrialConfig
from orchestrator.errors import ConfigError
from orchestrator.loading import trial_with
from orchestrator.planning.compatibility import problems
from orchestrator.records import TrialResult, TrialSpec

if TYPE_CHECKING:
    import optuna

# Optuna's default for TPE: this many trials are drawn at random before the model is used.
TPE_STARTUP_TRIALS = 10


@dataclass(frozen=True)
class Bounds:
    """The extremes that all slots of a sweep must have room for."""

    max_rank: int
    target_modules: tuple[str, ...] | Literal["all-linear"]


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


def ask(
    config: SweepConfig, device: str, known: Sequence[TrialSpec], results: Sequence[TrialResult]
) -> TrialSpec:
    """The next trial, given all trials asked so far and those that are over.

    Raises:
        ConfigError: the combination is not valid or cannot work on this device.
    """
    number = len(known)
    params = SAMPLERS[config.search.sampler](config.search, known, results)
    trial = trial_with(config.trial, params)
    found = problems(trial, device)
    if found:
        combination = ", ".join(f"{name}={value}" for name, value in params.items())
        place = f"trial {number} ({combination})" if params else "trial"
        raise ConfigError("\n".join(f"{place}: {problem.message}" for problem in found))
    return TrialSpec(number, params, trial)


def bounds(trial: TrialConfig, search: SearchConfig) -> Bounds:
    ranks = search.space.get("adapter.rank", (trial.adapter.rank,))
    highest = ranks.high if isinstance(ranks, RangeConfig) else max(int(rank) for rank in ranks)
    return Bounds(int(highest), trial.adapter.target_modules)


def _grid(
    search: SearchConfig, known: Sequence[TrialSpec], results: Sequence[TrialResult]
) -> dict[str, Scalar]:
    # Bit-width is the slowest to change: a worker keeps its base model while it goes on.
    names = sorted(search.space, key=lambda name: name != "quant.bit_width")
    lists = [values for name in names if isinstance(values := search.space[name], tuple)]
    point = next(itertools.islice(itertools.product(*lists), len(known), None))
    return dict(zip(names, point, strict=True))


def _random(
    search: SearchConfig, known: Sequence[TrialSpec], results: Sequence[TrialResult]
) -> dict[str, Scalar]:
    import optuna

    # One sampler per trial number, so that the n-th trial does not depend on how many were asked
    # by this process.
    return _optuna_params(
        search, optuna.samplers.RandomSampler(seed=search.seed + len(known)), known, results
    )


def _tpe(
    search: SearchConfig, known: Sequence[TrialSpec], results: Sequence[TrialResult]
) -> dict[str, Scalar]:
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
) -> dict[str, Scalar]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    distributions = {name: _distribution(values) for name, values in search.space.items()}
    by_number = {result.number: result for result in results}
    for spec in known:
        study.add_trial(_frozen(spec, by_number.get(spec.number), distributions))
    return dict(study.ask(distributions).params)


def _distribution(values: tuple[Scalar, ...] | RangeConfig) -> Any:
    import optuna

    if not isinstance(values, RangeConfig):
        return optuna.distributions.CategoricalDistribution(list(values))
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
        params=dict(spec.params), distributions=distributions, state=state, value=value
    )


SAMPLERS = {"grid": _grid, "random": _random, "tpe": _tpe}

"""Which trial wins: a pure function of the results.

The best in the first objective among those that keep to all constraints; NaN, pruned and failed
trials never win. Ties go to the better in the next objective, then the smaller bit-width, then the
fewer adapter parameters, then the earlier trial.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.records import TrialResult, TrialSpec
from orchestrator.search.objectives import OBJECTIVES, Objective, candidates, pareto_front
from orchestrator.search_config import SearchConfig
from orchestrator.wording import counted


@dataclass(frozen=True)
class Winner:
    trial: int
    eval_loss: float
    baseline_eval_loss: float
    reason: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def select_winner(
    trials: Sequence[TrialSpec],
    results: Sequence[TrialResult],
    search: SearchConfig | None = None,
) -> Winner | None:
    """None when no trial that may win has finished. `search` says what is sought; None: the least
    held-out loss."""
    search = search or SearchConfig()
    ranked = ranking(trials, results, search)
    if not ranked:
        return None
    best = ranked[0]
    assert best.eval_loss is not None
    assert best.baseline_eval_loss is not None
    reason = _reason(ranked, search, results)
    return Winner(best.number, best.eval_loss, best.baseline_eval_loss, reason)


def ranking(
    trials: Sequence[TrialSpec], results: Sequence[TrialResult], search: SearchConfig
) -> list[TrialResult]:
    """The trials that may win, the winner first."""
    specs = {trial.number: trial for trial in trials}

    def order(result: TrialResult) -> tuple[list[float], float, int, int]:
        costs = [OBJECTIVES[name].cost(result) for name in search.objectives]
        bits = specs[result.number].config.quant.mean_bits
        return (costs, bits, result.num_adapter_params, result.number)

    return sorted(candidates(search, results), key=order)


def _reason(
    ranked: Sequence[TrialResult], search: SearchConfig, results: Sequence[TrialResult]
) -> str:
    best, objective = ranked[0], OBJECTIVES[search.objectives[0]]
    num_finished = sum(result.state == "finished" for result in results)
    least = "most" if objective.direction == "maximize" else "least"
    reason = f"trial {best.number} has the {least} {objective.title}, {_value(objective, best)}"
    if search.objectives[0] == "eval_loss":
        reason += f" (untrained base {best.baseline_eval_loss:.4f})"
    else:
        reason += f" (held-out loss {best.eval_loss:.4f})"
    reason += f", of {counted(num_finished, 'finished trial')}"
    if num_finished > len(ranked):
        reason += f", {len(ranked)} of which keep to the constraints"
    if len(ranked) > 1:
        second = ranked[1]
        if objective.value(second) == objective.value(best):
            reason += f"; tied with trial {second.number}, {_tie_break(best, second, search)}"
        else:
            reason += f"; next is trial {second.number} with {_value(objective, second)}"
    if pruned := [result for result in results if result.state == "pruned"]:
        were = "was" if len(pruned) == 1 else "were"
        reason += f"; {counted(len(pruned), 'trial')} {were} stopped early"
        losses = [result for result in pruned if _below(result, best)]
        if losses:
            named = min(losses, key=lambda result: result.eval_loss or 0.0)
            reason += f", among them trial {named.number} with {named.eval_loss:.4f}"
    if len(search.objectives) > 1:
        front = sorted(result.number for result in pareto_front(search, results))
        names = ", ".join(search.objectives)
        of = "trial" if len(front) == 1 else "any of trials"
        reason += f"; no trial beats {of} {', '.join(map(str, front))} in all of {names}"
    return reason


def _tie_break(best: TrialResult, second: TrialResult, search: SearchConfig) -> str:
    for objective in map(OBJECTIVES.__getitem__, search.objectives[1:]):
        if objective.value(best) != objective.value(second):
            ours, theirs = _value(objective, best), _value(objective, second)
            return f"it has the better {objective.title}, {ours} to {theirs}"
    return "it is the smaller or the earlier one"


def _value(objective: Objective, result: TrialResult) -> str:
    return format(objective.value(result), objective.form)


def _below(result: TrialResult, best: TrialResult) -> bool:
    if result.eval_loss is None or best.eval_loss is None:
        return False
    return result.eval_loss < best.eval_loss

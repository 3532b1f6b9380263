"""The pruner's verdicts in the run folder: how they are written, and what a resume makes of them.

In: a RunStore. Out: the Pruning as it stood.
"""

from typing import Any

from orchestrator.search.pruning import Pruning, Verdict
from orchestrator.sweep.run_store import RunStore


def verdict_facts(verdict: Verdict) -> dict[str, Any]:
    """For its line of decisions.jsonl."""
    return {"trial": verdict.trial, "rung": verdict.rung, "eval_loss": verdict.eval_loss}


def recall_pruning(store: RunStore) -> Pruning:
    """What was reported at rungs and decided there, as the run folder tells it."""
    pruning = Pruning(store.sweep.config.search.pruner)
    for trial in store.trials:
        pruning.add(trial)
    for decision in store.decisions:
        if decision["action"] in ("keep_trial", "stop_trial"):
            keep = decision["action"] == "keep_trial"
            pruning.recall(Verdict(keep=keep, reason=decision["reason"], **decision["facts"]))
    for trial in store.trials:
        if pruning.rungs(trial.number):
            for row in store.all_points(trial.number):  # the first report at a rung counts
                if row["kind"] == "evaluated":
                    pruning.report(trial.number, row["step"], row["eval_loss"])
    for result in store.results:
        pruning.end(result.number)
    return pruning

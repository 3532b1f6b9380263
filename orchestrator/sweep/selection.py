"""Which trial wins: a pure function of the results.

Least held-out loss; NaN and failed trials never win. Ties go to the smaller bit-width, then the
fewer adapter parameters, then the earlier trial.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.records import TrialResult, TrialSpec


@dataclass(frozen=True)
class Winner:
    trial: int
    eval_loss: float
    baseline_eval_loss: float
    reason: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def select_winner(trials: Sequence[TrialSpec], results: Sequence[TrialResult]) -> Winner | None:
    """None when no trial finished with a finite loss."""
    specs = {trial.number: trial for trial in trials}
    candidates = [
        result
        for result in results
        if result.state == "finished"
        and result.eval_loss is not None
        and math.isfinite(result.eval_loss)
    ]
    if not candidates:
        return None

    def order(result: TrialResult) -> tuple[float, float, int, int]:
        bit_width = specs[result.number].config.quant.mean_bits
        assert result.eval_loss is not None
        return (result.eval_loss, bit_width, result.num_adapter_params, result.number)

    ranked = sorted(candidates, key=order)
    best = ranked[0]
    assert best.eval_loss is not None
    assert best.baseline_eval_loss is not None
    return Winner(best.number, best.eval_loss, best.baseline_eval_loss, _reason(ranked))


def _reason(ranked: Sequence[TrialResult]) -> str:
    best = ranked[0]
    reason = (
        f"trial {best.number} has the least held-out loss, {best.eval_loss:.4f} "
        f"(untrained base {best.baseline_eval_loss:.4f}), of {len(ranked)} finished trials"
    )
    if len(ranked) > 1:
        second = ranked[1]
        if second.eval_loss == best.eval_loss:
            reason += f"; tied with trial {second.number}, it is the smaller one"
        else:
            reason += f"; next is trial {second.number} with {second.eval_loss:.4f}"
    return reason

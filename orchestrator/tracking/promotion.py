"""Whether a new adapter becomes the champion: a pure function of two standings."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Standing:
    """How good a registered adapter is, and on what that was measured."""

    version: int
    eval_loss: float
    baseline_eval_loss: float
    """The untrained base's loss on the same examples. NaN where it is not known."""
    held_out_digest: str
    """Of the held-out examples as tokens; empty where it is not known."""


@dataclass(frozen=True)
class Promotion:
    promote: bool
    reason: str


def decide_promotion(candidate: Standing, champion: Standing | None) -> Promotion:
    """The candidate must beat the untrained base, and the champion where they can be compared."""
    loss, baseline = candidate.eval_loss, candidate.baseline_eval_loss
    if not math.isfinite(loss):
        return Promotion(False, f"its held-out loss is {loss}")
    if loss >= baseline:
        return Promotion(
            False, f"its held-out loss {loss:.4f} is not below the untrained base's {baseline:.4f}"
        )
    gain = f"held-out loss {loss:.4f} (untrained base {baseline:.4f})"
    if champion is None:
        return Promotion(True, f"{gain}; it is the first champion")
    name = f"version {champion.version}"
    if not math.isfinite(champion.eval_loss):
        return Promotion(True, f"{gain}; {name} has no known loss to compare it with")
    if champion.held_out_digest != candidate.held_out_digest:
        return Promotion(
            True,
            f"{gain}; {name} ({champion.eval_loss:.4f}) cannot be compared with it, for it was "
            "measured on other held-out examples",
        )
    if loss < champion.eval_loss:
        return Promotion(
            True,
            f"{gain} is below {name}'s {champion.eval_loss:.4f} on the same held-out examples",
        )
    return Promotion(
        False,
        f"its held-out loss {loss:.4f} is not below {name}'s {champion.eval_loss:.4f} on the same "
        "held-out examples",
    )

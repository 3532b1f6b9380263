"""The gate between a candidate and the champion alias."""

import pytest

from orchestrator.tracking.promotion import Standing, decide_promotion


def standing(loss: float, *, version: int = 1, base: float = 3.0, data: str = "a") -> Standing:
    return Standing(version, loss, base, data)


@pytest.mark.parametrize(
    ("candidate", "champion", "promote", "words"),
    [
        (standing(2.0), None, True, "first champion"),
        (standing(3.0), None, False, "3.0000 is not below the untrained base's 3.0000"),
        (standing(3.5), standing(3.9), False, "untrained base"),
        (standing(float("nan")), None, False, "nan"),
        (standing(float("inf")), None, False, "inf"),
        (standing(2.0), standing(2.1, version=7), True, "below version 7's 2.1000"),
        (standing(2.1), standing(2.1, version=7), False, "not below version 7's 2.1000"),
        (standing(2.2), standing(2.1, version=7), False, "same held-out examples"),
        (standing(2.2), standing(2.1, data="b"), True, "cannot be compared"),
        (standing(2.2), standing(float("nan")), True, "no known loss"),
        (standing(2.0, base=float("nan")), None, True, "first champion"),
    ],
)
def test_decide_promotion(
    candidate: Standing, champion: Standing | None, promote: bool, words: str
) -> None:
    promotion = decide_promotion(candidate, champion)
    assert promotion.promote == promote
    assert words in promotion.reason

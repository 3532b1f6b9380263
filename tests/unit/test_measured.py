"""What measured packs say of the speed of those to come."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.gpus import GPUS
from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.measured import Factors, Known, Measurement, known

H100, BASE, OTHER = "H100", "4-bit nf4", "16-bit"


def measured(ratio: float, tokens: int = 1_230_000) -> Measurement:
    return Measurement(tokens, 100.0, 100.0 * ratio)


def of_packs(*ratios: float, base: str = BASE) -> Factors:
    factors = Factors()
    for pack, ratio in enumerate(ratios):
        factors.add(pack, H100, base, measured(ratio))
    return factors


def test_without_a_measurement_the_closed_form_stands() -> None:
    assert Factors().factor(H100, BASE) == 1.0


def test_a_few_packs_move_the_factor_and_three_make_it() -> None:
    one, two, three = (of_packs(*[1.5] * count).factor(H100, BASE) for count in (1, 2, 3))
    assert 1 < one < two < three == pytest.approx(1.5)


def test_one_slow_pack_among_others_changes_little() -> None:
    assert of_packs(1.1, 1.1, 9.0).factor(H100, BASE) == pytest.approx(1.1)


def test_a_pack_counts_once_with_what_was_measured_last() -> None:
    factors = of_packs(1.5, 1.5, 1.5)
    for pack in range(3):
        factors.add(pack, H100, BASE, measured(1.2))
    assert factors.factor(H100, BASE) == pytest.approx(1.2)
    assert factors.num_packs(H100, BASE) == 3


def test_what_was_not_measured_goes_by_what_is_nearest_to_it() -> None:
    factors = of_packs(1.5, 1.5, 1.5)
    for pack in range(3, 6):
        factors.add(pack, "L40S", BASE, measured(2.0))
    assert factors.factor(H100, OTHER) == pytest.approx(1.5)
    assert factors.factor("L40S", OTHER) == pytest.approx(2.0)
    assert 1.5 <= factors.factor("A100", BASE) <= 2.0


def test_what_is_learnt_is_said_in_numbers_and_not_again_until_it_changes() -> None:
    factors = of_packs(1.0, 1.2)
    assert (
        factors.add(2, H100, BASE, Measurement(1_230_000, 100.0, 112.84))
        == "predicted 12,300 tokens/s, measured 10,900 in 3 packs: durations x 1.13"
    )
    assert factors.add(3, H100, BASE, measured(1.13)) == ""
    said = [factors.add(pack, H100, BASE, measured(1.0)) for pack in range(4)]
    assert [words.rpartition(" ")[2] for words in said if words] == ["1.00"]


def test_a_kind_that_turns_out_slow_is_served_last() -> None:
    kinds = [WorkerKind("a", 4, 0, 1.0), WorkerKind("b", 4, 0, 0.9), WorkerKind("new", 1, 0, 0.5)]
    gpus = {"a": GPUS["H200"], "b": GPUS["H100"]}
    factors = Factors()
    for pack in range(3):
        factors.add(pack, "H200", BASE, measured(2.0))
        factors.add(10 + pack, "H100", BASE, measured(1.0))
    slow, fast = factors.speeds(kinds, gpus)[1::-1]
    assert (fast.name, fast.speed) == ("b", pytest.approx(0.9))
    assert (slow.name, slow.speed) == ("a", pytest.approx(0.5))
    assert factors.speeds(kinds, gpus)[2] == kinds[2], "its GPU is not known"


def test_a_later_sweep_begins_with_what_an_earlier_one_learnt() -> None:
    rows = of_packs(1.5, 1.5, 1.5).to_json()
    later = Factors(known(rows))
    assert later.factor(H100, BASE) == later.factor(H100, OTHER) == 1.5
    later.add(0, H100, BASE, measured(1.0))
    assert 1 < later.factor(H100, BASE) < 1.5
    assert known(later.to_json())[H100, BASE].num_packs == 4
    assert known(rows)[(H100,)] == Known(1.5, 3)


packs = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.sampled_from(["H100", "L40S"]),
        st.sampled_from([BASE, OTHER]),
        st.floats(0.2, 5.0),
    ),
    unique_by=lambda pack: pack[0],
)


@given(packs, st.integers())
def test_the_order_of_reports_does_not_matter(
    found: Sequence[tuple[int, str, str, float]], seed: int
) -> None:
    shuffled = list(found)
    random.Random(seed).shuffle(shuffled)
    one, other = Factors(), Factors()
    for pack, gpu, base, ratio in found:
        one.add(pack, gpu, base, measured(ratio))
    for pack, gpu, base, ratio in shuffled:
        other.add(pack, gpu, base, measured(9.0))  # replaced by the next
        other.add(pack, gpu, base, measured(ratio))
    assert one.to_json() == other.to_json()

"""How the claims of several sweeps become shares."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.shares import Claim, divide

GPUS = "H100"


def claim(sweep: str, packs: Sequence[int], priority: int = 0, came: float = 0.0) -> Claim:
    return Claim(sweep, came, priority, {GPUS: tuple(packs)})


def units(claims: Sequence[Claim], capacity: int) -> dict[str, int]:
    return {
        sweep: shares[GPUS].units if GPUS in shares else 0
        for sweep, shares in divide(claims, {GPUS: capacity}).items()
    }


def alone(workers: int) -> tuple[int, ...]:
    return (1,) * workers


def test_equal_sweeps_have_equal_parts_and_the_first_to_come_has_the_rest() -> None:
    later, first = claim("a", alone(9), came=2.0), claim("b", alone(9), came=1.0)
    assert units([later, first], 7) == {"a": 3, "b": 4}


def test_what_a_sweep_cannot_use_goes_to_the_others() -> None:
    claims = [claim("small", alone(1)), claim("large", alone(9)), claim("larger", alone(90))]
    assert units(claims, 9) == {"small": 1, "large": 4, "larger": 4}


def test_a_higher_priority_has_all_that_it_can_use_before_a_lower_one_has_any() -> None:
    claims = [
        claim("low", alone(8)),
        claim("high", alone(5), priority=2),
        claim("lowest", (1,), -1),
    ]
    assert units(claims, 8) == {"low": 3, "high": 5, "lowest": 0}


def test_a_pack_that_needs_several_workers_has_them_all_or_none() -> None:
    claims = [claim("gangs", (4, 4), came=1.0), claim("single", alone(8), came=2.0)]
    assert units(claims, 8) == {"gangs": 4, "single": 4}
    assert units(claims, 6) == {"gangs": 4, "single": 2}
    assert units(claims, 3) == {"gangs": 0, "single": 3}
    assert units([claim("mixed", (4, 1))], 3) == {"mixed": 1}


def test_each_kind_of_gpu_is_divided_apart() -> None:
    one = Claim("one", 0.0, 0, {"H100": alone(4), "L4": alone(1)})
    other = Claim("other", 1.0, 0, {"H100": alone(4)})
    shares = divide([one, other], {"H100": 4, "L4": 4})
    assert {(s, pool): share.units for s in shares for pool, share in shares[s].items()} == {
        ("one", "H100"): 2,
        ("one", "L4"): 1,
        ("other", "H100"): 2,
    }


def test_each_share_says_why() -> None:
    claims = [claim("a", alone(3)), claim("b", alone(1), priority=5), claim("c", ())]
    shares = divide(claims, {GPUS: 2})
    assert shares["a"][GPUS].reason == (
        "may use 1 of 2 H100 and could use 3 (priority 0); b may use 1 (priority 5)"
    )
    assert shares["c"] == {}


def test_where_nobody_could_begin_the_first_waits_for_what_the_cluster_lacks() -> None:
    """A cluster that grows goes by what waits in its queue."""
    assert units([claim("a", (1, 1)), claim("b", (1,))], 0) == {"a": 1, "b": 0}
    assert units([claim("a", (4, 4)), claim("b", (4,), priority=1)], 3) == {"a": 0, "b": 4}


@st.composite
def drawn_claims(draw: st.DrawFn, sizes: st.SearchStrategy[int]) -> list[Claim]:
    number = draw(st.integers(1, 6))
    return [
        claim(
            f"sweep-{n}",
            draw(st.lists(sizes, max_size=12)),
            draw(st.integers(-1, 1)),
            draw(st.sampled_from([0.0, 1.0, 2.0])),
        )
        for n in range(number)
    ]


ANY = drawn_claims(st.integers(1, 8))
SINGLE = drawn_claims(st.just(1))
CAPACITY = st.integers(8, 40)  # so that somebody can begin


@given(ANY, CAPACITY)
def test_nobody_has_more_than_it_claims_nor_all_more_than_there_is(
    claims: list[Claim], capacity: int
) -> None:
    given_ = units(claims, capacity)
    assert sum(given_.values()) <= capacity
    for one in claims:
        assert given_[one.sweep] <= sum(one.packs[GPUS])


@given(SINGLE, CAPACITY)
def test_nothing_is_left_that_somebody_could_use(claims: list[Claim], capacity: int) -> None:
    wanted = sum(sum(one.packs[GPUS]) for one in claims)
    assert sum(units(claims, capacity).values()) == min(capacity, wanted)


@given(ANY, CAPACITY)
def test_no_pack_is_kept_out_that_what_is_left_has_room_for(
    claims: list[Claim], capacity: int
) -> None:
    """A share below a claim leaves out a pack of at most what the sweep has not got."""
    given_ = units(claims, capacity)
    left = capacity - sum(given_.values())
    for one in claims:
        sizes = one.packs[GPUS]
        if missing := sum(sizes) - given_[one.sweep]:
            assert any(left < size <= missing for size in sizes)


@given(SINGLE, CAPACITY)
def test_within_a_priority_only_who_can_use_no_more_has_less_than_another(
    claims: list[Claim], capacity: int
) -> None:
    given_ = units(claims, capacity)
    for one in claims:
        for other in claims:
            if one.priority != other.priority or given_[one.sweep] == sum(one.packs[GPUS]):
                continue
            ahead = given_[other.sweep] - given_[one.sweep]
            came_first = (other.came, other.sweep) < (one.came, one.sweep)
            assert ahead <= (1 if came_first else 0)


@given(ANY, CAPACITY)
def test_lower_priorities_take_nothing_from_higher_ones(claims: list[Claim], capacity: int) -> None:
    for priority in {one.priority for one in claims}:
        high = [one for one in claims if one.priority >= priority]
        given_ = units(claims, capacity)
        assert units(high, capacity) == {one.sweep: given_[one.sweep] for one in high}


@given(ANY, CAPACITY)
def test_the_order_in_which_claims_are_heard_does_not_matter(
    claims: list[Claim], capacity: int
) -> None:
    assert divide(claims[::-1], {GPUS: capacity}) == divide(claims, {GPUS: capacity})

"""What every Sharing must do; a new one adds a fixture."""

import time
from collections.abc import Callable, Iterator

import pytest

from orchestrator.sweep.own_share import one_worker_claimed
from orchestrator.sweep.sharing import (
    EXPIRE_S,
    Alone,
    Claimant,
    Ledger,
    LedgerSharing,
    Share,
    Sharing,
)

MakeSharing = Callable[..., Sharing]
"""Of a sweep by its name, its priority and the units that a worker takes; two units there are."""
TIMEOUT_S = 60.0
TWO_PACKS = {"": (1, 1)}


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Of two CPU cores, whatever the machine has."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        namespace="orchestrator",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(params=["ledger", "ray"])
def make_sharing(request: pytest.FixtureRequest) -> Iterator[MakeSharing]:
    made: list[Sharing] = []
    ledger = Ledger(lambda: {"CPU cores": 2})
    if request.param == "ray":
        request.getfixturevalue("local_ray")

    def make(sweep: str, priority: int = 0, units: int = 1) -> Sharing:
        claimant = Claimant(sweep, priority, float(len(made)), {"": ("CPU cores", units)})
        if request.param == "ledger":
            made.append(LedgerSharing(ledger, claimant))
        else:
            from cluster.ray_sharing import RaySharing

            made.append(RaySharing(claimant))
        return made[-1]

    yield make
    for sharing in made:
        sharing.close()


def heard(sharing: Sharing, packs: dict[str, tuple[int, ...]], limits: dict[str, int]) -> Share:
    """The share once these are its limits: an answer may come with a later claim."""
    deadline = time.monotonic() + TIMEOUT_S
    while (share := sharing.claim(packs)).limits != limits:
        assert time.monotonic() < deadline, share
        time.sleep(0.05)
    return share


def test_a_sweep_without_others_is_not_limited_whatever_it_claims(
    make_sharing: MakeSharing,
) -> None:
    for only in (Alone(), make_sharing("only")):
        assert only.claim({"": (1,) * 100}) == Share()
        only.close()
        only.close()


def test_two_equal_sweeps_have_half_each_and_are_told_why(make_sharing: MakeSharing) -> None:
    one, other = make_sharing("one"), make_sharing("other")
    one.claim(TWO_PACKS)
    assert heard(other, TWO_PACKS, {"": 1}).reason == (
        "may use 1 of 2 CPU cores and could use 2 (priority 0); one may use 1 (priority 0)"
    )
    heard(one, TWO_PACKS, {"": 1})


def test_a_sweep_that_has_all_that_it_can_use_is_not_limited(make_sharing: MakeSharing) -> None:
    one, other = make_sharing("one"), make_sharing("other")
    one.claim({"": (1,)})
    other.claim({"": (1,)})
    assert one.claim({"": (1,)}) == Share()


def test_a_higher_priority_takes_the_workers_of_a_lower_one(make_sharing: MakeSharing) -> None:
    low, high = make_sharing("low"), make_sharing("high", 1)
    low.claim(TWO_PACKS)
    assert high.claim(TWO_PACKS) == Share()
    heard(low, TWO_PACKS, {"": 0})


def test_a_sweep_that_is_closed_leaves_its_share_to_the_others(make_sharing: MakeSharing) -> None:
    one, other = make_sharing("one"), make_sharing("other")
    one.claim(TWO_PACKS)
    heard(other, TWO_PACKS, {"": 1})
    one.close()
    heard(other, TWO_PACKS, {})


def test_sweeps_meet_again_after_all_had_gone(make_sharing: MakeSharing) -> None:
    one, other = make_sharing("one"), make_sharing("other")
    one.claim(TWO_PACKS)
    one.close()
    other.claim(TWO_PACKS)
    heard(one, TWO_PACKS, {"": 1})
    heard(other, TWO_PACKS, {"": 1})


def test_workers_of_several_units_are_counted_in_workers(make_sharing: MakeSharing) -> None:
    wide, narrow = make_sharing("wide", units=2), make_sharing("narrow")
    wide.claim({"": (1,)})
    heard(narrow, TWO_PACKS, {"": 0})
    assert wide.claim({"": (1,)}) == Share()


def test_who_prepares_data_on_a_worker_claims_one_meanwhile(make_sharing: MakeSharing) -> None:
    trains, prepares = make_sharing("trains"), make_sharing("prepares")
    with one_worker_claimed(prepares, ""):
        heard(trains, TWO_PACKS, {"": 1})


def test_a_ledger_forgets_who_claims_no_more() -> None:
    now = 0.0
    ledger = Ledger(lambda: {"CPU cores": 2}, lambda: now)
    one, killed = (
        LedgerSharing(ledger, Claimant(name, 0, came, {"": ("CPU cores", 1)}))
        for came, name in enumerate(("one", "killed"))
    )
    killed.claim(TWO_PACKS)
    now = EXPIRE_S - 1
    assert one.claim(TWO_PACKS).limits == {"": 1}
    now = EXPIRE_S + 1
    assert one.claim(TWO_PACKS) == Share()


class Hung:
    def claim(self, _: object) -> None:
        time.sleep(3600)

    withdraw = claim


def test_a_ray_cluster_whose_ledger_does_not_answer_limits_nobody_and_it_is_said(
    local_ray: None,
) -> None:
    import ray

    from cluster.ray_sharing import NAME, RaySharing

    while NAME in ray.util.list_named_actors():  # that of the test before is about to end
        time.sleep(0.05)
    hung = ray.remote(num_cpus=0)(Hung).options(name=NAME).remote()
    sharing = RaySharing(Claimant("one", 0, 0.0, {"": ("CPU cores", 1)}), timeout_s=0.5)
    for _ in range(2):
        share = sharing.claim(TWO_PACKS)
        assert not share.limits
        assert "has not answered for" in share.reason
    sharing.close()
    ray.kill(hung)

"""How sweeps on one cluster divide its workers among them.

In: what there is of each pool, and what each sweep could use of it. Out: a PoolShare for each, with
its reason. Pure: no clock, no Ray.

A higher priority is served first. Within one, whoever has least is given its next pack, the sweep
that came first where two have as much: equal shares, of which nobody has more than it can use, and
what one cannot use goes to the others. Packs are given whole, as a part of one is of no use: one
that is larger than what is left is passed over. Where so nobody could begin one, the first has its
first all the same: a cluster that grows is told of what it lacks by a pack that waits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Sizes = Sequence[int]
"""Of packs, in the order in which they are wanted."""


@dataclass(frozen=True)
class Claim:
    """What a sweep could use now."""

    sweep: str
    came: float
    """Unix time at which it began."""
    priority: int
    """Higher ones first."""
    packs: Mapping[str, Sizes]
    """By pool, in its units: packs that run, and then those that would be begun if they could."""


@dataclass(frozen=True)
class PoolShare:
    units: int
    wanted: int
    reason: str = field(default="", compare=False)

    @property
    def is_limited(self) -> bool:
        return self.units < self.wanted


def divide(claims: Sequence[Claim], capacity: Mapping[str, int]) -> dict[str, dict[str, PoolShare]]:
    """By sweep, of each pool that it claims some of. `capacity`: units of each pool, such as GPUs
    of a kind, or CPU cores."""
    ordered = sorted(claims, key=lambda claim: (-claim.priority, claim.came, claim.sweep))
    shares: dict[str, dict[str, PoolShare]] = {claim.sweep: {} for claim in claims}
    for pool in dict.fromkeys(pool for claim in ordered for pool in claim.packs):
        there = capacity.get(pool, 0)
        wanting = [claim for claim in ordered if sum(claim.packs.get(pool, ()))]
        given = _fill({claim.sweep: claim.packs[pool] for claim in wanting}, wanting, there)
        for claim in wanting:
            wanted = sum(claim.packs[pool])
            reason = _why(claim, wanted, wanting, given, f"{there} {pool}")
            shares[claim.sweep][pool] = PoolShare(given[claim.sweep], wanted, reason)
    return shares


def _fill(wanted: Mapping[str, Sizes], ordered: Sequence[Claim], left: int) -> dict[str, int]:
    """Units of one pool by sweep; `ordered` by who is served first."""
    given = dict.fromkeys(wanted, 0)
    for priority in dict.fromkeys(claim.priority for claim in ordered):
        open_ = {c.sweep: list(wanted[c.sweep]) for c in ordered if c.priority == priority}
        while open_:
            sweep = min(open_, key=given.__getitem__)  # the first of those that have as much
            packs = open_[sweep]
            while packs and packs[0] > left:
                del packs[0]
            if not packs:
                del open_[sweep]
                continue
            given[sweep] += packs[0]
            left -= packs.pop(0)
    if given and not any(given.values()):
        first = ordered[0].sweep
        given[first] = wanted[first][0]
    return given


def _why(
    claim: Claim, wanted: int, claims: Sequence[Claim], given: Mapping[str, int], there: str
) -> str:
    mine = given[claim.sweep]
    others = [
        f"{other.sweep} may use {given[other.sweep]} (priority {other.priority})"
        for other in claims
        if other is not claim and given[other.sweep]
    ]
    return "; ".join(
        [f"may use {mine} of {there} and could use {wanted} (priority {claim.priority})", *others]
    )

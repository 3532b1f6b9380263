"""The seam between a sweep and the others on its cluster: it claims workers, and hears its share.

Sharing is the protocol; Alone is that of a sweep which has its workers to itself, LedgerSharing
that of sweeps in one process. The one for a Ray cluster lives in the cluster package. All but Alone
meet in a Ledger; one contract suite, tests/contract/test_sharing.py, holds them to the same
behaviour.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.planning.shares import Claim, PoolShare, Sizes, divide

# A driver claims every second, but not while a learning sampler is asked, or its disk hangs. One
# that expires too early loses nothing at once: who is over its share waits before it gives way.
EXPIRE_S = 15.0
CLAIM_EVERY_S = 1.0


@dataclass(frozen=True)
class Share:
    limits: Mapping[str, int] = field(default_factory=dict)
    """Workers that a sweep may use, of each kind of which it could use more; not of the others."""
    reason: str = ""


class Sharing(Protocol):
    every_s: float
    """How often to claim."""

    def claim(self, packs: Mapping[str, Sizes]) -> Share:
        """Say what the sweep could use now: by kind of worker the sizes of its packs, in workers,
        those that run first. Returns the share as far as it is known, and soon, whatever has become
        of the others. A claim holds for EXPIRE_S."""
        ...

    def close(self) -> None:
        """Claim nothing any more. Safe to call twice."""
        ...


class Alone:
    """Of a sweep that no other one can take workers from."""

    every_s = math.inf

    def claim(self, packs: Mapping[str, Sizes]) -> Share:
        return Share()

    def close(self) -> None:
        pass


class Ledger:
    """All claims on one cluster. Its clock alone counts, so that claimants' may differ."""

    def __init__(
        self,
        capacity: Callable[[], Mapping[str, int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`capacity` says how many units of each pool there are now."""
        self._capacity = capacity
        self._clock = clock
        self._heard: dict[str, tuple[Claim, float]] = {}
        """By sweep, its claim, and when that came."""
        self._lock = threading.Lock()

    def claim(self, claim: Claim) -> dict[str, PoolShare]:
        """Takes the place of the sweep's claim before. Returns its share of the pools of which it
        could use more; a sweep alone may use all, whatever the cluster has lost."""
        with self._lock:
            now = self._clock()
            self._heard[claim.sweep] = claim, now
            self._heard = {s: (c, at) for s, (c, at) in self._heard.items() if now - at <= EXPIRE_S}
            if len(self._heard) == 1:
                return {}
            shares = divide([one for one, _ in self._heard.values()], self._capacity())
        return {pool: share for pool, share in shares[claim.sweep].items() if share.is_limited}

    def withdraw(self, sweep: str) -> None:
        with self._lock:
            self._heard.pop(sweep, None)

    @property
    def is_empty(self) -> bool:
        return not self._heard


@dataclass(frozen=True)
class Claimant:
    """A sweep, as the others on its cluster know it, and what its workers are taken from."""

    sweep: str
    priority: int
    came: float
    """Unix time."""
    pools: Mapping[str, tuple[str, int]]
    """By kind of worker, the pool and the units of it that one takes: sweeps differ in the cores of
    a worker, and in whether they need to tell kinds apart."""

    def claim(self, packs: Mapping[str, Sizes]) -> Claim:
        found = {}
        for kind, sizes in packs.items():
            pool, units = self.pools[kind]
            found[pool] = tuple(size * units for size in sizes)
        return Claim(self.sweep, self.came, self.priority, found)

    def share(self, limited: Mapping[str, PoolShare]) -> Share:
        limits = {
            kind: limited[pool].units // units
            for kind, (pool, units) in self.pools.items()
            if pool in limited
        }
        return Share(limits, "; ".join(share.reason for share in limited.values()))


class LedgerSharing:
    every_s = CLAIM_EVERY_S

    def __init__(self, ledger: Ledger, claimant: Claimant) -> None:
        self._ledger = ledger
        self._claimant = claimant

    def claim(self, packs: Mapping[str, Sizes]) -> Share:
        return self._claimant.share(self._ledger.claim(self._claimant.claim(packs)))

    def close(self) -> None:
        self._ledger.withdraw(self._claimant.sweep)

"""How fast packs are by measurement, against the closed form of speed.py.

In: a Measurement of each pack. Out: factors of its seconds, by scope: all packs, those on a kind of
GPU, those of a base on it. Adding one costs no more than it changes. Pure: no clock, no files.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.planning.gpus import Gpu
from orchestrator.planning.kinds import WorkerKind
from orchestrator.wording import counted

# One pack may have had a slow host; the median of three is not moved by one. As a pack counts in
# its scope and in both wider ones, one alone moves the factor of its own by 70 %, two by 96 %.
ENOUGH_PACKS = 3
# A change of a factor that is worth a decision. The closed form itself is within 9 %, and a pack's
# rate within some percent from one minute to the next.
WORTH = 0.05

Scope = tuple[str, ...]
"""(), (GPU,) or (GPU, base): a narrower one goes by its own packs as far as there
are enough, else by the wider one."""


@dataclass(frozen=True)
class Measurement:
    """Of one pack, over some blocks."""

    tokens: int
    """Padding excluded, of all its slots."""
    expected_s: float
    """By the closed form, uncorrected."""
    measured_s: float

    @property
    def ratio(self) -> float:
        return self.measured_s / self.expected_s

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens per second, as expected and as measured."""
        return self.tokens / self.expected_s, self.tokens / self.measured_s


@dataclass(frozen=True)
class Known:
    """A factor that an earlier sweep has found."""

    factor: float
    num_packs: int


NOTHING = Known(1.0, 0)


def known(rows: Iterable[Mapping[str, Any]]) -> dict[Scope, Known]:
    """Of what Factors.to_json wrote."""
    return {
        (row["gpu"], row["base"]) if row["base"] else (row["gpu"],): Known(
            row["factor"], row["num_packs"]
        )
        for row in rows
    }


class Factors:
    def __init__(self, earlier: Mapping[Scope, Known] | None = None) -> None:
        self._earlier = earlier or {}
        self._packs: dict[int, tuple[Scope, Measurement]] = {}
        self._sorted: dict[Scope, list[tuple[float, int]]] = {}
        """(ratio, pack) of each scope's packs, the fastest first."""
        self._told: dict[Scope, float] = {}

    def add(self, pack: int, gpu: str, base: str, measured: Measurement) -> str:
        """What is known of a pack now, in place of what was known of it before. Returns what to say
        of its scope, where that has changed by enough since it was last said; else nothing."""
        scope = (gpu, base)
        if pack in self._packs:
            _, before = self._packs[pack]
            for wider in _with_wider(scope):
                ratios = self._sorted[wider]
                del ratios[bisect_left(ratios, (before.ratio, pack))]
        self._packs[pack] = (scope, measured)
        for wider in _with_wider(scope):
            insort(self._sorted.setdefault(wider, []), (measured.ratio, pack))
        factor = self.factor(*scope)
        told = self._told.get(scope, self._earlier.get(scope, NOTHING).factor)
        if abs(factor / told - 1) < WORTH:
            return ""
        self._told[scope] = factor
        expected, found = self._median(scope).rates
        packs = counted(self.num_packs(*scope), "pack")
        return (
            f"predicted {expected:,.0f} tokens/s, measured {found:,.0f} in {packs}: "
            f"durations x {factor:.2f}"
        )

    def factor(self, *scope: str) -> float:
        """Of the seconds that the closed form gives."""
        rest = self._unmeasured(scope)
        count = self.num_packs(*scope)
        if not count:
            return rest
        weight = min(1.0, count / ENOUGH_PACKS)
        return float(rest ** (1 - weight) * self._median(scope).ratio ** weight)

    def num_packs(self, *scope: str) -> int:
        """Of this sweep."""
        return len(self._sorted.get(scope, ()))

    def speeds(
        self, kinds: Iterable[WorkerKind], gpus: Mapping[str, Gpu]
    ) -> tuple[WorkerKind, ...]:
        """The kinds as fast as their GPUs are measured, the fastest first."""
        measured = [
            replace(kind, speed=kind.speed / self.factor(gpus[kind.name].name))
            if kind.name in gpus
            else kind
            for kind in kinds
        ]
        return tuple(sorted(measured, key=lambda kind: -kind.speed))

    def to_json(self) -> list[dict[str, Any]]:
        """The factors of each GPU, and of each base on it."""
        scopes = sorted({scope for scope in (*self._earlier, *self._sorted) if scope})
        return [
            {
                "gpu": scope[0],
                "base": scope[1] if len(scope) > 1 else None,
                "factor": round(self.factor(*scope), 3),
                "num_packs": self.num_packs(*scope) + self._earlier.get(scope, NOTHING).num_packs,
            }
            for scope in scopes
        ]

    def _unmeasured(self, scope: Scope) -> float:
        if scope in self._earlier:
            return self._earlier[scope].factor
        return self.factor(*scope[:-1]) if scope else 1.0

    def _median(self, scope: Scope) -> Measurement:
        """Of the pack in the middle; of two, the faster."""
        ratios = self._sorted[scope]
        _, pack = ratios[(len(ratios) - 1) // 2]
        return self._packs[pack][1]


def _with_wider(scope: Scope) -> Sequence[Scope]:
    return [scope[:length] for length in range(len(scope) + 1)]

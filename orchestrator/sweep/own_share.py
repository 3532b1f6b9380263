"""What a sweep claims of its cluster, and how far it is over its share.

In: the sweep as its policy sees it, now and then, and a Sharing. Out: limits on its workers by
kind, and news of them in words.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from orchestrator.planning.holding import least_workers
from orchestrator.planning.packs import PackPlan
from orchestrator.planning.shares import Sizes
from orchestrator.planning.waiting import indexed
from orchestrator.sweep.policy import (
    AbandonPack,
    ReleasePack,
    StartPack,
    SweepView,
    decide,
    workers_over,
)
from orchestrator.sweep.sharing import Share, Sharing


class OwnShare:
    def __init__(self, sharing: Sharing, clock: Callable[[], float] = time.monotonic) -> None:
        self._sharing = sharing
        self._clock = clock
        self._share = Share()
        self._due = clock()
        self._over_since: float | None = None

    @property
    def is_exceeded(self) -> bool:
        return self._over_since is not None

    def limited(self, view: SweepView) -> SweepView:
        """The view within the share."""
        view = replace(view, limits=self._share.limits) if self._share.limits else view
        if not any(workers_over(view).values()):
            self._over_since = None
            return view
        now = self._clock()
        if self._over_since is None:
            self._over_since = now
        return replace(view, over_s=now - self._over_since)

    def ask(self, look: Callable[[], SweepView]) -> str:
        """Claim, if it is time to, by what `look` sees within the share. Returns what is new of
        that, in words; mostly nothing."""
        now = self._clock()
        if now < self._due:
            return ""
        self._due = now + self._sharing.every_s
        before, self._share = self._share, self._sharing.claim(wanted_packs(look()))
        if self._share.limits:
            return self._share.reason if self._share.limits != before.limits else ""
        if before.limits and not self._share.reason:
            return "may use all workers that it can use"
        return self._share.reason if self._share != before else ""

    def holds_back(self, view: SweepView) -> bool:
        """Whether there are packs that only the share, which the view is within, keeps back."""
        return bool(view.limits) and any(wanted_packs(view).values())


@contextmanager
def one_worker_claimed(sharing: Sharing, kind: str) -> Iterator[None]:
    """While the context lasts: what comes before the packs may wait for a worker's place, too."""
    over = threading.Event()

    def claim() -> None:
        while not over.wait(min(sharing.every_s, threading.TIMEOUT_MAX)):
            sharing.claim({kind: (1,)})

    thread = threading.Thread(target=claim)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def wanted_packs(view: SweepView) -> dict[str, Sizes]:
    """By kind of worker, the sizes of packs that run and of those that would be begun if all
    workers of this kind were the sweep's, and of the others its share."""
    sizes: dict[str, Sizes] = {}
    for kind in view.all_kinds:
        others = {name: most for name, most in view.limits.items() if name != kind.name}
        actions = decide(replace(view, limits=others, over_s=0.0, queued=frozenset()))
        ended = {a.pack for a in actions if isinstance(a, ReleasePack | AbandonPack)}
        runs = [
            pack.arithmetic.world_size
            for pack in view.packs
            if pack.kind == kind.name and pack.number not in ended
        ]
        plans = [action.plan for action in actions if isinstance(action, StartPack)]
        mine = [plan for plan in plans if plan.kind.name == kind.name]
        begun = [size for plan in mine for size in _sizes(plan, view)]
        sizes[kind.name] = (*runs, *begun)
    return sizes


def _sizes(plan: PackPlan, view: SweepView) -> list[int]:
    """A pack for trials that have not begun takes as many workers as there are, but no fewer than
    hold it."""
    half_trained = indexed(view.waiting, view.premises).among(view.had)
    kept = {view.had[trial.number] for trial in half_trained}
    if view.premises.resources.workers_per_pack is not None or plan.arithmetic in kept:
        return [plan.world_size]
    kind = next(kind for kind in view.all_kinds if kind.name == plan.kind.name)
    least = min(plan.world_size, least_workers(plan.key, kind, view.premises))
    return [least, *[1] * (plan.world_size - least)]

"""The packs that run, as decisions see them, indexed by what those ask: so that a decision costs
what has changed and not what runs.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from orchestrator.planning.waiting import PackKey
from orchestrator.records import Arithmetic


@dataclass(frozen=True)
class PackView:
    number: int
    key: PackKey
    num_slots: int
    occupied: int
    ready: bool
    """The base is loaded."""
    idle: bool
    """It has answered and waits to be told to go on."""
    arithmetic: Arithmetic = Arithmetic(1, 1, False)
    kind: str = ""
    """Of its workers."""
    at_rung: bool = False
    """It has just evaluated or saved one of its trials."""
    leaving: bool = False
    """It was told to save and leave."""

    @property
    def free(self) -> int:
        return self.num_slots - self.occupied


Alike = tuple[PackKey, Arithmetic, str, int]
"""Packs of one key, arithmetic, kind and number of slots."""


@dataclass
class OpenPacks:
    """Packs, all alike, with slots that they will have free once they have loaded, or answer."""

    views: dict[int, PackView] = field(default_factory=dict)
    """By number."""
    free: int = 0
    loading: int = 0

    def __iter__(self) -> Iterator[PackView]:
        return (self.views[number] for number in sorted(self.views))

    @property
    def first(self) -> PackView:
        return self.views[min(self.views)]

    def parted(self, numbers: AbstractSet[int]) -> tuple["OpenPacks", "OpenPacks"]:
        """Those with other numbers, and those with these; either may be empty."""
        others, these = OpenPacks(), OpenPacks()
        for view in self:
            (these if view.number in numbers else others).add(view)
        return others, these

    def add(self, view: PackView) -> None:
        self.views[view.number] = view
        self.free += view.free
        self.loading += not view.ready


class Packs:
    """By number, which are given in the order of their starts."""

    def __init__(self, views: Iterable[PackView] = ()) -> None:
        self._views: dict[int, PackView] = {}
        self._idle: set[int] = set()
        self._open: dict[Alike, OpenPacks] = {}
        self.workers: Counter[str] = Counter()
        """Taken, of each kind."""
        self.active: Counter[PackKey] = Counter()
        """Packs of each key."""
        for view in views:
            self.put(view)

    def put(self, view: PackView) -> None:
        """Add a pack, or what it has become."""
        before = self._views.get(view.number)
        if view is before:
            return
        if before is not None:
            self._leave(before)
        else:
            self.active[view.key] += 1
            self.workers[view.kind] += view.arithmetic.world_size
        self._views[view.number] = view
        if view.idle:
            self._idle.add(view.number)
        elif view.free and not view.leaving:
            self._open.setdefault(_alike(view), OpenPacks()).add(view)

    def __getitem__(self, number: int) -> PackView:
        return self._views[number]

    def drop(self, number: int) -> None:
        view = self._views.pop(number)
        self.active[view.key] -= 1
        self.workers[view.kind] -= view.arithmetic.world_size
        self._leave(view)

    def keep_to(self, views: Mapping[int, PackView]) -> None:
        """Make these the packs that run, at the cost of what has changed."""
        for number in self._views.keys() - views.keys():
            self.drop(number)
        for view in views.values():
            self.put(view)

    @property
    def idle(self) -> list[PackView]:
        return [self._views[number] for number in sorted(self._idle)]

    @property
    def open(self) -> list[OpenPacks]:
        """Of packs that are not idle."""
        return sorted(self._open.values(), key=lambda group: group.first.number)

    def _leave(self, view: PackView) -> None:
        self._idle.discard(view.number)
        if view.idle or view.leaving or not view.free:
            return
        group = self._open[_alike(view)]
        del group.views[view.number]
        group.free -= view.free
        group.loading -= not view.ready
        if not group.views:
            del self._open[_alike(view)]

    def __iter__(self) -> Iterator[PackView]:
        return iter(self._views.values())


def indexed_packs(packs: Iterable[PackView]) -> Packs:
    return packs if isinstance(packs, Packs) else Packs(packs)


def _alike(view: PackView) -> Alike:
    return view.key, view.arithmetic, view.kind, view.num_slots

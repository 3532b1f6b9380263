"""A sweep in simulated time: the real policy and planner, and packs that take as long as a step is
expected to take.

In: trials, kinds of workers and the seconds of a pass. Out: a Forecast: who trained what, where and
when. Pure, no Ray and no torch. `orchestrator plan` shows it for a sweep that is not started yet,
benchmarks/planner_simulation.py for clusters that nobody has at hand.

Left out: evaluations, checkpoints, and what the controller takes for an answer.
"""

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.options import Premises
from orchestrator.planning.packs import PackPlan
from orchestrator.planning.waiting import Waiting
from orchestrator.records import Arithmetic, TrialSpec
from orchestrator.sweep.pack_views import Packs, PackView
from orchestrator.sweep.policy import (
    AbandonPack,
    AssignTrial,
    ReleasePack,
    StartPack,
    SweepView,
    decide,
)

PassSeconds = Callable[[PackPlan, int], float]
"""Of a pack with so many slots occupied: seconds for one block of each, on each worker."""
StartSeconds = Callable[[PackPlan], float]
Learn = Callable[[int, PackPlan, int, float, float], Sequence[WorkerKind]]
"""From a pack with so many slots occupied, the blocks that each of them trained on each worker, and
the seconds that these took: the kinds as fast as they are known to be from then on."""


@dataclass(frozen=True)
class Loss:
    """Workers of a kind that go at a time, and come back."""

    at_s: float
    kind: str
    num_workers: int
    back_s: float


@dataclass(frozen=True)
class Span:
    """One attempt at a trial in one slot."""

    pack: int
    trial: int
    start_s: float
    end_s: float
    finished: bool


@dataclass
class PackSpan:
    number: int
    plan: PackPlan
    workers: tuple[int, ...]
    """Numbers of the workers, counted through all kinds."""
    start_s: float
    ready_s: float
    end_s: float = 0.0
    occupied_s: float = 0.0
    """Slots times seconds."""


@dataclass
class Forecast:
    spans: list[Span] = field(default_factory=list)
    packs: list[PackSpan] = field(default_factory=list)
    waiting: list[TrialSpec] = field(default_factory=list)
    """Trials that no pack could be begun for."""
    makespan_s: float = 0.0
    decisions_s: list[float] = field(default_factory=list)
    """What each call of the policy took of this thread's real time."""

    @property
    def worker_s(self) -> float:
        return sum((pack.end_s - pack.start_s) * len(pack.workers) for pack in self.packs)


def forecast(
    trials: Sequence[TrialSpec],
    kinds: Sequence[WorkerKind],
    premises: Premises,
    pass_seconds: PassSeconds,
    start_seconds: StartSeconds,
    losses: Sequence[Loss] = (),
    checkpoint_every_s: float = 0.0,
    learn: Learn | None = None,
) -> Forecast:
    """A trial that is lost goes on from its last checkpoint, at most `checkpoint_every_s` old."""
    cluster = _Cluster(
        trials, kinds, premises, pass_seconds, start_seconds, checkpoint_every_s, learn
    )
    return cluster.run(losses)


@dataclass
class _Pack:
    span: PackSpan
    left: dict[int, float] = field(default_factory=dict)
    """Blocks that each worker still has to train, by trial."""
    since: dict[int, float] = field(default_factory=dict)
    ready: bool = False
    idle: bool = False
    at_s: float = 0.0
    """Up to when `left` is counted."""
    version: int = 0
    """Of its next event: an older one is void."""


class _Cluster:
    def __init__(
        self,
        trials: Sequence[TrialSpec],
        kinds: Sequence[WorkerKind],
        premises: Premises,
        pass_seconds: PassSeconds,
        start_seconds: StartSeconds,
        checkpoint_every_s: float,
        learn: Learn | None,
    ) -> None:
        self._trials = {trial.number: trial for trial in trials}
        self._blocks = {t.number: float(t.config.steps * t.config.batch_size) for t in trials}
        """That all workers of its pack together still have to train."""
        self._waiting = Waiting(trials, premises.in_turn)
        self._kinds = {kind.name: kind for kind in kinds}
        self._premises = premises
        self._pass_seconds = pass_seconds
        self._start_seconds = start_seconds
        self._checkpoint_every_s = checkpoint_every_s
        self._learn = learn
        self._before_s = 0.0
        """What learning and the index of packs took since the last decision."""
        self._had: dict[int, Arithmetic] = {}
        self._packs: dict[int, _Pack] = {}
        self._views = Packs()
        first = 0
        self._free: dict[str, list[int]] = {}
        for kind in kinds:
            self._free[kind.name] = list(range(first, first + kind.count))[::-1]
            first += kind.count
        self._gone: dict[str, list[int]] = {kind.name: [] for kind in kinds}
        self._events: list[tuple[float, int, int]] = []
        self._changes: list[tuple[float, int, str, int]] = []
        self._now = 0.0
        self._found = Forecast()

    def run(self, losses: Sequence[Loss]) -> Forecast:
        for number, loss in enumerate(losses):
            self._changes.append((loss.at_s, number, loss.kind, -loss.num_workers))
            self._changes.append((loss.back_s, number, loss.kind, loss.num_workers))
        self._changes.sort()
        self._decide()
        while self._packs or self._waiting:
            if self._changes and (not self._events or self._changes[0][0] <= self._events[0][0]):
                self._change()
            elif not self._events:
                break  # nothing that waits can be trained
            elif not self._next_event():
                continue
            self._decide()
        self._found.waiting = list(self._waiting)
        self._found.makespan_s = max((span.end_s for span in self._found.spans), default=0.0)
        return self._found

    def _decide(self) -> None:
        """Ask the policy, carry out what it says, and let the packs that were told go on."""
        view = SweepView(
            self._waiting,
            self._views,
            sum(kind.count for kind in self._kinds.values()),
            self._premises,
            had=self._had,
            kinds=tuple(self._kinds.values()),
        )
        started = time.thread_time()
        actions = decide(view)
        self._found.decisions_s.append(self._before_s + time.thread_time() - started)
        self._before_s = 0.0
        for action in actions:
            match action:
                case StartPack(plan):
                    self._start(plan)
                case AssignTrial(number, trial):
                    self._assign(self._packs[number], trial)
                case ReleasePack(number) | AbandonPack(number):
                    self._end(number)
        for number in [view.number for view in self._views.idle]:
            pack = self._packs[number]
            pack.idle = False
            self._plan_next(pack)
            self._look(number)
        if any(isinstance(action, ReleasePack | AbandonPack) for action in actions):
            self._decide()  # a pack that has left is an answer, too

    def _start(self, plan: PackPlan) -> None:
        number = len(self._found.packs)
        free = self._free[plan.kind.name]
        workers = tuple(free.pop() for _ in range(plan.world_size))
        ready_s = self._now + self._start_seconds(plan)
        span = PackSpan(number, plan, workers, self._now, ready_s)
        self._found.packs.append(span)
        self._packs[number] = _Pack(span, at_s=ready_s)
        heapq.heappush(self._events, (ready_s, number, 0))
        self._look(number)

    def _assign(self, pack: _Pack, trial: int) -> None:
        self._waiting.remove(trial)
        self._progress(pack)
        pack.left[trial] = self._blocks[trial] / pack.span.plan.world_size
        pack.since[trial] = self._now

    def _next_event(self) -> bool:
        """Whether the event was not void: a pack is loaded, or some of its trials are trained."""
        at_s, number, version = heapq.heappop(self._events)
        pack = self._packs.get(number)
        if pack is None or pack.version != version:
            return False
        self._now = at_s
        self._progress(pack)
        pack.ready = pack.idle = True
        for trial in [trial for trial, left in pack.left.items() if left <= 1e-6]:
            self._close(pack, trial, finished=True)
            self._blocks[trial] = 0.0
        self._look(number)
        return True

    def _progress(self, pack: _Pack) -> None:
        """Count what was trained until now."""
        if pack.left and self._now > pack.at_s:
            occupied = len(pack.left)
            passed = self._now - pack.at_s
            blocks = passed / self._pass_seconds(pack.span.plan, occupied)
            pack.left = {trial: left - blocks for trial, left in pack.left.items()}
            pack.span.occupied_s += occupied * passed
            if self._learn is not None:
                self._take_in(self._learn, pack.span, occupied, blocks, passed)
        pack.at_s = max(pack.at_s, self._now)

    def _take_in(
        self, learn: Learn, span: PackSpan, occupied: int, blocks: float, passed: float
    ) -> None:
        with self._counted():
            for kind in learn(span.number, span.plan, occupied, blocks, passed):
                if kind.speed != self._kinds[kind.name].speed:
                    self._kinds[kind.name] = replace(self._kinds[kind.name], speed=kind.speed)

    def _plan_next(self, pack: _Pack) -> None:
        if not pack.left:
            return
        seconds = self._pass_seconds(pack.span.plan, len(pack.left))
        pack.version += 1
        at_s = self._now + max(0.0, min(pack.left.values())) * seconds
        heapq.heappush(self._events, (at_s, pack.span.number, pack.version))

    def _close(self, pack: _Pack, trial: int, finished: bool) -> None:
        del pack.left[trial]
        span = Span(pack.span.number, trial, pack.since.pop(trial), self._now, finished)
        self._found.spans.append(span)

    def _end(self, number: int, lost: bool = False) -> None:
        pack = self._packs.pop(number)
        with self._counted():
            self._views.drop(number)
        pack.span.end_s = self._now
        if not lost:
            self._free[pack.span.plan.kind.name] += pack.span.workers

    def _change(self) -> None:
        """Workers go, with their packs, or come back."""
        at_s, _, name, change = self._changes.pop(0)
        self._now = max(self._now, at_s)
        kind = self._kinds[name]
        if change > 0:
            self._free[name] += [self._gone[name].pop() for _ in range(change)]
        else:
            for _ in range(-change):
                self._lose_worker(name)
        count = kind.count + change
        self._kinds[name] = replace(kind, count=count)

    def _lose_worker(self, name: str) -> None:
        if self._free[name]:
            self._gone[name].append(self._free[name].pop())
            return
        number = next(n for n, p in self._packs.items() if p.span.plan.kind.name == name)
        pack = self._packs[number]
        self._progress(pack)
        for trial in list(pack.left):
            self._keep_checkpoint(pack, trial)
            self._close(pack, trial, finished=False)
            self._waiting.add(self._trials[trial])
        self._end(number, lost=True)
        first, *others = pack.span.workers
        self._gone[name].append(first)
        self._free[name] += others

    def _keep_checkpoint(self, pack: _Pack, trial: int) -> None:
        """What was trained since the last one is lost."""
        if not self._checkpoint_every_s:
            return
        lost_s = (self._now - pack.since[trial]) % self._checkpoint_every_s
        if self._now - pack.since[trial] < self._checkpoint_every_s:
            return
        seconds = self._pass_seconds(pack.span.plan, len(pack.left))
        plan = pack.span.plan
        left = (pack.left[trial] + lost_s / seconds) * plan.world_size
        self._blocks[trial] = min(self._blocks[trial], left)
        self._had[trial] = plan.arithmetic

    def _look(self, number: int) -> None:
        """Make anew what the policy sees of this pack."""
        pack = self._packs[number]
        plan = pack.span.plan
        view = PackView(
            number,
            plan.key,
            plan.num_slots,
            len(pack.left),
            pack.ready,
            pack.idle,
            plan.arithmetic,
            plan.kind.name,
        )
        with self._counted():
            self._views.put(view)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Towards the next decision's time."""
        started = time.thread_time()
        yield
        self._before_s += time.thread_time() - started

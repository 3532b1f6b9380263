"""Sweeps that share workers: who has how many, and that what gives way loses nothing."""

import itertools
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.memory import GIB
from orchestrator.planning.shares import Sizes
from orchestrator.planning.waiting import pack_key
from orchestrator.records import Arithmetic, Decision, Notice, PackStanding, Standing, TrialSpec
from orchestrator.sweep.executor import InProcessExecutor
from orchestrator.sweep.own_share import OwnShare, wanted_packs
from orchestrator.sweep.pack_views import PackView
from orchestrator.sweep.policy import (
    RUNG_WITHIN_S,
    SETTLED_AFTER_S,
    AbandonPack,
    AssignTrial,
    StartPack,
    SweepView,
    YieldPack,
    decide,
)
from orchestrator.sweep.run_store import RunStore
from orchestrator.sweep.sharing import EXPIRE_S, Claimant, Ledger, LedgerSharing, Share
from orchestrator.sweep.simulated import SimulatedWorker
from tests.sweeps import LLAMA_8B, make_controller, make_store, premises, sweep_config

NUM_WORKERS = 4
TIMEOUT_S = 120.0
STEPS = list(range(40, 48))


def fast() -> float:
    """Seconds that pass ten times as fast as those of a clock."""
    return 10 * time.monotonic()


def make_ledger(clock: Callable[[], float] = time.monotonic) -> Ledger:
    return Ledger(lambda: {"CPU cores": NUM_WORKERS}, clock)


class RunningSweep(threading.Thread):
    """One trial a pack, and none may be lost."""

    def __init__(self, folder: Path, ledger: Ledger, priority: int = 0, came: float = 0.0) -> None:
        super().__init__()
        config = sweep_config(
            search__space={"steps": STEPS}, resources__slots_per_pack=1, max_restarts=0
        )
        self.store = make_store(folder, config)
        claimant = Claimant(folder.name, priority, came, {"": ("CPU cores", 1)})
        self._sharing = LedgerSharing(ledger, claimant)
        self.packs: tuple[PackStanding, ...] = ()
        self.most_packs = 0
        self.finished = False
        self.controller = make_controller(
            self.store,
            InProcessExecutor(partial(SimulatedWorker, step_s=0.005)),
            NUM_WORKERS,
            self._observe,
            own_share=OwnShare(self._sharing, fast),
        )

    def run(self) -> None:
        self.finished = self.controller.run()
        self._sharing.close()

    def _observe(self, notice: Notice) -> None:
        if isinstance(notice, Standing):
            self.packs = notice.packs
            self.most_packs = max(self.most_packs, len(notice.packs))

    def decided(self, action: str) -> list[str]:
        return [d["reason"] for d in self.store.decisions if d["action"] == action]

    def end(self) -> "RunningSweep":
        self.join(TIMEOUT_S)
        assert self.finished
        return self


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def outcomes(store: RunStore) -> list[tuple[object, ...]]:
    """What a trial's result says of the trial, not of when and where it was trained."""
    return [
        (r.number, r.state, r.eval_loss, r.train_loss, r.steps, r.tokens, r.adapter_digest)
        for r in store.results
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[object, ...]]:
    sweep = RunningSweep(tmp_path_factory.mktemp("runs") / "alone", make_ledger())
    sweep.start()
    sweep.end()
    assert sweep.decided("share") == sweep.decided("yield_pack") == []
    return outcomes(sweep.store)


def assert_as_undisturbed(sweep: RunningSweep, undisturbed: list[tuple[object, ...]]) -> None:
    """Nothing was lost: no result differs, no step was trained twice, no loss was counted."""
    assert outcomes(sweep.store) == undisturbed
    assert sweep.decided("retry_trial") == []
    for trial in range(len(STEPS)):
        steps = [point["step"] for point in sweep.store.points(trial) if "train_loss" in point]
        assert steps == sorted(set(steps))
    again = [result.attempt for result in sweep.store.results]
    assert sum(again) - len(again) == len(sweep.decided("yield_pack")) > 0


def test_a_sweep_that_comes_later_gets_half_of_the_workers(
    tmp_path: Path, undisturbed: list[tuple[object, ...]]
) -> None:
    ledger = make_ledger()
    first, second = (RunningSweep(tmp_path / n, ledger, came=c) for c, n in enumerate("ab"))
    first.start()
    wait_until(lambda: len(first.packs) == NUM_WORKERS)
    second.start()
    first.end()
    second.end()
    assert_as_undisturbed(first, undisturbed)
    assert outcomes(second.store) == undisturbed
    assert first.decided("share")[0] == (
        "may use 2 of 4 CPU cores and could use 4 (priority 0); b may use 2 (priority 0)"
    )
    assert len(first.decided("yield_pack")) == 2
    assert set(first.decided("yield_pack")) == {
        "gives way to another sweep: a trial is at a rung or checkpoint"
    }
    assert second.decided("yield_pack") == []


def test_a_higher_priority_gets_all_workers_and_the_other_waits_and_goes_on(
    tmp_path: Path, undisturbed: list[tuple[object, ...]]
) -> None:
    ledger = make_ledger()
    low = RunningSweep(tmp_path / "low", ledger)
    high = RunningSweep(tmp_path / "high", ledger, priority=1, came=1.0)
    low.start()
    wait_until(lambda: len(low.packs) == NUM_WORKERS)
    high.start()
    wait_until(lambda: low.decided("yield_pack") and not low.packs)
    assert low.is_alive()
    high.end()
    low.end()
    assert_as_undisturbed(low, undisturbed)
    assert high.most_packs == NUM_WORKERS
    assert high.decided("share") == high.decided("yield_pack") == []
    assert low.decided("share")[-1] == "may use all workers that it can use"


def test_a_sweep_without_a_share_begins_nothing_until_the_one_that_had_it_is_killed(
    tmp_path: Path, undisturbed: list[tuple[object, ...]]
) -> None:
    now = 0.0
    ledger = make_ledger(lambda: now)
    killed = LedgerSharing(ledger, Claimant("killed", 5, 0.0, {"": ("CPU cores", 1)}))
    killed.claim({"": (1,) * NUM_WORKERS})
    sweep = RunningSweep(tmp_path / "run", ledger)
    sweep.start()
    wait_until(lambda: sweep.decided("share"))
    now = EXPIRE_S + 1
    sweep.end()
    assert outcomes(sweep.store) == undisturbed
    actions = [decision["action"] for decision in sweep.store.decisions]
    assert actions.index("share") < actions.index("start_pack")
    assert sweep.decided("share") == [
        "may use 0 of 4 CPU cores and could use 4 (priority 0); killed may use 4 (priority 5)",
        "may use all workers that it can use",
    ]


def test_a_sweep_that_waits_for_a_share_can_be_asked_to_stop(tmp_path: Path) -> None:
    ledger = make_ledger()
    other = LedgerSharing(ledger, Claimant("other", 5, 0.0, {"": ("CPU cores", 1)}))
    other.claim({"": (1,) * NUM_WORKERS})
    sweep = RunningSweep(tmp_path / "run", ledger)
    sweep.start()
    wait_until(lambda: sweep.decided("share"))
    sweep.controller.request_stop()
    sweep.join(TIMEOUT_S)
    assert not sweep.is_alive()
    assert not sweep.finished
    assert sweep.decided("start_pack") == []


class Silent:
    """A cluster whose ledger does not answer."""

    every_s = 0.0

    def claim(self, packs: Mapping[str, Sizes]) -> Share:
        return Share(reason="no answer")

    def close(self) -> None:
        pass


def test_a_sweep_that_gets_no_answer_goes_on_with_all_workers_and_says_so_once(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    told: list[Decision] = []

    def observe(notice: Notice) -> None:
        if isinstance(notice, Decision) and notice.action == "share":
            told.append(notice)

    ticks = itertools.count()
    share = OwnShare(Silent(), lambda: float(next(ticks)))
    executor = InProcessExecutor(SimulatedWorker)
    assert make_controller(store, executor, observe=observe, own_share=share).run()
    assert [decision.reason for decision in told] == ["no answer"]
    assert len(store.results) == 4


TRIALS = [TrialSpec(number, {}, sweep_config().trial) for number in range(8)]
KEY = pack_key(TRIALS[0].config)


def pack(number: int, occupied: int = 2, **changes: object) -> PackView:
    one = PackView(number, KEY, 2, occupied, ready=True, idle=True)
    return replace(one, **changes)  # type: ignore[arg-type]


def over(*packs: PackView, limit: int, seconds: float = SETTLED_AFTER_S) -> SweepView:
    given = premises(sweep_config())
    return SweepView((), packs, NUM_WORKERS, given, limits={"": limit}, over_s=seconds)


LOADING = pack(0, 0, ready=False, idle=False)
BUSY = pack(1, idle=False)
ANSWERED = pack(2)
AT_RUNG = pack(3, at_rung=True)


def test_packs_that_lose_least_give_way_first() -> None:
    fewer = pack(4, 1, at_rung=True)
    packs = (LOADING, BUSY, ANSWERED, AT_RUNG, fewer)
    given_up = [YieldPack(0), YieldPack(4), YieldPack(3)]
    for limit, number in ((4, 1), (3, 2), (2, 3), (0, 3)):
        assert decide(over(*packs, limit=limit)) == given_up[:number]
    assert decide(over(*packs, limit=5)) == [AbandonPack(0)]  # no trial waits for it


def test_a_pack_larger_than_what_is_over_gives_way_only_if_no_other_does_in_time() -> None:
    gang = pack(5, 1, at_rung=True, arithmetic=Arithmetic(4, 1, False))
    view = over(gang, BUSY, limit=4)
    assert decide(view) == []
    assert decide(replace(view, over_s=RUNG_WITHIN_S)) == [YieldPack(5)]
    assert decide(over(gang, AT_RUNG, limit=4)) == [YieldPack(3)]


def test_a_pack_is_given_up_at_a_rung_if_one_comes_in_time_and_else_where_it_is() -> None:
    view = over(BUSY, ANSWERED, limit=0)
    assert decide(view) == []
    (action,) = decide(replace(view, over_s=RUNG_WITHIN_S))
    assert action == YieldPack(2)
    assert action.reason == ("gives way to another sweep: no rung or checkpoint came within 60 s")


def test_nothing_is_given_up_for_a_claim_that_does_not_last() -> None:
    assert decide(over(AT_RUNG, limit=0, seconds=SETTLED_AFTER_S - 1)) == []


def test_a_pack_that_is_on_its_way_out_is_not_counted_again() -> None:
    leaving = pack(0, idle=False, leaving=True)
    assert decide(over(leaving, AT_RUNG, limit=1)) == []


def test_a_pack_without_trials_waits_for_no_rung() -> None:
    view = replace(over(pack(0, 0), limit=0), waiting=TRIALS)
    assert decide(view) == [YieldPack(0)]


def test_a_sweep_begins_no_more_packs_than_its_share() -> None:
    view = SweepView(TRIALS, (), NUM_WORKERS, premises(sweep_config()), limits={"": 1})
    assert [type(action) for action in decide(view)] == [StartPack]
    assert wanted_packs(view) == {"": (1,) * NUM_WORKERS}


def on_gpus(*packs: PackView, **changes: object) -> SweepView:
    given = premises(sweep_config(trial__batch_size=4), "cuda", LLAMA_8B, 141 * GIB)
    view = SweepView((), packs, NUM_WORKERS, given)
    return replace(view, **changes)  # type: ignore[arg-type]


FOUR = TrialSpec(0, {}, sweep_config(trial__batch_size=4).trial)


def test_a_trial_that_has_begun_waits_for_as_many_workers_as_it_had() -> None:
    """So it ends with the same bits."""
    fresh = on_gpus(waiting=(FOUR,), limits={"": 2})
    (start,) = decide(fresh)
    assert isinstance(start, StartPack)
    assert start.plan.world_size == 2
    assert wanted_packs(fresh) == {"": (1, 1, 1, 1)}
    begun = replace(fresh, had={0: Arithmetic(4, 1, False)})
    assert decide(begun) == []
    assert wanted_packs(begun) == {"": (4,)}
    (start,) = decide(replace(begun, limits={"": 4}))
    assert isinstance(start, StartPack)
    assert start.plan.world_size == 4


def test_a_base_that_several_workers_hold_together_has_them_all_or_none() -> None:
    """Half of them would wait for the other half, and so would another such sweep's."""
    zero = {"kind": "zero", "stage": 3}
    config = sweep_config(trial__batch_size=4, trial__strategy=zero, trial__quant__bit_width=16)
    given = premises(config, "cuda", LLAMA_8B, 14 * GIB)
    view = SweepView((TrialSpec(0, {}, config.trial),), (), NUM_WORKERS, given)
    (start,) = decide(view)
    assert isinstance(start, StartPack)
    assert start.plan.fit.fits
    assert wanted_packs(view) == {"": (4,)}
    assert decide(replace(view, limits={"": 2})) == []


FAST = WorkerKind("H200", 2, 140 * GIB, 1.0)
SLOW = WorkerKind("L4", 2, 22 * GIB, 0.1)


def test_what_others_have_of_one_kind_of_gpu_is_made_up_for_by_another() -> None:
    (trial, *_) = TRIALS
    view = on_gpus(waiting=(trial,), kinds=(FAST, SLOW))
    assert wanted_packs(view) == {"H200": (1, 1), "L4": ()}
    without = replace(view, limits={"H200": 0})
    assert wanted_packs(without) == {"H200": (1, 1), "L4": (1, 1)}
    assert {a.plan.kind.name for a in decide(without) if isinstance(a, StartPack)} == {"L4"}


def test_a_kind_is_over_its_share_by_itself() -> None:
    fast, slow = pack(0, at_rung=True, kind="H200"), pack(1, at_rung=True, kind="L4")
    view = on_gpus(fast, slow, kinds=(FAST, SLOW), limits={"L4": 0}, over_s=SETTLED_AFTER_S)
    assert decide(view) == [YieldPack(1)]


def test_a_pack_that_gives_way_takes_no_trial_on_its_way_out() -> None:
    stays, goes = pack(0, 1, at_rung=True), pack(1, 1, at_rung=True)
    view = replace(over(stays, goes, limit=1), waiting=TRIALS[:1])
    assert decide(view) == [YieldPack(1), AssignTrial(0, 0)]

"""What becomes of the trials of a pack whose worker raised: only one that raises alone fails."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import (
    BaseModelError,
    BaseModelUnreachable,
    DataError,
    DataUnreachable,
    LoadingFailed,
)
from orchestrator.records import (
    Checkpointed,
    Decision,
    Directive,
    Event,
    GroupPlace,
    Notice,
    PackLost,
    PackReady,
    PackSpec,
)
from orchestrator.sweep.executor import InProcessExecutor, Worker, answer
from orchestrator.sweep.losses import Loads, remedy, slot_limits
from orchestrator.sweep.run_store import RunStore
from orchestrator.sweep.running import RunningPack
from orchestrator.sweep.simulated import SimulatedWorker
from tests.sweeps import make_controller, make_store, pack_plan, premises, sweep_config

RAISED = PackLost(0, "raised", "ValueError: a simulated error")


def eight_trials(folder: Path, **changes: Any) -> RunStore:
    space = {"adapter.rank": list(range(1, 9))}
    changes = {"resources__slots_per_pack": 8} | changes
    return make_store(folder, sweep_config(search__space=space, **changes))


def splits(store: RunStore, since: int = 0) -> list[dict[str, Any]]:
    return [d for d in store.decisions[since:] if d["action"] == "split_pack"]


def states(store: RunStore) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for result in store.results:
        found.setdefault(result.reason or result.state, []).append(result.number)
    return found


def test_the_trial_at_fault_is_found_by_halves_and_its_neighbours_are_trained_to_their_end(
    tmp_path: Path,
) -> None:
    store = eight_trials(tmp_path / "run", max_restarts=0)  # which it does not count against
    executor = InProcessExecutor(partial(SimulatedWorker, faults={5: "raise"}))
    assert make_controller(store, executor, num_workers=1).run()
    assert states(store) == {"finished": [0, 1, 2, 3, 4, 6, 7], "raised": [5]}
    assert store.results[5].message == "ValueError: a simulated error"
    assert [d["facts"]["max_slots"] for d in splits(store)] == [4, 2, 1]
    assert all(5 in d["facts"]["trials"] for d in splits(store))
    assert splits(store)[0]["reason"] == (
        "it raised with 8 trials at work, and whose fault that was is not known: tried again, at "
        "most 4 in a pack, so that no other fails for it"
    )
    (retried, *_) = [d for d in store.decisions if d["action"] == "retry_trial"]
    assert retried["reason"] == "its pack is lost: raised: ValueError: a simulated error"


def test_a_resume_does_not_put_trials_together_again_that_were_parted(tmp_path: Path) -> None:
    store = eight_trials(tmp_path / "run")
    executor = InProcessExecutor(partial(SimulatedWorker, faults={5: "raise"}))

    def stop_once_they_are_in_pairs(notice: Notice) -> None:
        if isinstance(notice, Decision) and notice.facts.get("max_slots") == 2:
            controller.request_stop()

    controller = make_controller(store, executor, 1, stop_once_they_are_in_pairs)
    assert not controller.run()
    assert len(store.results) < 8
    before, events_before = len(store.decisions), len(store.pack_events)
    again = RunStore.open(store.folder)
    assert make_controller(again, executor, num_workers=1).run()
    assert states(again) == {"finished": [0, 1, 2, 3, 4, 6, 7], "raised": [5]}
    assert [d["facts"]["max_slots"] for d in splits(again, before)] == [1]
    started = [e for e in again.pack_events[events_before:] if e["what"] == "start"]
    assert max(event["num_slots"] for event in started) == 2


class Loading:
    """Of workers in one process: the first loads raise."""

    def __init__(self, error: Exception, times: int) -> None:
        self._error = error
        self._left = times
        self.loads = 0

    def worker(self, spec: PackSpec, place: GroupPlace) -> Worker:
        self.loads += 1
        if self.loads <= self._left:
            raise self._error
        return SimulatedWorker(spec, place)


@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize(
    "error",
    [
        BaseModelUnreachable("base_model.source: the hub did not give it: 503"),
        DataUnreachable("s3://shards: 503"),
        RuntimeError("CUDA error: unspecified launch failure"),
    ],
    ids=repr,
)
def test_loads_that_fail_for_their_surroundings_on_all_workers_count_once(
    tmp_path: Path, error: Exception, num_workers: int
) -> None:
    store = eight_trials(tmp_path / "run", resources__slots_per_pack=2, max_restarts=3)
    loading = Loading(error, times=3 * num_workers)
    assert make_controller(store, InProcessExecutor(loading.worker), num_workers).run()
    assert states(store) == {"finished": list(range(8))}
    assert loading.loads == 3 * num_workers + num_workers


def test_one_machine_at_fault_does_not_count_while_another_one_loads() -> None:
    plan = pack_plan(sweep_config().trial, 2)
    key, loads = plan.key.unlimited, Loads()
    assert loads.may_go_on(key, 2, {0: RunningPack(plan, ready=True)})
    slow = {3: RunningPack(plan)}  # in place of the one that was ready, on the same worker
    for next_pack in (5, 6, 7):
        again = {next_pack - 1: RunningPack(plan)} if next_pack > 5 else {}
        assert loads.may_go_on(key, next_pack, slow | again)
    assert not loads.may_go_on(key, 8, {7: RunningPack(plan)})


@pytest.mark.parametrize("slots", [4, 5, 8, None])
def test_out_of_memory_ends_a_sweep_whose_base_has_no_estimate(
    tmp_path: Path, slots: int | None
) -> None:
    store = eight_trials(tmp_path / "run", resources__slots_per_pack=slots)
    loading = Loading(RuntimeError("CUDA out of memory"), times=100)
    assert make_controller(store, InProcessExecutor(loading.worker), 1).run()
    assert states(store) == {"out_of_memory": list(range(8))}
    assert loading.loads < 20


@pytest.mark.parametrize(
    ("error", "tries", "reason"),
    [
        (BaseModelError("tiny: it has no linear layer"), 1, "raised"),
        (DataError("shard 3: its digest is another"), 1, "data_error"),
        (RuntimeError("CUDA error: unspecified launch failure"), 4, "raised"),
    ],
)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_one_that_cannot_work_fails_at_once_and_others_after_max_restarts(
    tmp_path: Path, error: Exception, tries: int, reason: str, num_workers: int
) -> None:
    """Of several workers all try."""
    store = eight_trials(tmp_path / "run", resources__slots_per_pack=1)
    loading = Loading(error, times=100)
    assert make_controller(store, InProcessExecutor(loading.worker), num_workers).run()
    assert states(store) == {reason: list(range(8))}
    assert loading.loads == tries * num_workers


@pytest.mark.parametrize(
    "error",
    [BaseModelUnreachable("the hub did not give it: 503"), DataUnreachable("s3://shards: 503")],
    ids=repr,
)
def test_an_outage_fails_nobody_and_a_resume_goes_on(tmp_path: Path, error: Exception) -> None:
    store = eight_trials(tmp_path / "run", resources__slots_per_pack=2)
    loading = Loading(error, times=100)
    with pytest.raises(LoadingFailed) as raised:
        make_controller(store, InProcessExecutor(loading.worker), 2).run()
    assert str(raised.value) == (
        f"no worker could load the 4-bit nf4 base: {error} (4 times, max_restarts=3); trials 0-7 "
        "wait with all that they have: see to the cause, then resume the sweep"
    )
    assert store.results == []
    assert make_controller(store, InProcessExecutor(SimulatedWorker), 2).run()
    assert states(store) == {"finished": list(range(8))}


@pytest.mark.parametrize("resumed", [False, True])
def test_a_base_that_was_loaded_before_is_not_at_fault_if_it_cannot_be_later(
    tmp_path: Path, resumed: bool
) -> None:
    """A GPU that fails takes no half-trained trial with it."""
    store = eight_trials(tmp_path / "run", resources__slots_per_pack=1)
    broken = False

    class Breaking(SimulatedWorker):
        def load(self) -> PackReady:
            if broken:
                raise RuntimeError("CUDA error: unspecified launch failure")
            return super().load()

        def advance(self, directives: Sequence[Directive]) -> list[Event]:
            if broken and not resumed:
                raise ConnectionError("the GPU fell off the bus")
            return super().advance(directives)

    def break_after_a_checkpoint(notice: Notice) -> None:
        nonlocal broken
        if isinstance(notice, Checkpointed) and not broken:
            broken = True
            if resumed:
                controller.request_stop()

    executor = InProcessExecutor(Breaking)
    controller = make_controller(store, executor, 1, break_after_a_checkpoint)
    if resumed:
        assert not controller.run()
        controller = make_controller(store, executor, 1)
    with pytest.raises(LoadingFailed, match="unspecified launch failure"):
        controller.run()
    assert store.results == []
    assert store.checkpoints(0)
    broken = False
    assert make_controller(store, executor, 1).run()
    assert states(store) == {"finished": list(range(8))}


def test_other_bases_are_trained_while_one_cannot_be_read(tmp_path: Path) -> None:
    config = sweep_config(search__space={"quant.bit_width": [4, 16], "adapter.rank": [2, 4]})
    store = make_store(tmp_path / "run", config)

    def worker(spec: PackSpec, place: GroupPlace) -> Worker:
        if spec.quant["bit_width"] == 4:
            raise BaseModelUnreachable("the hub did not give it: 503")
        return SimulatedWorker(spec, place)

    with pytest.raises(LoadingFailed, match="trials 0-1 wait"):
        make_controller(store, InProcessExecutor(worker), 1).run()
    assert states(store) == {"finished": [2, 3]}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
    ids=str,
)
def test_whoever_runs_out_of_memory_it_is_out_of_memory(error: Exception) -> None:
    def step() -> list[Event]:
        raise error

    (lost,) = answer(0, step)
    assert isinstance(lost, PackLost)
    assert lost.reason == "out_of_memory"


@settings(max_examples=10)
@given(
    at_fault=st.sets(st.integers(0, 7)),
    num_workers=st.integers(1, 3),
    slots_per_pack=st.sampled_from([None, 1, 3, 8]),
)
def test_whoever_raises_fails_and_nobody_else_in_packs_of_any_size(
    tmp_path_factory: pytest.TempPathFactory,
    at_fault: set[int],
    num_workers: int,
    slots_per_pack: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("sweep") / "run"
    store = eight_trials(folder, resources__slots_per_pack=slots_per_pack, max_restarts=0)
    factory = partial(SimulatedWorker, faults=dict.fromkeys(at_fault, "raise"))
    assert make_controller(store, InProcessExecutor(factory), num_workers).run()
    assert states(store).get("raised", []) == sorted(at_fault)
    assert states(store).get("finished", []) == sorted(set(range(8)) - at_fault)


def test_a_pack_of_one_that_raises_is_not_tried_again() -> None:
    given = premises(sweep_config())
    found = remedy(pack_plan(sweep_config().trial, 1), [3], 1, RAISED, given)
    assert (found.retried, found.action) == (False, "")


def test_the_last_in_a_pack_does_not_fail_for_one_that_was_stopped_while_it_trained() -> None:
    given = premises(sweep_config())
    found = remedy(pack_plan(sweep_config().trial, 2), [3], 2, RAISED, given)
    assert found.retried
    assert found.facts == {"trials": [3], "max_slots": 1}
    assert "each alone" in found.reason


def test_the_latest_split_of_a_trial_holds() -> None:
    rows = [{"trials": [0, 1, 2, 3], "max_slots": 2}, {"trials": [1, 3], "max_slots": 1}]
    decisions: list[dict[str, Any]] = [{"action": "split_pack", "facts": row} for row in rows]
    decisions.append({"action": "start"})
    assert slot_limits(decisions) == {0: 2, 1: 1, 2: 2, 3: 1}

from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from orchestrator.errors import DiskFull
from orchestrator.planning.packs import pack_key
from orchestrator.records import Event, PackLost, PackSpec, TrialSpec
from orchestrator.sweep.executor import InProcessExecutor
from orchestrator.sweep.policy import AbandonPack, PackView, SweepView, decide
from orchestrator.sweep.run_store import RunStore
from orchestrator.sweep.selection import select_winner
from orchestrator.sweep.simulated import SimulatedWorker
from tests.sweeps import make_controller, make_store, premises, sweep_config


def finished(store: RunStore) -> list[int]:
    return [result.number for result in store.results if result.state == "finished"]


def test_every_trial_is_trained_once_and_the_best_wins(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    assert make_controller(store, InProcessExecutor(SimulatedWorker)).run()
    assert finished(store) == [0, 1, 2, 3]
    assert Counter(result.attempt for result in store.results) == {1: 4}
    winner = select_winner(store.trials, store.results)
    assert winner is not None
    assert winner.trial == 3  # 16 bits and rank 16 have the least simulated loss


def test_a_free_slot_is_given_to_the_next_trial_of_the_same_base(tmp_path: Path) -> None:
    config = sweep_config(
        search__space={"adapter.rank": [1, 2, 3, 4, 5]}, resources__slots_per_pack=2
    )
    store = make_store(tmp_path / "run", config)
    assert make_controller(store, InProcessExecutor(SimulatedWorker), num_workers=1).run()
    assert finished(store) == [0, 1, 2, 3, 4]
    started = [d for d in store.decisions if d["action"] == "start_pack"]
    assert len(started) == 1  # one base was loaded for all five


def test_a_worker_that_raises_fails_its_trials_and_no_others(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    factory = partial(SimulatedWorker, faults={0: "raise"})
    assert make_controller(store, InProcessExecutor(factory)).run()
    failed = {result.number: result.reason for result in store.results if result.state == "failed"}
    assert failed == {0: "raised", 1: "raised"}  # 0 and 1 share the 4-bit base
    assert finished(store) == [2, 3]


def test_a_trial_that_diverges_harms_no_neighbour(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    factory = partial(SimulatedWorker, faults={0: "nan"})
    assert make_controller(store, InProcessExecutor(factory)).run()
    failed = {result.number: result.reason for result in store.results if result.state == "failed"}
    assert failed == {0: "loss_not_finite"}
    assert finished(store) == [1, 2, 3]


def test_a_base_that_cannot_be_loaded_fails_all_trials_that_wait_for_it(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    factory = partial(SimulatedWorker, faults={-1: "raise"})
    assert make_controller(store, InProcessExecutor(factory)).run()
    assert [result.state for result in store.results] == ["failed"] * 4
    assert select_winner(store.trials, store.results) is None


def test_a_full_disk_stops_the_sweep_and_fails_no_trial(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    factory = partial(SimulatedWorker, faults={1: "disk_full"})
    with pytest.raises(DiskFull, match="disk is full"):
        make_controller(store, InProcessExecutor(factory)).run()
    assert store.results == []


def test_a_sweep_that_was_asked_to_stop_saves_and_resumes_where_it_was(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())

    def stop_after_three_steps(event: Event) -> None:
        if getattr(event, "step", 0) == 3:
            controller.request_stop()

    executor = InProcessExecutor(SimulatedWorker)
    controller = make_controller(store, executor, observe=stop_after_three_steps)
    assert not controller.run()
    assert store.results == []
    steps_before = {point["step"] for point in store.points(0)}

    again = make_controller(RunStore.open(store.folder), InProcessExecutor(SimulatedWorker))
    assert again.run()
    assert finished(store) == [0, 1, 2, 3]
    first_attempts = [p["step"] for p in store.points(0) if p["attempt"] == 1]
    second_attempts = [p["step"] for p in store.points(0) if p["attempt"] == 2]
    assert max(first_attempts) == max(steps_before)
    assert min(second_attempts) == max(steps_before) + 1  # no step was trained twice


def test_finished_trials_are_not_trained_again_on_resume(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    make_controller(store, InProcessExecutor(SimulatedWorker)).run()
    before = {path: path.stat().st_mtime_ns for path in store.folder.rglob("result.json")}
    make_controller(store, InProcessExecutor(SimulatedWorker)).run()
    assert {path: path.stat().st_mtime_ns for path in store.folder.rglob("result.json")} == before


def test_a_pack_that_never_loads_does_not_outlive_the_last_trial() -> None:
    trial = sweep_config().trial
    given = premises(sweep_config())
    loading = PackView(0, pack_key(trial), 2, occupied=0, ready=False, idle=False)
    assert decide(SweepView((), (loading,), 2, given)) == [AbandonPack(0)]
    assert decide(SweepView((TrialSpec(0, {}, trial),), (loading,), 1, given)) == []


class LosesOneLoad(InProcessExecutor):
    """The first pack is lost while it loads; the machine was at fault."""

    def start_pack(self, spec: PackSpec) -> None:
        super().start_pack(spec)
        if spec.pack == 0:
            self._due[0] = lambda: [PackLost(0, "worker_lost", "the node is gone")]


@pytest.mark.parametrize("num_workers", [1, 4])
def test_workers_lost_while_loading_fail_no_trial(tmp_path: Path, num_workers: int) -> None:
    config = sweep_config(search__space={"adapter.rank": [1, 2, 3, 4]})
    store = make_store(tmp_path / "run", config)
    assert make_controller(store, LosesOneLoad(SimulatedWorker), num_workers).run()
    assert finished(store) == [0, 1, 2, 3]


def test_a_point_that_cannot_work_is_a_failed_trial_and_ends_nothing(tmp_path: Path) -> None:
    config = sweep_config(search__space={"schedule.warmup_steps": [0, 6]})
    store = make_store(tmp_path / "run", config)
    assert make_controller(store, InProcessExecutor(SimulatedWorker)).run()
    assert [(result.state, result.reason) for result in store.results] == [
        ("finished", ""),
        ("failed", "not_valid"),
    ]
    assert "warmup_steps" in store.results[1].message


def test_checkpoints_of_finished_trials_are_removed(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    make_controller(store, InProcessExecutor(SimulatedWorker)).run()
    assert list(store.folder.rglob("checkpoint-*")) == []

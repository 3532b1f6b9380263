"""A worker that hangs alone, in a process of Ray's: what its sweep does without it."""

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.ray_executor import RayExecutor
from cluster.ray_runtime import ray_cluster
from orchestrator.records import Decision, Event, Notice, Progress
from orchestrator.sweep.run_store import RunStore
from orchestrator.sweep.simulated import SimulatedWorker
from tests.sweeps import make_controller, make_store, sweep_config

# A pack that loads is given eight times as long: far more than a process takes to start.
HANG_AFTER_S = 5.0


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    with ray_cluster(None):
        yield


class HangsOnce(SimulatedWorker):
    """In the first attempt of trial 0, after the checkpoint of its second step."""

    def _step(self, slot: Any) -> list[Event]:
        if (slot.task.trial, slot.task.attempt, slot.step) == (0, 1, 3):
            self._faults = {0: "hang"}
            self._befall(0)
        return super()._step(slot)


def run(store: RunStore, factory: Callable[..., SimulatedWorker]) -> list[Notice]:
    told: list[Notice] = []
    with closing(RayExecutor(factory)) as executor:
        assert make_controller(store, executor, observe=told.append).run()
    return told


def test_the_trials_of_a_worker_that_hangs_go_on_from_their_checkpoints_in_another(
    tmp_path: Path,
) -> None:
    config = sweep_config(resources__hang_after_s=HANG_AFTER_S)
    store = make_store(tmp_path / "run", config)
    told = run(store, HangsOnce)
    assert {result.number: result.attempt for result in store.results} == {0: 2, 1: 2, 2: 1, 3: 1}
    assert {result.state for result in store.results} == {"finished"}
    (given_up,) = [d for d in store.decisions if d["action"] == "give_up_pack"]
    assert "while training it has reported nothing for" in given_up["reason"]
    assert [d.reason for d in told if isinstance(d, Decision) and d.action == "give_up_pack"] == [
        given_up["reason"]
    ]
    retried = [d for d in store.decisions if d["action"] == "retry_trial"]
    assert [d["subject"] for d in retried] == ["trial 0", "trial 1"]
    assert all(given_up["reason"] in d["reason"] for d in retried)
    resumed = [d["reason"] for d in store.decisions if d["action"] == "resume_trial"]
    assert resumed == ["attempt 2 goes on from step 2"] * 2


@pytest.mark.slow
def test_a_trial_whose_workers_always_hang_fails_with_the_reason_and_no_other_does(
    tmp_path: Path,
) -> None:
    config = sweep_config(
        resources__hang_after_s=HANG_AFTER_S, resources__slots_per_pack=1, max_restarts=1
    )
    store = make_store(tmp_path / "run", config)
    run(store, partial(SimulatedWorker, faults={3: "hang"}))
    states = {result.number: result.state for result in store.results}
    assert states == {0: "finished", 1: "finished", 2: "finished", 3: "failed"}
    (failed,) = [result for result in store.results if result.state == "failed"]
    assert failed.reason == "worker_lost"
    assert failed.message.startswith("it hangs: while training it has reported nothing")
    assert failed.message.endswith("(2 times, max_restarts=1)")
    assert len([d for d in store.decisions if d["action"] == "give_up_pack"]) == 2


def test_a_sweep_that_is_asked_to_stop_ends_though_a_worker_hangs(tmp_path: Path) -> None:
    config = sweep_config(search__space={"quant.bit_width": [4, 16]}, trial__steps=100_000)
    store = make_store(tmp_path / "run", config)
    reports: list[int] = []  # of trial 1, since trial 0 was told to take the step that it hangs in

    def stop_when_one_hangs(notice: Notice) -> None:
        if isinstance(notice, Progress) and (notice.trial == 0 or reports):
            reports.append(notice.step)
            if len(reports) == 20:
                controller.request_stop()

    factory = partial(SimulatedWorker, faults={0: "hang"}, step_s=0.05)
    with closing(RayExecutor(factory)) as executor:
        controller = make_controller(store, executor, 2, stop_when_one_hangs, leave_timeout_s=5.0)
        assert not controller.run()
    assert store.results == []
    (given_up,) = [d for d in store.decisions if d["action"] == "give_up_pack"]
    assert given_up["subject"] == "pack 0"
    assert given_up["reason"] == "it did not save within 5 s of being asked to"
    assert store.checkpoints(1), "the healthy one has saved"

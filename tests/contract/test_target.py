"""What every place that sweeps are sent to does: RayJobs on Kubernetes, jobs of a Ray cluster."""

from pathlib import Path
from typing import Protocol

import pytest

from cluster.kubernetes.options import KubernetesOptions
from cluster.kubernetes.target import plan_rayjob
from cluster.ray_jobs import RayJobs
from cluster.ray_stand_in import RayStandIn
from cluster.ray_target import RayTarget, plan_ray_job
from cluster.submission import BEFORE, Action, exit_code
from cluster.target import Plan, Target
from orchestrator.errors import ConfigError, NeverStarted
from tests import stage
from tests.manifests import hub_sweep

CREATE = Action("create", "there is none")
WORKER = {"actor_id": "a1", "repr_name": "pack 3 worker 0", "state": "ALIVE", "job_id": "01"}


class Place(Protocol):
    target: Target
    plan: Plan

    def run(self) -> None:
        """Its driver runs, with one worker of pack 3."""

    def end(self, state: str, code: int | None) -> None: ...

    def print(self, text: str) -> None: ...

    def settle(self) -> None:
        """What controllers do after a driver was asked to stop."""


class OnKubernetes:
    def __init__(self, folder: Path) -> None:
        self._stage = stage.Stage(folder)
        self.target: Target = self._stage.target
        self.plan = plan_rayjob(KubernetesOptions(gpus=2), hub_sweep(), None)

    def run(self) -> None:
        stage.running(self._stage)
        self._stage.ray.jobs["job-1"]["job_id"] = "01"
        self._stage.ray.actors = [WORKER | {"out": "from a worker\n", "err": ""}]

    def end(self, state: str, code: int | None) -> None:
        message = f"Job entrypoint command failed with exit code {code}" if code else ""
        status = {"reason": "AppFailed", "message": message} if code else {}
        self._stage.status("Failed" if code else "Complete", state, **status)

    def print(self, text: str) -> None:
        self._stage.ray.print("job-1", text)

    def settle(self) -> None:
        self.end(self._stage.ray.jobs["job-1"]["status"], None)


class OnRay:
    def __init__(self) -> None:
        self._ray = RayStandIn()
        self.target: Target = RayTarget(RayJobs(self._ray.send), sleep=lambda seconds: None)
        self.plan = plan_ray_job("/shared", 60, hub_sweep(), None)

    def run(self) -> None:
        self._ray.start("test")
        self._ray.jobs["test"] |= {"job_id": "01", "driver_agent_http_address": "http://n:1"}
        self._ray.actors = [WORKER | {"out": "from a worker\n", "err": ""}]

    def end(self, state: str, code: int | None) -> None:
        self._ray.end("test", state, code)

    def print(self, text: str) -> None:
        self._ray.print("test", text)

    def settle(self) -> None:
        pass


@pytest.fixture(params=["kubernetes", "ray"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return OnKubernetes(tmp_path) if request.param == "kubernetes" else OnRay()


def state_at(place: Place) -> str:
    view = place.target.find("test")
    return view.state if view is not None else "not there"


def test_what_was_not_sent_is_not_there(place: Place) -> None:
    assert place.target.find("test") is None
    assert place.target.story("test") is None
    assert place.target.log("test") is None
    assert place.target.list() == []
    for verb in (place.target.cancel, place.target.pause, place.target.resume):
        with pytest.raises(NeverStarted, match="there is no sweep test"):
            verb("test")


def test_what_was_tried_out_is_not_there_either(place: Place) -> None:
    place.target.try_out(place.plan)
    assert place.target.list() == []


def test_what_was_sent_is_found_with_all_that_says_which_sweep_it_is(place: Place) -> None:
    place.target.send(place.plan, CREATE)
    view = place.target.find("test")
    assert view is not None
    assert view.state in BEFORE
    wanted = place.plan.submission
    assert (view.name, view.sweep) == (wanted.name, wanted.sweep)
    assert (view.digest, view.run_dir) == (wanted.digest, wanted.run_dir)
    assert place.target.list() == [view]
    story = place.target.story("test")
    assert story is not None
    assert story.view == view
    assert story.lines


def test_the_log_is_what_the_driver_printed(place: Place) -> None:
    place.target.send(place.plan, CREATE)
    place.run()
    place.print("base model: org/base\n")
    log = place.target.log("test")
    assert log is not None
    assert log.endswith("base model: org/base\n")
    assert "END_OF_SWEEP" not in log
    assert state_at(place) == "running"


def test_the_log_of_a_worker_is_its_own(place: Place) -> None:
    place.target.send(place.plan, CREATE)
    place.run()
    assert place.target.worker_log("test", 3, 0) == "from a worker\n"
    with pytest.raises(ConfigError, match=r"no worker 3\.1 that Ray remembers, but 3\.0"):
        place.target.worker_log("test", 3, 1)


@pytest.mark.parametrize(
    ("state", "driver_code", "code"),
    [("SUCCEEDED", None, 0), ("FAILED", 1, 1), ("FAILED", 2, 2), ("FAILED", 4, 4)],
)
def test_a_sweep_ends_as_its_driver_did(
    place: Place, state: str, driver_code: int | None, code: int
) -> None:
    place.target.send(place.plan, CREATE)
    place.run()
    place.end(state, driver_code)
    view = place.target.find("test")
    assert view is not None
    assert exit_code(view) == code


def test_what_was_cancelled_goes_on_when_it_is_resumed(place: Place) -> None:
    place.target.send(place.plan, CREATE)
    place.run()
    place.target.cancel("test")
    place.settle()
    assert state_at(place) == "stopped"
    place.target.resume("test")
    assert state_at(place) in BEFORE


def test_what_failed_is_replaced_by_the_same_sweep(place: Place) -> None:
    place.target.send(place.plan, CREATE)
    place.run()
    place.end("FAILED", 1)
    place.target.send(place.plan, Action("replace", "it had failed"))
    view = place.target.find("test")
    assert view is not None
    assert view.state in BEFORE
    assert view.run_dir == place.plan.submission.run_dir

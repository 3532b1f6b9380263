"""Sweeps as jobs of a running Ray cluster: what is sent, and what is said when it cannot be."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kubernetes.options import KubernetesOptions
from cluster.ray_jobs import Answer, RayJobs, dashboard
from cluster.ray_stand_in import RayStandIn
from cluster.ray_target import RayTarget
from jobs.submit import Sending, connect, planner, submit_sweep
from jobs.submitted import cancel_job, resume_job, show_log
from jobs.terminal import Terminal
from orchestrator.errors import ConfigError, ContactLost, NeverStarted
from tests.manifests import hub_sweep

ADDRESS = "http://head:8265"


class Stage:
    def __init__(self, folder: Path) -> None:
        self.ray = RayStandIn()
        self.said: list[str] = []
        self._config = folder / "sweep.yaml"
        self._config.write_text(yaml.safe_dump(hub_sweep().model_dump(mode="json")))

    @property
    def target(self) -> RayTarget:
        return RayTarget(RayJobs(self.ray.send), sleep=lambda seconds: None)

    @property
    def person(self) -> Terminal:
        return Terminal(self.said.append, None, sleep=lambda seconds: None)

    def submit(self, storage: str | None = "/shared", detach: bool = True) -> int:
        plan = planner(ADDRESS, KubernetesOptions(), storage)
        sending = Sending(detach=detach)
        return submit_sweep(self._config, [], plan, lambda: self.target, sending, self.person)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_a_sweep_is_sent_once_and_goes_on_when_it_was_stopped(stage: Stage) -> None:
    assert stage.submit() == 0
    first = dict(stage.ray.jobs["test"])
    assert f"--run-dir {first['metadata']['qlora_orchestrator_run_dir']}" in first["entrypoint"]
    assert stage.submit() == 0
    assert "test is already starting" in stage.said
    assert cancel_job(stage.target, "test", False, stage.person) == 0
    assert stage.ray.jobs["test"]["status"] == "STOPPED"
    assert resume_job(stage.target, "test", True, stage.person) == 0
    assert stage.ray.jobs["test.2"]["status"] == "PENDING"
    assert stage.ray.jobs["test.2"]["entrypoint"] == first["entrypoint"]
    assert [(view.name, view.state) for view in stage.target.list()] == [("test", "starting")]


def test_all_verbs_are_about_the_job_that_was_sent_last(stage: Stage) -> None:
    for count in range(11):
        stage.submit()
        job = "test" if count == 0 else f"test.{count + 1}"
        stage.ray.start(job)
        stage.ray.print(job, f"driver {count + 1}\n")
        if count < 10:
            stage.ray.end(job, "FAILED", 1)
    assert "driver 11" in (stage.target.log("test") or "")
    stage.target.cancel("test")
    assert stage.ray.jobs["test.11"]["status"] == "STOPPED"
    assert [view.state for view in stage.target.list()] == ["stopped"]


def test_a_dashboard_that_stumbles_while_a_sweep_runs_is_no_end_of_it(stage: Stage) -> None:
    stage.submit()
    stage.ray.start("test")
    answers = iter([None, Answer(500, "Internal Server Error"), None])

    def send(method: str, path: str, body: Any) -> Answer:
        if path != "/api/jobs/":
            return stage.ray.send(method, path, body)
        if (answer := next(answers, "over")) == "over":
            stage.ray.end("test", "SUCCEEDED", 0)
        return answer if isinstance(answer, Answer) else stage.ray.send(method, path, body)

    assert show_log(RayTarget(RayJobs(send)), "test", True, stage.person) == 0
    assert "no contact, trying again" in "\n".join(stage.said)


@pytest.mark.parametrize(
    ("status", "driver_exit_code", "code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 1, 1), ("FAILED", 2, 2), ("STOPPED", None, 3)],
)
def test_the_command_ends_as_the_driver_did(
    stage: Stage, status: str, driver_exit_code: int | None, code: int
) -> None:
    stage.submit()
    stage.ray.end("test", status, driver_exit_code)
    stage.ray.jobs["test"]["driver_agent_http_address"] = "http://node:52365"
    assert follow(stage) == code


def test_a_driver_that_never_had_its_workers_never_started(stage: Stage) -> None:
    stage.submit()
    stage.ray.end("test", "FAILED", 4)
    assert follow(stage) == 4


def follow(stage: Stage) -> int:
    return show_log(stage.target, "test", True, stage.person)


def test_a_folder_that_nodes_do_not_know_is_refused(stage: Stage) -> None:
    with pytest.raises(ConfigError, match="name a shared folder with --storage"):
        stage.submit(storage="runs")


@pytest.mark.parametrize("code", [401, 403])
def test_a_token_that_is_refused_is_said_with_the_remedy(code: int) -> None:
    target = RayTarget(RayJobs(lambda *_: Answer(code, "Unauthorized: Invalid token")))
    with pytest.raises(NeverStarted, match=rf"refuses the token \({code}\).*set RAY_AUTH_TOKEN"):
        target.find("test")


def test_a_page_that_is_no_dashboard_is_said() -> None:
    target = RayTarget(RayJobs(lambda *_: Answer(200, "<html>Grafana</html>")))
    with pytest.raises(NeverStarted, match="no Ray dashboard: '<html>Grafana</html>'"):
        target.list()


def test_an_address_where_nothing_answers_is_said() -> None:
    target = RayTarget(RayJobs(dashboard("http://127.0.0.1:9")))
    with pytest.raises(ContactLost, match="http://127.0.0.1:9 does not answer"):
        target.list()


@pytest.mark.parametrize("address", ["grpc://head:10001", "kubernets", "head:8265"])
def test_a_target_that_is_none_is_refused_before_anything_is_read(address: str) -> None:
    with pytest.raises(ConfigError, match="--target must be kubernetes or a Ray dashboard's"):
        planner(address, KubernetesOptions())
    with pytest.raises(ConfigError, match="--target must be"):
        connect(address)


def test_options_of_the_other_target_are_refused() -> None:
    options = KubernetesOptions(gpus=8, queue="team", keep_failed_s=60, max_wait_s=5)
    with pytest.raises(ConfigError, match="--gpus, --queue, --keep-failed are for Kubernetes"):
        planner(ADDRESS, options)
    with pytest.raises(ConfigError, match="--storage /shared is for a Ray cluster"):
        planner("kubernetes", KubernetesOptions(), "/shared")

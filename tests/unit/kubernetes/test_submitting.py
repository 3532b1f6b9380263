"""A sweep is submitted to the stand-in of Kubernetes and followed to its end, whatever happens."""

import copy
import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from cluster.kubernetes.linter import lint
from cluster.kubernetes.options import KubernetesOptions
from jobs.submit import Sending
from jobs.submitted import (
    cancel_job,
    list_jobs,
    resume_job,
    show_log,
    show_status,
    show_worker_log,
)
from orchestrator.errors import ClusterError, ConfigError, NeverStarted
from tests.stage import (
    CLUSTER,
    NAME,
    Scene,
    Stage,
    failed,
    prints,
    running,
    starting,
    succeeded,
    wait,
)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def rayjob(stage: Stage) -> dict:  # type: ignore[type-arg]
    job = stage.cluster.object("RayJob", NAME)
    assert job is not None
    return job


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"base_model__source": "./base"}, "base_model.source: ./base"),
        ({"base_model__source": "here"}, "base_model.source: here"),
        ({"data__train": ["org/name", "here/train.jsonl"]}, "data: here/train.jsonl"),
        ({"data__held_out": "~/test.jsonl"}, "data: ~/test.jsonl"),
    ],
)
def test_a_path_on_this_machine_is_refused(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], field: str
) -> None:
    monkeypatch.chdir(stage.folder)
    (stage.folder / "here").mkdir()
    (stage.folder / "here" / "train.jsonl").touch()
    with pytest.raises(ConfigError, match=f"{field} is a path on this machine"):
        stage.submit(**changes)


def test_a_sweep_is_followed_to_its_end_with_its_drivers_log(stage: Stage) -> None:
    code = stage.submit(
        starting, running, prints("trial 0: ste"), prints("p 5\nwinner\n"), succeeded
    )
    assert code == 0
    story = ["submitted test", "cluster test-abcde is being made", "1 of 1 pods are ready"]
    story += ["the driver runs", "trial 0: step 5", "winner", "test succeeded", "log is driver.log"]
    places = [stage.output.index(words) for words in story]
    assert places == sorted(places)
    assert stage.output.count("trial 0") == 1
    assert "\ntrial 0: ste\n" not in stage.output  # a line is shown when it is whole


def test_in_a_terminal_the_sweeps_own_table_is_shown(stage: Stage) -> None:
    stage.screen = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
    trained = "trial 7 (4-bit, rank 16): step 5/32, loss 2.345, 1,234 tokens/s, ETA 1:05\n"
    code = stage.submit(running, prints("base model: org/base\n"), prints(trained), succeeded)
    assert code == 0
    assert isinstance(stage.screen.file, io.StringIO)
    shown = stage.screen.file.getvalue()
    (row,) = {line for line in shown.splitlines() if "5/32" in line}
    assert row.replace("│", " ").split() == "7 4 16 5/32 2.345 1,234 training 1:05".split()
    assert "per s" in shown
    assert "base model: org/base" in shown
    assert "test succeeded" in stage.output


def test_the_story_has_times_since_the_submission(stage: Stage) -> None:
    def later(stage: Stage) -> None:
        stage.now += 180
        starting(stage)

    stage.submit(later, running, succeeded)
    line = next(line for line in stage.said if "is being made" in line)
    assert line.startswith("[3:0")


def test_a_break_of_contact_is_not_the_end(stage: Stage) -> None:
    def breaks(stage: Stage) -> None:
        stage.cluster.is_down = True

    def mends(stage: Stage) -> None:
        stage.cluster.is_down = False

    code = stage.submit(
        running, prints("one\n"), breaks, wait, mends, prints("second\n"), succeeded
    )
    assert code == 0
    assert stage.output.count("one") == 1
    assert stage.output.count("second") == 1
    assert stage.output.count("no contact, trying again") == 1


def test_a_log_that_ends_is_not_the_end_of_the_job(stage: Stage) -> None:
    def head_goes(stage: Stage) -> None:
        stage.cluster.services.clear()
        stage.ray.logs["job-1"] = ""

    def new_head(stage: Stage) -> None:
        running(stage)
        stage.ray.print("job-1", "going on\n")

    code = stage.submit(running, prints("first driver\n"), head_goes, wait, new_head, succeeded)
    assert code == 0
    assert "the driver was started anew" in stage.output
    assert "going on" in stage.output


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("Job entrypoint command failed with exit code 1, last available logs", 1),
        ("Job entrypoint command failed with exit code 2, last available logs", 2),
    ],
)
def test_the_command_fails_as_the_driver_did(stage: Stage, message: str, code: int) -> None:
    assert stage.submit(running, prints("error: no such row\n"), failed(message)) == code
    assert "error: no such row" in stage.output
    assert "its driver failed" in stage.output


def test_a_sweep_that_runs_is_attached_to(stage: Stage) -> None:
    stage.submit(sending=Sending(detach=True))
    before = rayjob(stage)["metadata"]["uid"]
    assert stage.submit(running, succeeded) == 0
    assert "already starting" in stage.output
    assert rayjob(stage)["metadata"]["uid"] == before


def test_a_sweep_that_failed_is_submitted_again_from_its_run_folder(stage: Stage) -> None:
    assert stage.submit(running, failed("exit code 1")) == 1
    before = rayjob(stage)
    assert stage.submit(running, succeeded) == 0
    after = rayjob(stage)
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    assert after["spec"]["entrypoint"] == before["spec"]["entrypoint"]
    assert "goes on from its run folder" in stage.output


def finalized(stage: Stage) -> None:
    """The operator takes the cluster of a deleted job down before it lets the job go."""
    job = rayjob(stage)
    job["metadata"]["finalizers"] = ["ray.io/rayjob-finalizer"]


def test_the_old_job_is_gone_before_the_new_one_is_made(stage: Stage) -> None:
    def lets_go(stage: Stage) -> None:
        assert rayjob(stage)["metadata"]["deletionTimestamp"]
        rayjob(stage)["metadata"]["finalizers"] = []
        stage.cluster.api().delete("RayJob", NAME)

    stage.submit(running, failed("exit code 1"))
    before = rayjob(stage)["metadata"]["uid"]
    finalized(stage)
    assert stage.submit(wait, lets_go, running, succeeded) == 0
    assert rayjob(stage)["metadata"]["uid"] != before


def test_an_old_job_that_does_not_go_is_named(stage: Stage) -> None:
    stage.submit(running, failed("exit code 1"))
    finalized(stage)
    with pytest.raises(NeverStarted, match="the old RayJob test is not gone after 180 s"):
        stage.submit()


def test_a_sweep_that_is_done_is_not_done_again(stage: Stage) -> None:
    stage.submit(running, succeeded)
    before = rayjob(stage)["metadata"]["uid"]
    assert stage.submit() == 0
    assert "test is done" in stage.output
    assert rayjob(stage)["metadata"]["uid"] == before


def test_another_sweep_of_that_name_is_refused_while_the_first_runs(stage: Stage) -> None:
    stage.submit(sending=Sending(detach=True))
    with pytest.raises(ConfigError, match="is taken: a sweep of that name"):
        stage.submit(trial__steps=99)


def test_a_job_of_somebody_else_is_left_alone(stage: Stage) -> None:
    stage.put("ray.io/v1", "RayJob", NAME, spec={})
    with pytest.raises(ConfigError, match="taken by a job that is not a sweep"):
        stage.submit()
    assert rayjob(stage)["spec"] == {}


def test_a_dry_run_prints_exactly_what_would_be_sent(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage.submit(sending=Sending(dry_run="server")) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert stage.cluster.object("RayJob", NAME) is None
    stage.submit(sending=Sending(detach=True))
    sent = rayjob(stage)
    assert printed["spec"] == sent["spec"]
    assert printed["metadata"]["labels"] == sent["metadata"]["labels"]


def test_a_rendered_job_is_written_and_nothing_sent(stage: Stage, tmp_path: Path) -> None:
    assert stage.submit(sending=Sending(render_to=tmp_path / "out")) == 0
    assert (tmp_path / "out" / "test.yaml").read_text().startswith("apiVersion: ray.io/v1")
    assert stage.cluster.object("RayJob", NAME) is None


def test_cancelling_asks_the_driver_to_save_and_keeps_the_record(stage: Stage) -> None:
    stage.submit(sending=Sending(detach=True))
    running(stage)
    stage.play(lambda stage: stage.status("Complete", stage.ray.jobs["job-1"]["status"]))
    assert cancel_job(stage.target, NAME, False, stage.person) == 0
    assert stage.ray.jobs["job-1"]["status"] == "STOPPED"
    assert show_status(stage.target, NAME, False, stage.person) == 3
    assert resume_job(stage.target, NAME, True, stage.person) == 0
    assert "status" not in rayjob(stage)


def test_cancelling_what_has_not_started_takes_it_out(stage: Stage) -> None:
    stage.submit(sending=Sending(detach=True))
    assert cancel_job(stage.target, NAME, False, stage.person) == 0
    assert stage.cluster.object("RayJob", NAME) is None


def test_a_pause_without_a_queue_suspends_and_a_submit_goes_on(stage: Stage) -> None:
    stage.submit(sending=Sending(detach=True))
    running(stage)
    cancel_job(stage.target, NAME, True, stage.person)
    assert rayjob(stage)["spec"]["suspend"] is True
    stage.status("Suspended")
    assert stage.submit(running, succeeded) == 0
    assert rayjob(stage)["spec"]["suspend"] is False


def test_whoever_follows_a_sweep_that_another_pauses_is_not_told_of_a_failure(stage: Stage) -> None:
    def paused(stage: Stage) -> None:
        stage.target.pause(NAME)
        stage.status("Suspended")

    assert stage.submit(running, paused) == 3
    assert "test suspended" in stage.output


def test_a_pause_with_a_queue_makes_the_workload_inactive(tmp_path: Path) -> None:
    stage = queued_stage(tmp_path)
    stage.submit(sending=Sending(detach=True))
    queued("couldn't assign flavors")(stage)
    cancel_job(stage.target, NAME, True, stage.person)
    workload = stage.cluster.object("Workload", "rayjob-test")
    assert workload is not None
    assert workload["spec"]["active"] is False
    assert rayjob(stage)["spec"]["suspend"] is True  # Kueue's own; suspending would restart it
    assert show_status(stage.target, NAME, False, stage.person) == 0
    assert "test is suspended" in stage.said[-2]
    resume_job(stage.target, NAME, True, stage.person)
    workload = stage.cluster.object("Workload", "rayjob-test")
    assert workload is not None
    assert workload["spec"]["active"] is True


def interrupt(stage: Stage) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_leaves_the_sweep_alone(stage: Stage) -> None:
    assert stage.submit(running, interrupt) == 130
    assert "come back with `orchestrator jobs logs test --follow`" in stage.output
    assert rayjob(stage)["status"]["jobStatus"] == "RUNNING"


def test_ctrl_c_and_c_cancels(stage: Stage) -> None:
    stage.answers = ["c"]

    def stopped(stage: Stage) -> None:
        stage.status("Complete", "STOPPED")

    assert stage.submit(running, interrupt, stopped) == 3
    assert stage.ray.jobs["job-1"]["status"] == "STOPPED"


def test_ctrl_c_and_f_follows_on(stage: Stage) -> None:
    stage.answers = ["f"]
    assert stage.submit(running, interrupt, prints("more\n"), succeeded) == 0
    assert "more" in stage.output


def test_a_log_that_is_gone_is_said_to_be_in_the_run_folder(stage: Stage) -> None:
    stage.submit(running, prints("x\n"), succeeded)
    stage.cluster.services.clear()
    with pytest.raises(ClusterError, match=r"kept in /mnt/orchestrator/runs/test-\w+/driver.log"):
        show_log(stage.target, NAME, False, stage.person)


def test_what_is_not_there_is_wrong_input_for_every_verb(stage: Stage) -> None:
    there_is_none = pytest.raises(ConfigError, match="there is no job nothing: see `orch")
    with there_is_none:
        show_log(stage.target, "nothing", False, stage.person)
    with there_is_none:
        show_log(stage.target, "nothing", True, stage.person)
    with there_is_none:
        show_status(stage.target, "nothing", False, stage.person)
    with there_is_none:
        cancel_job(stage.target, "nothing", False, stage.person)
    with there_is_none:
        resume_job(stage.target, "nothing", False, stage.person)


def test_a_sweep_is_found_by_its_own_name_too(stage: Stage) -> None:
    stage.submit(sending=Sending(detach=True), name="My_Sweep")
    assert show_status(stage.target, "My_Sweep", False, stage.person) == 0
    assert "my-sweep-" in stage.said[-2]


def test_a_program_reads_what_people_read(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage.submit(running, failed("Job entrypoint command failed with exit code 2")) == 2
    assert show_status(stage.target, NAME, True, stage.person) == 2
    status = json.loads(capsys.readouterr().out)
    assert list_jobs(stage.target, True, stage.person) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    for record in (status, listed):
        assert (record["name"], record["sweep"], record["state"]) == (NAME, "test", "failed")
        assert record["run_dir"].startswith("/mnt/orchestrator/runs/test-")
        assert record["exit_code"] == 2
    assert "RayJob test is there" in [line["text"] for line in status["story"]]


def test_the_list_says_where_each_sweep_stands(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.submit(running, failed("Job entrypoint command failed with exit code 1"))
    stage.put("ray.io/v1", "RayJob", "of-somebody-else", spec={})
    assert list_jobs(stage.target, False, stage.person) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "test" in line]
    assert "failed" in line
    assert "/mnt/orchestrator/runs/test-" in line
    assert "its driver failed" in line


def actor(pack: int, world_rank: int, state: str, **printed: str) -> dict[str, str]:
    title = f"pack {pack} worker {world_rank}"
    given = {"out": "", "err": "", **printed}
    number = f"{pack}{world_rank}{state}"
    return {"actor_id": number, "repr_name": title, "state": state, "job_id": "01000000", **given}


def test_the_log_of_a_worker_is_read_through_the_api_server(stage: Stage) -> None:
    stage.submit(sending=Sending(detach=True))
    running(stage)
    stage.ray.jobs["job-1"]["job_id"] = "01000000"
    stage.ray.actors = [
        actor(0, 0, "DEAD", out="the first\n"),
        actor(0, 0, "ALIVE", out="the second\n", err="a warning\n"),
        actor(0, 1, "ALIVE", out="its partner\n"),
        {**actor(9, 9, "ALIVE"), "repr_name": "", "class_name": "Sharder"},
        {**actor(5, 0, "ALIVE"), "job_id": "02000000"},
    ]
    assert show_worker_log(stage.target, NAME, "0", stage.person) == 0
    assert stage.said[-1] == "the second\na warning"
    show_worker_log(stage.target, NAME, "0.1", stage.person)
    assert stage.said[-1] == "its partner"
    with pytest.raises(ConfigError, match="no worker 5.0 that Ray remembers, but 0.0, 0.1:"):
        show_worker_log(stage.target, NAME, "5", stage.person)
    with pytest.raises(ConfigError, match="must be PACK or PACK.WORLD_RANK"):
        show_worker_log(stage.target, NAME, "all", stage.person)


def test_a_failed_sweeps_cluster_is_kept_but_not_that_of_one_that_is_cancelled(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path, KubernetesOptions(gpus=2, keep_failed_s=1800))
    stage.submit(sending=Sending(detach=True))
    rules = rayjob(stage)["spec"]["deletionStrategy"]["deletionRules"]
    ends = {rule["condition"].get("jobStatus", "deadline"): rule for rule in rules}
    assert ends["SUCCEEDED"]["condition"]["ttlSeconds"] == 120
    assert ends["FAILED"]["condition"]["ttlSeconds"] == 1800
    assert ends["deadline"]["condition"]["ttlSeconds"] == 1800
    assert {rule["policy"] for rule in rules} == {"DeleteCluster"}
    running(stage)
    stage.play(lambda stage: stage.status("Complete", stage.ray.jobs["job-1"]["status"]))
    cancel_job(stage.target, NAME, False, stage.person)
    assert "deletionStrategy" not in rayjob(stage)["spec"]
    assert rayjob(stage)["spec"]["shutdownAfterJobFinishes"] is True


def test_a_pause_gives_back_what_a_failure_would_keep(tmp_path: Path) -> None:
    stage = Stage(tmp_path, KubernetesOptions(gpus=2, keep_failed_s=1800))
    stage.submit(sending=Sending(detach=True))
    running(stage)
    cancel_job(stage.target, NAME, True, stage.person)
    spec = rayjob(stage)["spec"]
    assert (spec["suspend"], spec["shutdownAfterJobFinishes"]) == (True, True)
    assert "deletionStrategy" not in spec


@pytest.mark.parametrize("pause", [False, True])
def test_a_sweep_that_is_resumed_keeps_its_cluster_again_if_it_fails(
    tmp_path: Path, pause: bool
) -> None:
    stage = Stage(tmp_path, KubernetesOptions(gpus=2, keep_failed_s=1800))
    stage.submit(sending=Sending(detach=True))
    sent = copy.deepcopy(rayjob(stage))
    for _ in range(2):  # what is resumed may be stopped again
        running(stage)
        stage.play(lambda stage: stage.status("Complete", stage.ray.jobs["job-1"]["status"]))
        cancel_job(stage.target, NAME, pause, stage.person)
        assert "deletionStrategy" not in rayjob(stage)["spec"]
        if pause:
            stage.status("Suspended")
        resume_job(stage.target, NAME, True, stage.person)
        job = rayjob(stage)
        assert job["metadata"]["annotations"] == sent["metadata"]["annotations"]
        assert {**job["spec"], "suspend": False} == {**sent["spec"], "suspend": False}
        assert lint(job) == []


def queued_stage(tmp_path: Path) -> Stage:
    stage = Stage(tmp_path, KubernetesOptions(gpus=2, queue="team"))
    stage.put("kueue.x-k8s.io/v1beta2", "LocalQueue", "team", spec={"clusterQueue": "gpus"})
    return stage


def queued(why: str) -> Scene:
    def scene(stage: Stage) -> None:
        uid = rayjob(stage)["metadata"]["uid"]
        stage.cluster.api().patch("RayJob", NAME, {"spec": {"suspend": True}})
        stage.status("Suspended")
        condition = {"type": "QuotaReserved", "status": "False", "message": why}
        condition |= {"reason": "Pending", "lastTransitionTime": stage.stamp()}
        stage.put(
            "kueue.x-k8s.io/v1beta2",
            "Workload",
            "rayjob-test",
            labels={"kueue.x-k8s.io/job-uid": uid},
            spec={"queueName": "team", "active": True},
            status={"conditions": [condition]},
        )

    return scene


def admitted(stage: Stage) -> None:
    condition = {"type": "Admitted", "status": "True", "message": "The workload is admitted"}
    conditions = [{**condition, "reason": "Admitted", "lastTransitionTime": stage.stamp()}]
    stage.cluster.set_status("Workload", "rayjob-test", {"conditions": conditions})
    stage.cluster.api().patch("RayJob", NAME, {"spec": {"suspend": False}})
    starting(stage)


def test_a_queued_sweep_says_what_it_waits_for_and_runs_when_admitted(tmp_path: Path) -> None:
    stage = queued_stage(tmp_path)
    why = "couldn't assign flavors to pod set gpu: insufficient unused quota, 8 more needed"
    assert stage.submit(queued(why), wait, admitted, running, succeeded) == 0
    places = [
        stage.output.index(words) for words in (why, "admitted by queue team", "the driver runs")
    ]
    assert places == sorted(places)
    assert CLUSTER in stage.output


def test_a_preempted_sweep_waits_and_comes_back(tmp_path: Path) -> None:
    stage = queued_stage(tmp_path)

    def evicted(stage: Stage) -> None:
        condition = {"type": "Evicted", "status": "True", "reason": "Preempted"}
        condition |= {"message": "Preempted to accommodate a workload"}
        conditions = [{**condition, "lastTransitionTime": stage.stamp()}]
        stage.cluster.set_status("Workload", "rayjob-test", {"conditions": conditions})
        stage.cluster.api().patch("RayJob", NAME, {"spec": {"suspend": True}})
        stage.status("Suspended")

    code = stage.submit(
        queued("full"), admitted, running, evicted, wait, admitted, running, succeeded
    )
    assert code == 0
    assert "taken out of the cluster (Preempted): Preempted to accommodate" in stage.output

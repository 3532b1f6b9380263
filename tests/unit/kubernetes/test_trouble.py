"""Each trouble of a cluster shows within a minute: one line with its cause, and an exit code."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.kubernetes.options import KubernetesOptions
from jobs.cli import EXIT_CODES
from jobs.submit import Sending
from jobs.submitted import show_log
from orchestrator.errors import OrchestratorError
from tests.manifests import known
from tests.stage import (
    CLUSTER,
    NAME,
    Scene,
    Stage,
    failed,
    running,
    starting,
    succeeded,
    wait,
)

A_MINUTE = 60.0


def outcome(stage: Stage, *scenes: Scene) -> tuple[int, str]:
    """The exit code, and what was said, the error's line last."""
    try:
        return stage.submit(*scenes), stage.output
    except OrchestratorError as error:
        code = next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)
        return code, f"{stage.output}\nerror: {error}"


def no_cluster(stage: Stage) -> None:
    stage.cluster.is_down = True


def no_definitions(stage: Stage) -> None:
    stage.cluster.missing_groups = {"ray.io"}


def no_rights(stage: Stage) -> None:
    stage.cluster.forbidden = {("create", "rayjobs")}


def no_namespace(stage: Stage) -> None:
    stage.cluster.namespaces = set()


def no_volume(stage: Stage) -> None:
    stage.cluster.api().delete("PersistentVolumeClaim", "orchestrator-storage")


def wrong_token(stage: Stage) -> None:
    stage.token = "expired"


def no_quota(stage: Stage) -> None:
    stage.cluster.quotas = {"rayjobs.ray.io": 0}


def taken_name(stage: Stage) -> None:
    stage.put("ray.io/v1", "RayJob", NAME, spec={})


@pytest.mark.parametrize(
    ("trouble", "code", "words"),
    [
        (no_cluster, 5, "does not answer: Connection refused: check the network"),
        (no_definitions, 4, "could not find the requested resource: install KubeRay 1.7"),
        (no_rights, 4, "no right to create RayJob test in default"),
        (no_namespace, 4, "there is no namespace default: make it"),
        (no_volume, 4, "there is no volume claim orchestrator-storage in default"),
        (wrong_token, 4, "the cluster refuses who you are (401)"),
        (no_quota, 4, 'quota: rayjobs.ray.io "test" is forbidden: exceeded quota: objects'),
    ],
)
def test_what_stops_a_submission_is_said_at_once(
    tmp_path: Path, trouble: Callable[[Stage], None], code: int, words: str
) -> None:
    stage = Stage(tmp_path)
    trouble(stage)
    ended, said = outcome(stage)
    assert words in said.splitlines()[-1]  # one line
    assert (ended, stage.waited_s) == (code, 0.0)
    assert stage.cluster.object("RayJob", NAME) is None


def test_a_name_that_is_taken_is_said_at_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    taken_name(stage)
    code, said = outcome(stage)
    assert "the name test is taken by a job that is not a sweep" in said.splitlines()[-1]
    assert (code, stage.waited_s) == (2, 0.0)


def test_a_queue_that_is_not_there_is_named(tmp_path: Path) -> None:
    stage = Stage(tmp_path, KubernetesOptions(gpus=2, queue="team"))
    code, said = outcome(stage)
    assert "there is no queue team in default" in said
    assert code == 4


def test_an_operator_that_is_too_old_is_named_with_the_field_that_it_lacks(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.cluster.definitions = known().without("RayJob", "spec.preRunningDeadlineSeconds")
    code, said = outcome(stage)
    assert "unknown field" in said
    assert "preRunningDeadlineSeconds" in said
    assert "install KubeRay 1.7 or newer" in said
    assert code == 4


def image(reason: str) -> Scene:
    def scene(stage: Stage) -> None:
        starting(stage)
        stage.pod("test-head", (reason, 'Back-off pulling image "trainer:1": not found'))

    return scene


def refused_pod(message: str) -> Scene:
    def scene(stage: Stage) -> None:
        starting(stage)
        stage.cluster.event("RayCluster", CLUSTER, "FailedToCreateWorkerPod", message)

    return scene


def no_secret_key(stage: Stage) -> None:
    starting(stage)
    stage.pod("test-head", ("CreateContainerConfigError", 'secret "ray-token" not found'))


@pytest.mark.parametrize(
    ("scene", "words"),
    [
        (image("ImagePullBackOff"), "the image trainer:1 cannot be pulled (ImagePullBackOff)"),
        (image("ErrImageNeverPull"), "the image trainer:1 cannot be pulled (ErrImageNeverPull)"),
        (
            refused_pod('pods "w" is forbidden: violates PodSecurity "restricted:latest"'),
            "a pod is refused: pods",
        ),
        (refused_pod("volumeMounts[0].name: Not found"), "a pod is refused: volumeMounts[0].name"),
        (no_secret_key, 'CreateContainerConfigError: secret "ray-token" not found'),
    ],
)
def test_what_cannot_pass_ends_the_wait_with_its_cause_and_leaves_nothing(
    tmp_path: Path, scene: Scene, words: str
) -> None:
    stage = Stage(tmp_path)
    code, said = outcome(stage, scene)
    assert words in said.splitlines()[-1]  # one line
    assert code == 4
    assert stage.waited_s <= A_MINUTE + 10
    assert stage.cluster.object("RayJob", NAME) is None


def test_an_operator_that_does_nothing_is_named_and_the_sweep_taken_out(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    told_at: list[float] = []

    def is_told(stage: Stage) -> None:
        if "no operator has taken the RayJob up" in stage.output and not told_at:
            told_at.append(stage.waited_s)

    code, said = outcome(stage, *[is_told] * 100)
    assert told_at
    assert told_at[0] <= A_MINUTE
    assert "test cannot start: no operator has taken the RayJob up" in said.splitlines()[-1]
    assert code == 4
    assert stage.cluster.object("RayJob", NAME) is None


def test_who_only_looks_on_takes_nothing_out(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.submit(sending=Sending(detach=True))
    stage.play(image("ErrImageNeverPull"))
    with pytest.raises(OrchestratorError, match="cannot be pulled"):
        show_log(stage.target, NAME, True, stage.person)
    assert stage.cluster.object("RayJob", NAME) is not None


def test_what_may_not_be_taken_out_is_said_and_the_cause_is_still_the_error(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.cluster.forbidden = {("delete", "rayjobs")}
    code, said = outcome(stage, image("ErrImageNeverPull"))
    assert "test could not be taken out: no right to delete RayJob test" in said
    assert "the image trainer:1 cannot be pulled" in said.splitlines()[-1]
    assert code == 4


def event_of_pod(reason: str, message: str) -> Scene:
    def scene(stage: Stage) -> None:
        starting(stage)
        stage.pod("test-worker", ("", ""))
        stage.cluster.event("Pod", "test-worker", reason, message)

    return scene


NO_NODE = "0/9 nodes are available: 9 node(s) didn't match Pod's node affinity/selector"
QUOTA = 'pods "w" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=2'


@pytest.mark.parametrize(
    ("scene", "cause"),
    [
        (event_of_pod("FailedScheduling", NO_NODE), f"no node fits: {NO_NODE}"),
        (
            event_of_pod("NotTriggerScaleUp", "pod didn't trigger scale-up"),
            "no node fits, and none can be added: pod didn't trigger scale-up",
        ),
        (refused_pod(QUOTA), f"quota: {QUOTA}"),
        (event_of_pod("FailedMount", "timed out"), "a volume cannot be mounted: timed out"),
    ],
)
def test_what_may_pass_is_said_at_once_and_is_the_cause_when_the_time_is_over(
    tmp_path: Path, scene: Scene, cause: str
) -> None:
    stage = Stage(tmp_path)
    told_at: list[float] = []

    def is_told(stage: Stage) -> None:
        if cause.rpartition(": ")[2] in stage.output and not told_at:
            told_at.append(stage.waited_s)

    late = failed("RayJob did not reach Running", "PreRunningDeadlineExceeded")
    code, said = outcome(stage, scene, *[is_told] * 20, late)
    assert told_at
    assert told_at[0] <= A_MINUTE
    assert "it did not run in --max-wait (1800 s)" in said
    assert cause in said
    assert code == 4


def grown(scene: Scene) -> Scene:
    """The head is there and the driver waits for workers, which the autoscaler adds in vain."""

    def both(stage: Stage) -> None:
        scene(stage)
        running(stage)

    return both


@pytest.mark.parametrize(
    ("scene", "cause"),
    [
        (event_of_pod("FailedScheduling", NO_NODE), f"no node fits: {NO_NODE}"),
        (refused_pod(QUOTA), f"quota: {QUOTA}"),
    ],
)
def test_workers_that_never_come_are_told_and_are_why_the_sweep_never_started(
    tmp_path: Path, scene: Scene, cause: str
) -> None:
    stage = Stage(tmp_path)
    told_at: list[float] = []

    def is_told(stage: Stage) -> None:
        if cause.partition(": ")[2] in stage.output and not told_at:
            told_at.append(stage.waited_s)

    late = failed("Job entrypoint command failed with exit code 4, last available logs")
    code, said = outcome(stage, grown(scene), *[is_told] * 20, late)
    assert told_at
    assert told_at[0] <= A_MINUTE
    assert cause in said.splitlines()[-2]  # the run folder is named last
    assert code == 4


def test_a_job_over_its_deadline_failed_for_that(tmp_path: Path) -> None:
    code, said = outcome(Stage(tmp_path), running, failed("", "DeadlineExceeded"))
    assert "it ran longer than --max-runtime (86400 s)" in said
    assert code == 1


def test_what_the_operator_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    def refused(stage: Stage) -> None:
        stage.status("ValidationFailed", message="The RayJob spec is invalid: because")

    code, said = outcome(Stage(tmp_path), refused)
    assert "the operator refuses it: The RayJob spec is invalid: because" in said
    assert code == 4


def test_an_evicted_head_is_told_and_the_sweep_goes_on(tmp_path: Path) -> None:
    def evicted(stage: Stage) -> None:
        stage.cluster.services.clear()
        stage.pod("test-head", None, reason="Evicted", message="The node was low on memory.")

    code, said = outcome(Stage(tmp_path), running, evicted, wait, running, succeeded)
    assert "head pod test-head is gone: Evicted: The node was low on memory." in said
    assert "the sweep goes on from its checkpoints" in said
    assert code == 0


def test_a_worker_that_was_ended_for_memory_is_told(tmp_path: Path) -> None:
    def out_of_memory(stage: Stage) -> None:
        ended = {"reason": "OOMKilled", "finishedAt": stage.stamp()}
        container = {"name": "ray", "lastState": {"terminated": ended}}
        stage.pod("test-worker", None, containerStatuses=[container])

    code, said = outcome(Stage(tmp_path), running, out_of_memory, succeeded)
    assert "worker pod test-worker was ended for memory: raise --memory-per-node" in said
    assert code == 0


def test_a_submitting_command_that_was_restarted_attaches(tmp_path: Path) -> None:
    stage = Stage(tmp_path)

    def killed(stage: Stage) -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        stage.submit(running, killed)
    code, said = outcome(stage, succeeded)
    assert "test is already running" in said
    assert code == 0


def test_a_ray_token_that_is_wrong_hides_the_log_and_nothing_else(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.ray.token = "another"
    code, said = outcome(stage, running, wait, succeeded)
    assert "the driver's log cannot be read: the Ray cluster refuses the token (401)" in said
    assert said.count("cannot be read") == 1
    assert code == 0


def test_contact_that_does_not_come_back_is_lost(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    code, said = outcome(stage, running, no_cluster)
    assert code == 5
    assert "does not answer" in said.splitlines()[-1]
    assert A_MINUTE <= stage.waited_s <= A_MINUTE + 10


def test_a_login_that_expires_while_a_sweep_runs_is_no_end_of_the_sweep(tmp_path: Path) -> None:
    def expires(stage: Stage) -> None:
        stage.cluster.token = "another"

    stage = Stage(tmp_path)
    code, said = outcome(stage, running, expires)
    assert "the cluster refuses who you are (401)" in said.splitlines()[-1]
    assert "test goes on where it is; come back with `orchestrator jobs logs test" in said
    assert code == 5
    assert A_MINUTE <= stage.waited_s <= A_MINUTE + 10
    assert stage.cluster.object("RayJob", NAME) is not None

"""`orchestrator submit` and `jobs` against a real Ray cluster on this machine, by its job API."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cluster.ray_jobs import DIGEST, SWEEP, RayJobs, dashboard
from cluster.ray_stand_in import RayStandIn
from cluster.ray_target import RayTarget
from cluster.submission import OVER, JobState
from orchestrator.errors import ClusterError
from orchestrator.sweep.run_store import RunStore
from tests.integration.conftest import Command, program, write_config

START_TIMEOUT_S = 240
# Ports of its own: with the usual one of the agent, a second Ray on a machine takes no jobs.
RAY = """
import sys
from ray.cluster_utils import Cluster

ports = {"dashboard_port": 0, "dashboard_agent_listen_port": 0}
head = {"num_cpus": 2, "object_store_memory": 80 * 2**20, **ports}
cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": True, **head})
print("dashboard", cluster.head_node.webui_url, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@dataclass(frozen=True)
class Cluster:
    address: str
    storage: Path


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, as_on_a_node: Mapping[str, str]
) -> Iterator[Cluster]:
    """A Ray with a dashboard, in a process of its own."""
    folder = tmp_path_factory.mktemp("cluster")
    # Ray's sockets need a short path. It is the environment's, not an argument: a cluster of
    # several nodes notes its address in the default folder, which need not be there.
    temporary = Path("/tmp") / f"ray-{os.getpid()}"
    given = {"RAY_JOB_STOP_WAIT_TIME_S": "60", "RAY_TMPDIR": str(temporary)}
    process = subprocess.Popen(
        [sys.executable, "-c", RAY],
        env={**as_on_a_node, **given},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    found = None
    for line in process.stdout:
        if found := re.match(r"dashboard (\S+)", line):
            break
    assert found is not None, "Ray did not start"
    yield Cluster(f"http://{found[1]}", folder / "storage")
    process.communicate(timeout=START_TIMEOUT_S)
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(params=["stand-in", "real"])
def jobs(request: pytest.FixtureRequest) -> RayJobs:
    if request.param == "stand-in":
        stand_in = RayStandIn()
        return RayJobs(stand_in.send)
    return RayJobs(dashboard(request.getfixturevalue("cluster").address))


def test_a_job_has_its_id_for_itself_and_is_there_when_it_is_over(jobs: RayJobs) -> None:
    jobs.submit("contract", "sleep 60", {"a": "b"})
    info = jobs.info("contract")
    assert info is not None
    assert info["entrypoint"] == "sleep 60"
    assert info["metadata"]["a"] == "b"
    assert "contract" in [job["submission_id"] for job in jobs.list()]
    assert jobs.workers("contract") == []
    with pytest.raises(ClusterError, match="already exists"):
        jobs.submit("contract", "true", {})
    jobs.stop("contract")
    wait_for(lambda: (jobs.info("contract") or {})["status"] == "STOPPED")
    assert "Running entrypoint for job contract: sleep 60" in jobs.log("contract")
    with pytest.raises(ClusterError, match="already exists"):
        jobs.submit("contract", "true", {})
    assert jobs.info("another") is None
    with pytest.raises(ClusterError, match="404"):
        jobs.log("another")


def test_a_sweep_that_is_sent_again_at_its_end_runs_to_its_own(
    tmp_path: Path, cluster: Cluster
) -> None:
    """For some seconds Ray would take a job of the same id for the one that has ended."""
    jobs = RayJobs(dashboard(cluster.address))
    target = RayTarget(jobs)

    def state() -> JobState:
        found = target.find("again")
        assert found is not None
        return found.state

    # The first does not end by itself, the second outlasts Ray's look at the first.
    entrypoint = f"test -e {tmp_path}/begun && exec sleep 5; touch {tmp_path}/begun; exec sleep 999"
    jobs.submit("again", entrypoint, {SWEEP: "again", DIGEST: "0"})
    wait_for((tmp_path / "begun").exists)
    target.cancel("again")
    wait_for(lambda: state() == "stopped")
    target.resume("again")
    wait_for(lambda: state() in OVER)
    assert state() == "succeeded"
    assert "again" in [view.name for view in target.list()]


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(0.2)


def in_a_terminal(command: list[str], cwd: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """Exit code, and what was on the screen, without how it was drawn."""
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**environment, "COLUMNS": "160", "LINES": "50", "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    with open(screen, "rb", buffering=0) as file, suppress(OSError):  # EIO: the other end closed
        while part := file.read(4096):
            shown += part
    code = process.wait(START_TIMEOUT_S)
    return code, re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())


def arguments(cluster: Cluster) -> list[str]:
    return ["--target", cluster.address]


@pytest.mark.slow
def test_a_sweep_is_submitted_cancelled_resumed_attached_to_and_followed(
    tmp_path: Path,
    tiny_base: Path,
    cluster: Cluster,
    orchestrator: Command,
    environment: Mapping[str, str],
    uri: str,
    client: MlflowClient,
) -> None:
    # One short trial and one long (10 s), so that there is a middle to be cancelled in. In one
    # pack, they begin together.
    config = write_config(
        tmp_path,
        tiny_base,
        search__space={"steps": [4, 400]},
        evaluation__every_steps=None,
        resources__num_workers=1,
        tracking__uri=uri,
        registry__register_winner=False,
    )
    sent = ["submit", str(config), *arguments(cluster), "--storage", str(cluster.storage)]
    detached = orchestrator(*sent, "--detach", cwd=tmp_path)
    assert detached.returncode == 0, detached.stdout + detached.stderr
    (run_dir,) = re.findall(r"run folder (\S+)", detached.stdout)
    long = Path(run_dir, "trials", "001")
    wait_for(lambda: any(long.glob("attempts/*/*/checkpoint.json")))

    cancelled = orchestrator("jobs", "cancel", "sums", *arguments(cluster), cwd=tmp_path)
    assert cancelled.returncode == 0, cancelled.stdout + cancelled.stderr
    status = orchestrator("jobs", "status", "sums", *arguments(cluster), cwd=tmp_path)
    assert status.returncode == 3
    assert "sums is stopped" in status.stdout
    assert "interrupted" in Path(run_dir, "driver.log").read_text()  # it saved its trials
    before = len(RunStore.open(Path(run_dir)).results)
    assert before < 2

    resumed = orchestrator("jobs", "resume", "sums", "--detach", *arguments(cluster), cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    code, output = in_a_terminal([*program(), *sent], tmp_path, environment)
    assert code == 0, output
    # The sweep's own table, made of lines that are not shown themselves.
    assert re.search(r"│ *\d+/400 │", output)
    assert "training from step" not in output
    assert re.search(r"sums is already (starting|running)", output)
    assert "going on with" in output
    assert "winner: trial" in output
    assert "sums succeeded" in output
    store = RunStore.open(Path(run_dir))
    assert [result.state for result in store.results] == ["finished"] * 2
    assert [d for d in store.decisions if d["action"] == "resume_trial"]
    tracked = store.read("tracking")["run_id"]  # type: ignore[index]
    assert "driver.log" in [file.path for file in client.list_artifacts(tracked)]

    listed = orchestrator("jobs", "list", "--json", *arguments(cluster), cwd=tmp_path)
    (sums,) = [job for job in json.loads(listed.stdout) if job["name"] == "sums"]
    assert (sums["state"], sums["run_dir"]) == ("succeeded", run_dir)
    logs = orchestrator("jobs", "logs", "sums", *arguments(cluster), cwd=tmp_path)
    assert "winner: trial" in logs.stdout
    assert "training from step" in logs.stdout
    worker = ["jobs", "logs", "sums", *arguments(cluster), "--worker"]
    assert orchestrator(*worker, "0", cwd=tmp_path).returncode == 0
    unknown = orchestrator(*worker, "99", cwd=tmp_path)
    assert unknown.returncode == 2
    assert re.search(r"no worker 99.0 that Ray remembers, but 0.0", unknown.stderr)
    again = orchestrator(*sent, cwd=tmp_path)
    assert again.returncode == 0
    assert "sums is done" in again.stdout


def test_a_sweep_that_cannot_work_ends_as_its_driver_did(
    tmp_path: Path, tiny_base: Path, cluster: Cluster, orchestrator: Command
) -> None:
    config = write_config(tmp_path, tiny_base, name="broken", data__train="/nowhere/rows.jsonl")
    sent = ["submit", str(config), *arguments(cluster), "--storage", str(cluster.storage)]
    failed = orchestrator(*sent, cwd=tmp_path)
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert "error: " in failed.stdout
    assert "/nowhere/rows.jsonl" in failed.stdout


def test_a_cluster_that_does_not_grow_to_all_workers_is_told(
    tmp_path: Path, tiny_base: Path, cluster: Cluster, orchestrator: Command
) -> None:
    config = write_config(tmp_path, tiny_base, name="wide", resources__num_workers=64)
    sent = ["submit", str(config), *arguments(cluster), "--storage", str(cluster.storage)]
    failed = orchestrator(*sent, "--max-wait", "1s", cwd=tmp_path)
    assert failed.returncode == 4, failed.stdout + failed.stderr
    assert "the cluster has room for 2 of 64 workers of {'CPU': 1}" in failed.stdout


def test_ctrl_c_leaves_a_followed_sweep_alone(
    tmp_path: Path, tiny_base: Path, cluster: Cluster, environment: Mapping[str, str]
) -> None:
    # Its driver waits for workers that never come: it has not ended by itself, however late Ctrl-C.
    config = write_config(tmp_path, tiny_base, name="left", resources__num_workers=64)
    sent = ["submit", str(config), *arguments(cluster), "--storage", str(cluster.storage)]
    process = subprocess.Popen(
        [*program(), *sent],
        cwd=tmp_path,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # What a shell starts in the background ignores it, and so do its children.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert any("the driver runs" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 130, output
    assert (
        f"come back with `orchestrator jobs logs left --follow --target {cluster.address}`"
        in output
    )
    assert "Traceback" not in output
    jobs = RayJobs(dashboard(cluster.address))
    assert (jobs.info("left") or {})["status"] == "RUNNING"
    jobs.stop("left")

"""Sweeps as jobs of a running Ray cluster, through its job API.

A Target (cluster/target.py). The cluster is there already and stays: nothing is scaled, queued or
paused here.

A sweep that is sent again is a job of its own: NAME, NAME.2, NAME.3. Ray 2.60 watches a job for
some seconds after its end, and takes another one of the same id for it, and for dead.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from cluster.ray_jobs import DIGEST, RUN_DIR, SWEEP, RayJobs, job_and_number, job_view
from cluster.submission import OVER, Action, JobView, Line, Story, driver_output, plan_submission
from cluster.target import Plan
from orchestrator.config import SweepConfig
from orchestrator.errors import ClusterError, ConfigError, NeverStarted

STOP_TIMEOUT_S = 60.0
POLL_S = 0.5


def plan_ray_job(
    storage: str | None, max_wait_s: int, config: SweepConfig, name: str | None
) -> Plan:
    """`storage` is a folder that all nodes share; None: the one that holds the runs_dir."""
    storage = storage or str(PurePosixPath(config.runs_dir).parent)
    if not PurePosixPath(storage).is_absolute():
        raise ConfigError(
            f"runs_dir: {config.runs_dir} is no place that every node of the cluster knows: name a "
            "shared folder with --storage"
        )
    given = SweepConfig.model_validate({**config.model_dump(), "runs_dir": f"{storage}/runs"})
    submission = plan_submission(given, storage, max_wait_s, name)
    metadata = {SWEEP: submission.sweep, DIGEST: submission.digest, RUN_DIR: submission.run_dir}
    request = {
        "submission_id": submission.name,
        "entrypoint": submission.entrypoint,
        "metadata": metadata,
    }
    return Plan(submission, request)


class RayTarget:
    def __init__(
        self, jobs: RayJobs, sleep: Callable[[float], None] = time.sleep, place: str = ""
    ) -> None:
        self.place = place
        self._jobs = jobs
        self._sleep = sleep

    def try_out(self, plan: Plan) -> None:
        self._jobs.list()

    def find(self, name: str) -> JobView | None:
        last = self._last(name)
        return job_view(last) if last is not None else None

    def list(self) -> "list[JobView]":
        infos = [info for info in self._jobs.list() if SWEEP in (info.get("metadata") or {})]
        last = {job_and_number(info)[0]: info for info in sorted(infos, key=job_and_number)}
        views = map(job_view, last.values())
        return sorted(views, key=lambda view: view.created or 0.0, reverse=True)

    def send(self, plan: Plan, action: Action) -> None:
        self._submit(plan.submission.name, plan.request)

    def story(self, name: str) -> Story | None:
        view = self.find(name)
        if view is None:
            return None
        text = {"starting": "waits for its driver", "running": "the driver runs"}.get(
            view.state, ""
        )
        words = f"{text}: {view.message}" if view.state == "starting" and view.message else text
        lines = (Line(view.state, time.time(), words),) if words else ()
        return Story(view, lines, view.message if view.state == "starting" else "")

    def log(self, name: str) -> str | None:
        try:
            return driver_output(self._jobs.log(self._id(name)))
        except ClusterError:  # its driver has no log yet
            return None

    def worker_log(self, name: str, pack: int, world_rank: int) -> str:
        return self._jobs.worker_log(self._id(name), pack, world_rank)

    def cancel(self, name: str) -> None:
        if self._existing(name).state not in OVER:
            self._jobs.stop(self._id(name))

    def pause(self, name: str) -> None:
        """The driver stops; what it held is the cluster's again."""
        self.cancel(name)

    def resume(self, name: str) -> None:
        waited = 0.0
        while self._existing(name).state not in OVER:
            if waited >= STOP_TIMEOUT_S:
                raise NeverStarted(f"{name} runs: there is nothing to resume")
            self._sleep(POLL_S)
            waited += POLL_S
        last = self._last(name)
        assert last is not None
        self._submit(name, last)

    def _submit(self, name: str, request: Mapping[str, Any]) -> None:
        last = self._last(name)
        job = name if last is None else f"{name}.{job_and_number(last)[1] + 1}"
        self._jobs.submit(job, request["entrypoint"], request["metadata"])

    def _last(self, name: str) -> dict[str, Any] | None:
        """What Ray knows of the job that was sent last."""
        known = [info for info in self._jobs.list() if job_and_number(info)[0] == name]
        return max(known, key=job_and_number, default=None)

    def _id(self, name: str) -> str:
        last = self._last(name)
        if last is None:
            raise ClusterError(f"there is no job {name} on this cluster: see `jobs list`")
        return str(last["submission_id"])

    def _existing(self, name: str) -> JobView:
        view = self.find(name)
        if view is None or not view.digest:
            raise NeverStarted(f"there is no sweep {name} on this cluster: see `jobs list`")
        return view

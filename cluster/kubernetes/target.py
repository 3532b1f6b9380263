"""Sweeps as RayJobs in a namespace of a Kubernetes cluster.

A Target (cluster/target.py). In: rendered RayJobs. Out: what the API server shows of them. Decides
nothing: rendering, the linter and the story are pure and elsewhere.
"""

import base64
import copy
import json
import time
from collections.abc import Callable
from typing import Any

from cluster.kubernetes import linter
from cluster.kubernetes.api import KubernetesApi
from cluster.kubernetes.options import KubernetesOptions, shape
from cluster.kubernetes.quantities import Object
from cluster.kubernetes.rayjob import (
    QUEUE_LABEL,
    SPEC_BEFORE_STOP,
    SWEEP_LABEL,
    pods,
    render_rayjob,
)
from cluster.kubernetes.story import Observed, tell
from cluster.kubernetes.translation import job_view
from cluster.ray_jobs import Answer, RayJobs
from cluster.submission import OVER, Action, JobView, Story, driver_output
from cluster.target import Plan
from orchestrator.config import SweepConfig
from orchestrator.errors import ClusterError, ConfigError, NeverStarted

# The operator takes a deleted job's cluster down first.
DELETION_TIMEOUT_S = 180.0
POLL_S = 2.0
# Kueue's label on a Workload.
JOB_UID = "kueue.x-k8s.io/job-uid"
# How a job ends that keeps nothing.
SHUT_DOWN = {"deletionStrategy": None, "shutdownAfterJobFinishes": True}


def plan_rayjob(options: KubernetesOptions, config: SweepConfig, name: str | None) -> Plan:
    rendered = render_rayjob(config, options, name)
    linter.check(rendered.rayjob)
    return Plan(rendered.submission, rendered.rayjob, shape(options))


class KubernetesTarget:
    def __init__(
        self,
        api: KubernetesApi,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.time,
        place: str = "",
    ) -> None:
        self.place = place
        self._api = api
        self._sleep = sleep
        self._clock = clock

    def try_out(self, plan: Plan) -> None:
        self._check_premises(plan.request)
        if self._api.get("RayJob", plan.submission.name) is None:
            self._api.create(plan.request, dry_run=True)

    def find(self, name: str) -> JobView | None:
        job = self._api.get("RayJob", name)
        return job_view(job, self._workload(job)) if job is not None else None

    def list(self) -> "list[JobView]":
        jobs = self._api.list("RayJob", labels=SWEEP_LABEL)
        queued = any(QUEUE_LABEL in job["metadata"]["labels"] for job in jobs)
        found = self._api.list("Workload", labels=JOB_UID) if queued else []
        workloads = {workload["metadata"]["labels"][JOB_UID]: workload for workload in found}
        views = [job_view(job, workloads.get(job["metadata"].get("uid", ""))) for job in jobs]
        return sorted(views, key=lambda view: view.created or 0.0, reverse=True)

    def send(self, plan: Plan, action: Action) -> None:
        name = plan.submission.name
        if action.kind == "resume":
            self.resume(name)
            return
        self._check_premises(plan.request)
        if action.kind == "replace":
            self._delete(name)
        self._api.create(plan.request)

    def story(self, name: str) -> Story | None:
        job = self._api.get("RayJob", name)
        if job is None:
            return None
        cluster_name = (job.get("status") or {}).get("rayClusterName", "")
        cluster = self._api.get("RayCluster", cluster_name) if cluster_name else None
        found: list[Object] = []
        if cluster is not None:
            found = self._api.list("Pod", labels=f"ray.io/cluster={cluster_name}")
        workload = self._workload(job)
        names = {item["metadata"]["name"] for item in (job, cluster, workload, *found) if item}
        events = [
            event
            for event in self._api.list("Event")
            if event.get("involvedObject", {}).get("name") in names
        ]
        now = self._clock()
        return tell(Observed(now, job, cluster, tuple(found), workload, tuple(events)))

    def log(self, name: str) -> str | None:
        job = self._api.get("RayJob", name)
        job_id = (job or {}).get("status", {}).get("jobId")
        if not job_id:
            return None
        try:
            return driver_output(self._ray(name).log(job_id))
        except NeverStarted:  # a refusal, which the user can do something about
            raise
        except ClusterError:  # no head yet, or none any more
            return None

    def worker_log(self, name: str, pack: int, world_rank: int) -> str:
        job_id = (self._existing(name).get("status") or {}).get("jobId")
        if not job_id:
            raise ConfigError(f"{name} has no workers yet: see `jobs status {name}`")
        return self._ray(name).worker_log(job_id, pack, world_rank)

    def cancel(self, name: str) -> None:
        job = self._existing(name)
        job_id = (job.get("status") or {}).get("jobId")
        if job_view(job).state in OVER:
            return
        if job_id and job_view(job).state == "running":
            if "deletionStrategy" in job["spec"]:
                # Its rules know no end by a stop: the cluster would stay for ever.
                self._api.patch("RayJob", name, _keep_nothing(job))
            try:
                self._ray(name).stop(job_id)
                return
            except ClusterError:  # the head does not answer: the operator takes all down
                pass
        self._api.delete("RayJob", name)

    def pause(self, name: str) -> None:
        job = self._existing(name)
        if workload := self._workload(job):
            # A suspended RayJob of a queue would be admitted and started again.
            self._api.patch("Workload", workload["metadata"]["name"], {"spec": {"active": False}})
        else:
            # The operator suspends no job that keeps its cluster.
            change = _keep_nothing(job) if "deletionStrategy" in job["spec"] else {"spec": {}}
            change["spec"]["suspend"] = True
            self._api.patch("RayJob", name, change)

    def resume(self, name: str) -> None:
        job = self._existing(name)
        state = job_view(job, workload := self._workload(job)).state
        if state in OVER:
            self._delete(name)
            self._api.create(_as_sent(job))
        elif workload is not None:
            self._api.patch("Workload", workload["metadata"]["name"], {"spec": {"active": True}})
        else:
            change: Object = {"spec": {"suspend": False, **_before_stop(job)}}
            change["metadata"] = {"annotations": {SPEC_BEFORE_STOP: None}}
            self._api.patch("RayJob", name, change)

    def _existing(self, name: str) -> Object:
        job = self._api.get("RayJob", name)
        if job is None:
            raise NeverStarted(
                f"there is no sweep {name} in {self._api.namespace}: see `jobs list`"
            )
        return job

    def _check_premises(self, job: Object) -> None:
        """What the RayJob refers to is there: else its pods would wait without a word."""
        queue = job["metadata"]["labels"].get(QUEUE_LABEL)
        if queue and self._api.get("LocalQueue", queue) is None:
            raise NeverStarted(
                f"there is no queue {queue} in {self._api.namespace}: name another --queue, or "
                "make the LocalQueue as in k8s/base/kueue"
            )
        claims = {
            volume["persistentVolumeClaim"]["claimName"]
            for pod in pods(job)
            for volume in pod["spec"].get("volumes", [])
            if "persistentVolumeClaim" in volume
        }
        for claim in sorted(claims):
            if self._api.get("PersistentVolumeClaim", claim) is None:
                raise NeverStarted(
                    f"there is no volume claim {claim} in {self._api.namespace}: make it as in "
                    "k8s/base/storage.yaml"
                )

    def _workload(self, job: Object) -> Object | None:
        if QUEUE_LABEL not in job["metadata"].get("labels", {}):
            return None
        uid = job["metadata"].get("uid", "")
        found = self._api.list("Workload", labels=f"{JOB_UID}={uid}")
        return found[0] if found else None

    def _delete(self, name: str) -> None:
        self._api.delete("RayJob", name)
        waited = 0.0
        while self._api.get("RayJob", name) is not None:
            if waited >= DELETION_TIMEOUT_S:
                raise NeverStarted(
                    f"the old RayJob {name} is not gone after {waited:.0f} s: see "
                    f"`kubectl describe rayjob {name}`"
                )
            self._sleep(POLL_S)
            waited += POLL_S

    def _ray(self, name: str) -> RayJobs:
        """The job's dashboard, through the API server: no port is forwarded, none is open."""
        job = self._existing(name)
        auth = job["spec"].get("rayClusterSpec", {}).get("authOptions") or {}
        headers: dict[str, str] = {}
        if secret_name := auth.get("secretName"):
            secret = self._api.get("Secret", secret_name)
            if secret is None:
                raise NeverStarted(f"there is no secret {secret_name}: make it with k8s/README.md")
            token = base64.b64decode(secret["data"]["auth_token"]).decode()
            headers["X-Ray-Authorization"] = f"Bearer {token}"

        def send(method: str, path: str, body: Any) -> Answer:
            service = f"{name}-head-svc"
            return self._api.through_service(service, "dashboard", method, path, headers, body)

        return RayJobs(send)


def _keep_nothing(job: Object) -> Object:
    """The change that takes a job's deletionStrategy away, and remembers it."""
    before = {name: job["spec"].get(name) for name in SHUT_DOWN}
    return {
        "metadata": {"annotations": {SPEC_BEFORE_STOP: json.dumps(before)}},
        "spec": dict(SHUT_DOWN),
    }


def _before_stop(job: Object) -> Object:
    """The fields that `_keep_nothing` has changed, as they were; None: not given."""
    fields: Object = json.loads(job["metadata"].get("annotations", {}).get(SPEC_BEFORE_STOP, "{}"))
    return fields


def _as_sent(job: Object) -> Object:
    """Without what the API server and the operator have added."""
    sent = copy.deepcopy(job)
    sent.pop("status", None)
    kept = ("name", "namespace", "labels", "annotations")
    sent["metadata"] = {name: sent["metadata"][name] for name in kept if name in sent["metadata"]}
    for field in ("suspend", "jobId"):
        sent["spec"].pop(field, None)
    sent["metadata"].get("annotations", {}).pop(SPEC_BEFORE_STOP, None)
    sent["spec"] |= _before_stop(job)
    sent["spec"] = {name: value for name, value in sent["spec"].items() if value is not None}
    return sent

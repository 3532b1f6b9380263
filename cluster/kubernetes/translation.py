"""KubeRay's and Kueue's words for where a job stands, translated into ours.

In: a RayJob and its Workload as they are stored. Out: a JobView. Pure.
"""

import datetime
import re

from cluster.kubernetes.quantities import Object
from cluster.kubernetes.rayjob import DIGEST, QUEUE_LABEL, RUN_DIR, SWEEP_NAME
from cluster.submission import NO_ROOM, JobState, JobView

# .status.jobDeploymentStatus -> state; Ray's .status.jobStatus refines Running and Complete.
DEPLOYMENTS: dict[str, JobState] = {
    "": "starting",
    "New": "starting",
    "Initializing": "starting",
    "Waiting": "starting",
    "Retrying": "starting",
    "Running": "running",
    "Suspending": "starting",
    "Suspended": "starting",  # and spec.suspend says whether it is to stay so
    "Complete": "succeeded",
    "Failed": "failed",
    "ValidationFailed": "failed",
}
ENDS: dict[str, JobState] = {"SUCCEEDED": "succeeded", "FAILED": "failed", "STOPPED": "stopped"}
# .status.reason -> the cause, in terms of what the user can change.
REASONS = {
    "PreRunningDeadlineExceeded": "it did not run in --max-wait ({preRunningDeadlineSeconds} s)",
    "DeadlineExceeded": "it ran longer than --max-runtime ({activeDeadlineSeconds} s)",
    "SubmissionFailed": "its driver could not be submitted",
    "AppFailed": "its driver failed",
    "JobStatusCheckTimeoutExceeded": "its Ray dashboard did not answer the operator",
    "ValidationFailed": "the operator refuses it",
}
NOT_RUN = frozenset({"PreRunningDeadlineExceeded", "SubmissionFailed", "ValidationFailed"})


def job_view(job: Object, workload: Object | None = None) -> JobView:
    status = job.get("status") or {}
    metadata = job["metadata"]
    annotations = metadata.get("annotations", {})
    state = _state(job, workload)
    message = status.get("message", "")
    exited = re.search(r"exit code (\d+)", message)
    code = int(exited[1]) if exited else None
    reason = status.get("reason", "")
    if status.get("jobDeploymentStatus") == "ValidationFailed":
        reason = "ValidationFailed"
    return JobView(
        name=metadata["name"],
        sweep=annotations.get(SWEEP_NAME, ""),
        digest=annotations.get(DIGEST, ""),
        state=state,
        message=_explained(reason, message, job["spec"]),
        run_dir=annotations.get(RUN_DIR, ""),
        created=seconds(metadata.get("creationTimestamp")),
        exit_code=code,
        never_ran=state == "failed" and (reason in NOT_RUN or code == NO_ROOM),
    )


def seconds(timestamp: str | None) -> float | None:
    """Of Kubernetes' RFC 3339 times, with or without a fraction."""
    return datetime.datetime.fromisoformat(timestamp).timestamp() if timestamp else None


def _state(job: Object, workload: Object | None) -> JobState:
    status = job.get("status") or {}
    deployment, ray = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    state = DEPLOYMENTS.get(deployment, "starting")
    if state == "succeeded":
        return ENDS.get(ray, "succeeded")
    if state == "failed":
        return "stopped" if ray == "STOPPED" else "failed"
    if job["metadata"].get("deletionTimestamp"):
        return "stopping"
    if job["spec"].get("suspend"):
        # Kueue suspends what waits; a person stops a workload by making it inactive.
        inactive = workload is not None and workload.get("spec", {}).get("active") is False
        waits = QUEUE_LABEL in job["metadata"].get("labels", {}) and not inactive
        return "queued" if waits else "suspended"
    if state == "running" and ray in ("", "PENDING"):
        return "starting"
    return state


def _explained(reason: str, message: str, spec: Object) -> str:
    first = message.strip().splitlines()[0] if message.strip() else ""
    if reason not in REASONS:
        return first
    limits = {"preRunningDeadlineSeconds": "?", "activeDeadlineSeconds": "?", **spec}
    words = REASONS[reason].format(**limits)
    return f"{words}: {first}" if first else words

"""Tell what happens to a submitted sweep, from the objects and events that Kubernetes shows.

In: what was observed of a RayJob, its cluster, pods, queue and events. Out: a Story: lines with
their times, and why the sweep does not start, if it does not. Pure: of the same objects, the same.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.kubernetes.quantities import Object
from cluster.kubernetes.translation import job_view, seconds
from cluster.submission import BEFORE, JobView, Line, Story

# The scheduler says again every 5 minutes at most that a pod does not fit.
RECENT_S = 320.0
# An operator takes a job up within a second; one that is replaced may take a minute or two.
OPERATOR_LATE_S = 20.0
OPERATOR_PATIENCE_S = 120.0
# A registry's hiccup passes by itself in less.
IMAGE_PATIENCE_S = 45.0
OPERATOR_SILENT = (
    "no operator has taken the RayJob up: is KubeRay's running, and does it watch this namespace? "
    "`orchestrator doctor --target kubernetes` looks"
)
IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
HOPELESS_REASONS = ("CreateContainerConfigError", "InvalidImageName", "ErrImageNeverPull")
# What KubeRay records on the RayCluster when the API server refuses a pod.
REFUSED_POD = re.compile(r"FailedToCreate\w*Pod|FailedCreate")
# Reasons of events that are worth a line although they warn of nothing.
TOLD = frozenset(
    {"Scheduled", "Pulling", "Pulled", "TriggeredScaleUp", "NotTriggerScaleUp", "Preempted"}
)
SILENT = frozenset({"Unhealthy", "BackOff"})  # probes of a pod that starts; told by its state


@dataclass(frozen=True)
class Observed:
    now: float
    job: Object
    cluster: Object | None = None
    pods: tuple[Object, ...] = ()
    workload: Object | None = None
    events: tuple[Object, ...] = ()


@dataclass(frozen=True)
class _Cause:
    text: str
    is_hopeless: bool
    weight: int = 0
    """The weightiest is told: a pod that was refused before one that waits."""


def tell(seen: Observed) -> Story:
    view = job_view(seen.job, seen.workload)
    lines = sorted(_lines(seen, view), key=lambda line: line.time)
    causes = sorted(_causes(seen), key=lambda cause: cause.weight)
    if view.state not in BEFORE or not causes:
        # What kept it from starting until its deadline is still the cause.
        late = causes[-1].text if causes and view.never_ran else ""
        return Story(view, tuple(lines), late)
    return Story(view, tuple(lines), causes[-1].text, causes[-1].is_hopeless)


def _lines(seen: Observed, view: JobView) -> Iterator[Line]:
    created = view.created or seen.now
    yield Line("submitted", created, f"RayJob {view.name} is there")
    if seen.workload is not None:
        yield from _queue_lines(seen.workload, created)
    if seen.cluster is not None:
        name = seen.cluster["metadata"]["name"]
        made = seconds(seen.cluster["metadata"].get("creationTimestamp")) or created
        yield Line(f"cluster {name}", made, f"cluster {name} is being made")
    for pod in seen.pods:
        yield from _pod_lines(pod, created)
    if text := _readiness(seen):
        yield Line(text, seen.now, text)
    for event in seen.events:
        if line := _event_line(event):
            yield line
    if _operator_late_s(seen) >= OPERATOR_LATE_S:
        yield Line("operator", seen.now, OPERATOR_SILENT)
    status = seen.job.get("status") or {}
    if view.state == "running":
        yield Line(f"running {status.get('jobId')}", seen.now, "the driver runs")
    attempts = status.get("failed", 0)
    if attempts and view.state not in ("failed", "stopped", "succeeded"):
        yield Line(f"failed {attempts}", seen.now, f"attempt {attempts} failed; it is tried again")


def _queue_lines(workload: Object, created: float) -> Iterator[Line]:
    queue = workload.get("spec", {}).get("queueName", "?")
    for condition in workload.get("status", {}).get("conditions", []):
        kind, holds = condition.get("type"), condition.get("status") == "True"
        words = condition.get("message", "")
        at = seconds(condition.get("lastTransitionTime")) or created
        key = f"{kind} {condition.get('status')} {words}"
        if kind == "QuotaReserved" and not holds:
            yield Line(key, at, f"queued in {queue}: {words}")
        elif kind == "Admitted" and holds:
            yield Line(f"{key} {at}", at, f"admitted by queue {queue}")
        elif kind == "Evicted" and holds:
            reason = condition.get("reason", "")
            yield Line(f"{key} {at}", at, f"taken out of the cluster ({reason}): {words}")


def _pod_lines(pod: Object, created: float) -> Iterator[Line]:
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    what = _pod_kind(pod)
    if status.get("reason") in ("Evicted", "NodeLost", "Preempting", "Terminated"):
        after = "; another is made, and the sweep goes on from its checkpoints"
        text = f"{what} pod {name} is gone: {status['reason']}: {status.get('message', '')}{after}"
        yield Line(f"gone {name}", created, text)
    for container in status.get("containerStatuses", []):
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in (*IMAGE_REASONS, "CrashLoopBackOff", *HOPELESS_REASONS):
            words = f"{waiting['reason']}: {waiting.get('message', '')}"
            yield Line(f"{name} {waiting['reason']}", created, f"{what} pod {name}: {words}")
        ended = (container.get("lastState") or {}).get("terminated") or {}
        if ended.get("reason") == "OOMKilled":
            at = seconds(ended.get("finishedAt")) or created
            text = f"{what} pod {name} was ended for memory: raise --memory-per-node"
            yield Line(f"oom {name} {at}", at, text)


def _readiness(seen: Observed) -> str:
    if not seen.pods:
        return ""
    ready = sum(_is_ready(pod) for pod in seen.pods)
    return f"{ready} of {len(seen.pods)} pods are ready"


def _event_line(event: Object) -> Line | None:
    reason, message = event.get("reason", ""), event.get("message", "").strip()
    if event.get("type") != "Warning" and reason not in TOLD or reason in SILENT:
        return None
    about = event.get("involvedObject", {})
    place = f"{about.get('kind', '').lower()} {about.get('name', '')}"
    # The scheduler and the operator repeat themselves; a message that differs is news.
    key = f"{place} {reason} {message}"
    return Line(key, event_time(event), f"{place}: {reason}: {message}")


def event_time(event: Object) -> float:
    """An event has one of three times, by the age of what recorded it."""
    series = (event.get("series") or {}).get("lastObservedTime")
    stamp = event.get("lastTimestamp") or series or event.get("eventTime")
    return seconds(stamp or event.get("metadata", {}).get("creationTimestamp")) or 0.0


def _causes(seen: Observed) -> Iterator[_Cause]:
    if (late_s := _operator_late_s(seen)) >= OPERATOR_LATE_S:
        yield _Cause(OPERATOR_SILENT, late_s >= OPERATOR_PATIENCE_S)
    for condition in (seen.workload or {}).get("status", {}).get("conditions", []):
        if condition.get("type") == "QuotaReserved" and condition.get("status") == "False":
            yield _Cause(f"waits for quota: {condition.get('message', '')}", False, 1)
    waiting = {pod["metadata"]["name"] for pod in seen.pods if not _is_ready(pod)}
    for event in seen.events:
        reason, message = event.get("reason", ""), event.get("message", "").strip()
        name = event.get("involvedObject", {}).get("name")
        if seen.now - event_time(event) > RECENT_S:
            continue
        if REFUSED_POD.fullmatch(reason):
            if "exceeded quota" in message:
                yield _Cause(f"quota: {message}", False, 2)
            else:
                yield _Cause(f"a pod is refused: {message}", True, 4)
        elif reason == "FailedScheduling" and name in waiting:
            yield _Cause(f"no node fits: {message}", False, 2)
        elif reason == "NotTriggerScaleUp" and name in waiting:
            yield _Cause(f"no node fits, and none can be added: {message}", False, 3)
        elif reason in ("FailedMount", "FailedAttachVolume") and name in waiting:
            yield _Cause(f"a volume cannot be mounted: {message}", False, 3)
    for pod in seen.pods:
        yield from _pod_causes(pod, seen.now)


def _pod_causes(pod: Object, now: float) -> Iterator[_Cause]:
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    age = now - (seconds(pod["metadata"].get("creationTimestamp")) or now)
    containers = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    for container in containers:
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, words = waiting.get("reason", ""), waiting.get("message", "")
        if reason in IMAGE_REASONS:
            hopeless = reason in HOPELESS_REASONS or age > IMAGE_PATIENCE_S
            image = container.get("image", "")
            text = f"the image {image} cannot be pulled ({reason}): {words}: check --image"
            yield _Cause(f"{text} and the pull secret", hopeless, 5)
        elif reason in HOPELESS_REASONS:
            yield _Cause(f"pod {name}: {reason}: {words}", True, 5)
        elif reason == "CrashLoopBackOff":
            yield _Cause(f"pod {name} ends as soon as it starts: {words}", False, 4)


def _operator_late_s(seen: Observed) -> float:
    """How long the job has waited for its first status; Kueue's suspended jobs may have none."""
    if (seen.job.get("status") or {}).get("jobDeploymentStatus") or seen.job["spec"].get("suspend"):
        return 0.0
    return seen.now - (seconds(seen.job["metadata"].get("creationTimestamp")) or seen.now)


def _is_ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions", [])
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)


def _pod_kind(pod: Object) -> str:
    return str(pod["metadata"].get("labels", {}).get("ray.io/node-type", "a"))

"""The linter's rules about the RayJob and its cluster, each a generator of (path, problem).

See linter.py. In: the RayJob, or its rayClusterSpec. Imports nothing of Kubernetes.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from cluster.kubernetes.quantities import Object
from cluster.submission import MAX_ENTRYPOINT_BYTES, MAX_JOB_NAME

Found = Iterator[tuple[str, str]]

SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
MAX_ANNOTATION_BYTES = 256 * 1024
MAX_KUEUE_POD_SETS = 18  # the head's and 17 worker groups'
MIN_TOKEN_RAY_VERSION = (2, 52)
AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
ELASTIC = "kueue.x-k8s.io/elastic-job"
LABEL_VALUE = r"(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?"


def name_is_a_dns_label(job: Object) -> Found:  # fails
    name = job.get("metadata", {}).get("name", "")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        rule = "a name has small letters, digits and dashes, and begins with a letter"
        yield "metadata.name", f"{rule}, but got {name!r}: choose another --name"


def name_is_short(job: Object) -> Found:  # fails
    name = job.get("metadata", {}).get("name", "")
    if len(name) > MAX_JOB_NAME:
        yield (
            "metadata.name",
            f"at most {MAX_JOB_NAME} characters, but {name} has {len(name)}: choose another --name",
        )


def labels_are_valid(job: Object) -> Found:  # refused by the API server when the pods are made
    for key, value in job.get("metadata", {}).get("labels", {}).items():
        if not re.fullmatch(LABEL_VALUE, str(value)):
            rule = "a label has at most 63 letters, digits, dashes, dots and underscores"
            yield f"metadata.labels.{key}", f"{rule}, but got {value!r}: shorten it"


def annotations_fit(job: Object) -> Found:  # refused by the API server
    annotations = job.get("metadata", {}).get("annotations", {})
    size = sum(len(key) + len(str(value)) for key, value in annotations.items())
    if size > MAX_ANNOTATION_BYTES:
        limit = f"at most {MAX_ANNOTATION_BYTES:,} bytes"
        yield "metadata.annotations", f"{limit}, but got {size:,}: remove some"


def submission_mode_exists(job: Object) -> Found:  # hangs: Running, and nothing is ever submitted
    mode = job["spec"].get("submissionMode", "K8sJobMode")
    if mode not in SUBMISSION_MODES:
        yield "spec.submissionMode", f"one of {', '.join(SUBMISSION_MODES)}, but got {mode!r}"


def submission_is_over_http(job: Object) -> Found:
    # The submitter's pod is refused where pod security is `restricted`, and its log stream's end
    # is taken for the job's.
    mode = job["spec"].get("submissionMode", "K8sJobMode")
    if mode in SUBMISSION_MODES and mode != "HTTPMode":
        yield "spec.submissionMode", f"a sweep may be started twice: use HTTPMode, but got {mode}"


def entrypoint_is_given(job: Object) -> Found:  # hangs: left to the submitter to fail
    if not job["spec"].get("entrypoint", "").strip():
        yield "spec.entrypoint", "needed, but empty: name the command, such as orchestrator sweep"


def entrypoint_fits(job: Object) -> Found:  # the driver cannot be started
    size = len(job["spec"].get("entrypoint", "").encode())
    if size > MAX_ENTRYPOINT_BYTES:
        limit = f"at most {MAX_ENTRYPOINT_BYTES:,} bytes"
        yield "spec.entrypoint", f"{limit}, but got {size:,}: shorten the configuration's lists"


def cluster_is_given(job: Object) -> Found:  # fails
    spec = job["spec"]
    if "rayClusterSpec" not in spec and not spec.get("clusterSelector"):
        yield "spec.rayClusterSpec", "needed, but missing: say what cluster to make"


def selector_goes_without_suspend(job: Object) -> Found:  # fails
    spec = job["spec"]
    if spec.get("clusterSelector") and spec.get("suspend"):
        yield "spec.suspend", "not with clusterSelector, but got true: leave one of them out"


def ttl_is_not_negative(job: Object) -> Found:  # fails
    ttl = job["spec"].get("ttlSecondsAfterFinished", 0)
    if ttl < 0:
        yield "spec.ttlSecondsAfterFinished", f"0 or more, but got {ttl}"


def ttl_needs_shutdown(job: Object) -> Found:  # fails
    spec = job["spec"]
    ttl = spec.get("ttlSecondsAfterFinished", 0)
    if ttl > 0 and not spec.get("shutdownAfterJobFinishes"):
        yield (
            "spec.ttlSecondsAfterFinished",
            f"needs shutdownAfterJobFinishes: true, but got {ttl} without it",
        )


def suspend_needs_shutdown(job: Object) -> Found:  # fails
    spec = job["spec"]
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "spec.suspend", "needs shutdownAfterJobFinishes: true, but got true without it"


def deletion_rules_replace_shutdown(job: Object) -> Found:  # fails
    spec = job["spec"]
    if (spec.get("deletionStrategy") or {}).get("deletionRules") and spec.get(
        "shutdownAfterJobFinishes"
    ):
        path = "spec.deletionStrategy.deletionRules"
        yield path, "not with shutdownAfterJobFinishes: true: leave one of them out"


def workers_are_not_deleted_from_an_autoscaler(job: Object) -> Found:  # fails
    rules = (job["spec"].get("deletionStrategy") or {}).get("deletionRules") or []
    scaled = (job["spec"].get("rayClusterSpec") or {}).get("enableInTreeAutoscaling")
    for index, rule in enumerate(rules):
        if scaled and rule.get("policy") == "DeleteWorkers":
            path = f"spec.deletionStrategy.deletionRules[{index}].policy"
            yield path, "not with the autoscaler, but got DeleteWorkers: use DeleteCluster"


def backoff_is_small(job: Object) -> Found:  # below 0 fails; above 1 repeats a typo on new clusters
    backoff = job["spec"].get("backoffLimit", 0)
    if not 0 <= backoff <= 1:
        yield (
            "spec.backoffLimit",
            f"0 or 1, for a retry makes a new cluster and wipes the first error, but got {backoff}",
        )


def interactive_has_no_backoff(job: Object) -> Found:  # fails
    spec = job["spec"]
    if spec.get("submissionMode") == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "spec.backoffLimit", f"0 with InteractiveMode, but got {spec['backoffLimit']}"


def sidecar_has_no_submitter(job: Object) -> Found:  # fails
    spec = job["spec"]
    for field in ("submitterPodTemplate", "submitterConfig"):
        if spec.get("submissionMode") == "SidecarMode" and field in spec:
            yield f"spec.{field}", "not with SidecarMode, but given: leave it out"


def runtime_env_is_yaml(job: Object) -> Found:  # fails
    text = job["spec"].get("runtimeEnvYAML", "")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        yield "spec.runtimeEnvYAML", f"a YAML mapping, but it cannot be read: {first}"
        return
    if text and not isinstance(content, dict):
        yield "spec.runtimeEnvYAML", f"a YAML mapping, but got {type(content).__name__}"


def runtime_is_limited(job: Object) -> Found:  # 0 or less fails; without it GPUs are held for ever
    seconds = job["spec"].get("activeDeadlineSeconds")
    if seconds is None or seconds <= 0:
        yield "spec.activeDeadlineSeconds", f"1 or more, but got {seconds}: set --max-runtime"


def start_is_limited(job: Object) -> Found:  # hangs wherever a pod cannot start
    seconds = job["spec"].get("preRunningDeadlineSeconds")
    if seconds is None or seconds <= 0:
        yield "spec.preRunningDeadlineSeconds", f"1 or more, but got {seconds}: set --max-wait"


def queue_decides_suspend(job: Object) -> Found:  # a job that is suspended here is resumed by Kueue
    labels = job.get("metadata", {}).get("labels", {})
    if QUEUE_LABEL in labels and job["spec"].get("suspend"):
        yield "spec.suspend", "Kueue sets it itself, but got true with a queue: leave it out"


def queued_job_shuts_down(job: Object) -> Found:  # refused by Kueue's webhook
    labels = job.get("metadata", {}).get("labels", {})
    if QUEUE_LABEL in labels and not job["spec"].get("shutdownAfterJobFinishes"):
        yield "spec.shutdownAfterJobFinishes", "true with a queue, but got false: set it"


def queued_job_does_not_grow(job: Object) -> Found:  # refused by Kueue's webhook
    metadata = job.get("metadata", {})
    scaled = (job["spec"].get("rayClusterSpec") or {}).get("enableInTreeAutoscaling")
    elastic = metadata.get("annotations", {}).get(ELASTIC) == "true"
    if QUEUE_LABEL in metadata.get("labels", {}) and scaled and not elastic:
        yield (
            "spec.rayClusterSpec.enableInTreeAutoscaling",
            f"false with a queue, but got true: fix the number of workers, or annotate {ELASTIC}",
        )


def queued_job_has_few_groups(job: Object) -> Found:  # refused by Kueue's webhook
    groups = (job["spec"].get("rayClusterSpec") or {}).get("workerGroupSpecs", [])
    if QUEUE_LABEL in job.get("metadata", {}).get("labels", {}) and (
        len(groups) >= MAX_KUEUE_POD_SETS
    ):
        yield (
            "spec.rayClusterSpec.workerGroupSpecs",
            f"at most {MAX_KUEUE_POD_SETS - 1} with a queue, but got {len(groups)}: join some",
        )


def group_names_differ(cluster: Object) -> Found:  # hangs: one worker of two, and no event
    seen: set[str] = set()
    for index, group in enumerate(cluster.get("workerGroupSpecs", [])):
        name = group.get("groupName", "")
        if name in seen:
            path = f"workerGroupSpecs[{index}].groupName"
            yield path, f"each group has its own name, but {name} is there twice: rename one"
        seen.add(name)


def replicas_are_in_their_range(cluster: Object) -> Found:  # min above max fails
    for index, group in enumerate(cluster.get("workerGroupSpecs", [])):
        low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        now = group.get("replicas", low)
        if not low <= now <= high:
            rule = "minReplicas <= replicas <= maxReplicas must hold"
            yield f"workerGroupSpecs[{index}].replicas", f"{rule}, but got {low}, {now}, {high}"


def autoscaler_version_is_said_once(cluster: Object) -> Found:  # fails
    container = _head_container(cluster)
    switch = [env for env in container.get("env", []) if env.get("name") == AUTOSCALER_V2]
    path = "headGroupSpec.template.spec.containers[0].env"
    if switch and not cluster.get("enableInTreeAutoscaling"):
        yield path, f"{AUTOSCALER_V2} needs enableInTreeAutoscaling: true: leave it out"
    elif switch and (cluster.get("autoscalerOptions") or {}).get("version"):
        yield path, f"{AUTOSCALER_V2} and autoscalerOptions.version say the same: leave it out"


def scaled_pods_are_not_restarted(cluster: Object) -> Found:  # fails
    if not _scales(cluster) or (cluster.get("autoscalerOptions") or {}).get("version") != "v2":
        return
    for path, group in _groups(cluster):
        policy = group.get("template", {}).get("spec", {}).get("restartPolicy", "Never")
        if policy != "Never":
            path = f"{path}.template.spec.restartPolicy"
            yield path, f"Never with the autoscaler's version v2, but got {policy}"


def scaled_groups_are_not_suspended(cluster: Object) -> Found:  # fails
    for index, group in enumerate(cluster.get("workerGroupSpecs", [])):
        if _scales(cluster) and group.get("suspend"):
            yield f"workerGroupSpecs[{index}].suspend", "not with the autoscaler, but got true"


def token_needs_a_new_ray(cluster: Object) -> Found:  # fails
    if (cluster.get("authOptions") or {}).get("mode") != "token":
        return
    version = str(cluster.get("rayVersion", ""))
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or (int(found[1]), int(found[2])) < MIN_TOKEN_RAY_VERSION:
        yield "rayVersion", f"2.52 or newer for a token, but got {version!r}: say the image's"


def access_needs_a_token(cluster: Object) -> Found:
    # Whoever reaches the dashboard runs code on the cluster; KubeRay leaves this off by default.
    mode = (cluster.get("authOptions") or {}).get("mode")
    if mode != "token":
        yield "authOptions.mode", f"token, but got {mode}: set it, with a secretName"


def resources_are_said_once(cluster: Object) -> Found:  # fails
    for path, group in _groups(cluster):
        params = [name for name in RESOURCE_PARAMS if group.get("rayStartParams", {}).get(name)]
        if params and group.get("resources"):
            yield f"{path}.resources", f"not with rayStartParams' {params[0]}: use one of them"


def ray_labels_have_their_own_field(cluster: Object) -> Found:  # fails
    for path, group in _groups(cluster):
        if "labels" in group.get("rayStartParams", {}):
            yield f"{path}.rayStartParams.labels", "use the group's field labels instead"


def network_policy_is_the_namespaces(cluster: Object) -> Found:  # fails: its gate is off
    if cluster.get("networkPolicy"):
        yield "networkPolicy", "an alpha feature that is off: use a NetworkPolicy, as in k8s/base"


def head_trains_nothing(cluster: Object) -> Found:  # a GPU would be idle, or the head out of memory
    cpus = cluster.get("headGroupSpec", {}).get("rayStartParams", {}).get("num-cpus")
    if cpus != "0":
        path = "headGroupSpec.rayStartParams.num-cpus"
        yield path, f"the string 0, so that nothing is trained on the head, but got {cpus!r}"
    limits = _head_container(cluster).get("resources", {}).get("limits", {})
    for name in limits:
        if name.endswith("gpu"):
            path = f"headGroupSpec.template.spec.containers[0].resources.limits.{name}"
            yield path, f"the head needs no GPU, but got {limits[name]}: leave it out"


def gcs_keeps_no_redis(cluster: Object) -> Found:  # fails without gcsFaultToleranceOptions
    for env in _head_container(cluster).get("env", []):
        if env.get("name") in ("RAY_REDIS_ADDRESS", "REDIS_USERNAME"):
            path = "headGroupSpec.template.spec.containers[0].env"
            yield path, f"{env['name']} is not supported for training: leave it out"


def _scales(cluster: Object) -> bool:
    return bool(cluster.get("enableInTreeAutoscaling"))


def _head_container(cluster: Object) -> Object:
    spec = cluster.get("headGroupSpec", {}).get("template", {}).get("spec", {})
    return next(iter(spec.get("containers") or []), {})


def _groups(cluster: Object) -> Iterator[tuple[str, Any]]:
    yield "headGroupSpec", cluster.get("headGroupSpec", {})
    for index, group in enumerate(cluster.get("workerGroupSpecs", [])):
        yield f"workerGroupSpecs[{index}]", group


Rule = Callable[[Object], Found]
JOB_RULES: tuple[Rule, ...] = (
    name_is_a_dns_label,
    name_is_short,
    labels_are_valid,
    annotations_fit,
    submission_mode_exists,
    submission_is_over_http,
    entrypoint_is_given,
    entrypoint_fits,
    cluster_is_given,
    selector_goes_without_suspend,
    ttl_is_not_negative,
    ttl_needs_shutdown,
    suspend_needs_shutdown,
    deletion_rules_replace_shutdown,
    workers_are_not_deleted_from_an_autoscaler,
    backoff_is_small,
    interactive_has_no_backoff,
    sidecar_has_no_submitter,
    runtime_env_is_yaml,
    runtime_is_limited,
    start_is_limited,
    queue_decides_suspend,
    queued_job_shuts_down,
    queued_job_does_not_grow,
    queued_job_has_few_groups,
)
CLUSTER_RULES: tuple[Rule, ...] = (
    group_names_differ,
    replicas_are_in_their_range,
    autoscaler_version_is_said_once,
    scaled_pods_are_not_restarted,
    scaled_groups_are_not_suspended,
    token_needs_a_new_ray,
    access_needs_a_token,
    resources_are_said_once,
    ray_labels_have_their_own_field,
    network_policy_is_the_namespaces,
    head_trains_nothing,
    gcs_keeps_no_redis,
)

"""Render a sweep as a KubeRay RayJob (ray.io/v1). Pure: the same input, the same object.

In: a SweepConfig, options, and the template, k8s/base/rayjob.yaml. Out: the object that is sent, as
plain dictionaries. Sends nothing; imports no client.
"""

import copy
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from cluster.kubernetes.options import (
    GPU_RESOURCE,
    STORAGE,
    KubernetesOptions,
    check_options,
    gpu_labels,
)
from cluster.submission import Submission, plan_submission
from orchestrator.config import SweepConfig
from orchestrator.data_config import BUILTIN_DATASETS
from orchestrator.errors import ConfigError
from orchestrator.planning.capacity import check_pack_fits, check_step_program
from orchestrator.yaml_core import CoreDumper

Object = dict[str, Any]

PREFIX = "qlora-orchestrator"
SWEEP_LABEL = f"{PREFIX}/sweep"
SWEEP_NAME = f"{PREFIX}/sweep-name"
DIGEST = f"{PREFIX}/config-digest"
RUN_DIR = f"{PREFIX}/run-dir"
# What a cancel or a pause has changed in the spec, as it was: a job that goes on has it again.
SPEC_BEFORE_STOP = f"{PREFIX}/spec-before-stop"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"

# Shared memory counts as the container's memory: NCCL and data loaders need gigabytes, never half.
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
SHM_FRACTION = 1 / 8
# Nodes of this kind, as GKE, AKS, EKS and Karpenter mark them, by a label and often a taint.
SPOT_MARKS = (
    ("cloud.google.com/gke-spot", "true"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
    ("eks.amazonaws.com/capacityType", "SPOT"),
    ("karpenter.sh/capacity-type", "spot"),
)
# Keep a pod where it is; of no use on a node that is taken away.
STAY_MARKS = ("cluster-autoscaler.kubernetes.io/safe-to-evict", "karpenter.sh/do-not-disrupt")


@dataclass(frozen=True)
class Rendered:
    submission: Submission
    rayjob: Object


def render_rayjob(
    config: SweepConfig, options: KubernetesOptions, name: str | None = None
) -> Rendered:
    """Raises ConfigError if the options or the configuration cannot be meant for a cluster."""
    options = check_options(options)
    _check_paths(config)
    _check_tracking(config.tracking.uri)
    config = _for_cluster(config, options)
    submission = plan_submission(config, STORAGE, options.max_wait_s, name)
    job = load_template(options.template)
    _name(job, submission, options)
    spec = job["spec"]
    spec["entrypoint"] = submission.entrypoint
    spec["backoffLimit"] = options.retries
    spec["preRunningDeadlineSeconds"] = options.max_wait_s
    spec["activeDeadlineSeconds"] = options.max_runtime_s
    if options.keep_failed_s:
        _keep_failed(spec, options.keep_failed_s)
    cluster = spec["rayClusterSpec"]
    (prototype,) = cluster["workerGroupSpecs"]
    cluster["workerGroupSpecs"] = _worker_groups(prototype, options)
    if options.queue:
        _without_autoscaler(cluster)
    for pod in pods(job):
        container = pod["spec"]["containers"][0]  # Ray's; others are the template's own
        container["image"] = options.image or container["image"]
        if options.image_pull_policy:
            container["imagePullPolicy"] = options.image_pull_policy
    return Rendered(submission, job)


def load_template(path: Path | None = None) -> Object:
    """Raises ConfigError if the file is no RayJob with one worker group."""
    try:
        text = (path or files("cluster.kubernetes").joinpath("rayjob.yaml")).read_text()
        # Anchors in the file must not become shared dictionaries.
        template: Object = _unshared(yaml.safe_load(text))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--template {path} cannot be read: {error}") from error
    groups = _dig(template, "spec", "rayClusterSpec", "workerGroupSpecs")
    if _dig(template, "kind") != "RayJob" or not isinstance(groups, list) or len(groups) != 1:
        raise ConfigError(
            f"--template {path} must hold one RayJob with one worker group, which is copied: start "
            "from k8s/base/rayjob.yaml"
        )
    return template


def pods(job: Object) -> list[Object]:
    """The pod templates, the head's first."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    return [group["template"] for group in groups]


def to_yaml(job: Object) -> str:
    """As a person reads it: texts of several lines stay so."""
    return yaml.dump(job, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _name(job: Object, submission: Submission, options: KubernetesOptions) -> None:
    metadata = job["metadata"]
    labels = {SWEEP_LABEL: submission.name}
    metadata["name"] = submission.name
    if options.namespace:
        metadata["namespace"] = options.namespace
    metadata["labels"] = {**metadata.get("labels", {}), **labels}
    if options.queue:
        metadata["labels"][QUEUE_LABEL] = options.queue
    if options.priority:
        metadata["labels"][PRIORITY_LABEL] = options.priority
    metadata["annotations"] = {
        **metadata.get("annotations", {}),
        SWEEP_NAME: submission.sweep,
        DIGEST: submission.digest,
        RUN_DIR: submission.run_dir,
    }
    for pod in pods(job):
        pod.setdefault("metadata", {}).setdefault("labels", {}).update(labels)


def _keep_failed(spec: Object, keep_s: int) -> None:
    """Rules in place of a shutdown, for the operator takes no job that has both."""
    spec.pop("shutdownAfterJobFinishes", None)
    done_s = spec.pop("ttlSecondsAfterFinished", 0)
    ends = [
        ({"jobStatus": "SUCCEEDED"}, done_s),
        ({"jobStatus": "FAILED"}, keep_s),
        ({"jobDeploymentStatus": "Failed"}, keep_s),  # by a deadline: Ray knows of no failure
    ]
    spec["deletionStrategy"] = {
        "deletionRules": [
            {"condition": {**end, "ttlSeconds": ttl_s}, "policy": "DeleteCluster"}
            for end, ttl_s in ends
        ]
    }


def _for_cluster(config: SweepConfig, options: KubernetesOptions) -> SweepConfig:
    """With the workers that are paid for, unless the file names fewer."""
    content = config.model_dump()
    resources = content["resources"]
    room = options.num_nodes * (options.cpus // resources["cpus_per_worker"])
    if options.gpus:
        room = min(room, options.gpus)
    wanted = "cuda" if options.gpus else "cpu"
    if resources["device"] not in ("auto", wanted):
        raise ConfigError(
            f"resources.device: {resources['device']}, but the sweep asks for {options.gpus} GPUs: "
            "set auto, or change --gpus"
        )
    num_workers = resources["num_workers"] or options.gpus or max(1, room)
    if num_workers > room:
        raise ConfigError(
            f"resources.num_workers: {num_workers} workers of "
            f"{resources['cpus_per_worker']} CPU cores, but the sweep asks for {options.num_nodes} "
            f"nodes of {options.cpus} cores and {options.gpus} GPUs in all: raise --gpus, --nodes "
            "or --cpus-per-node, or lower resources.cpus_per_worker"
        )
    resources["device"] = wanted
    resources["num_workers"] = num_workers
    content["runs_dir"] = f"{STORAGE}/runs"
    found = SweepConfig.model_validate(content)
    check_pack_fits(found.resources, {"worker": num_workers})
    check_step_program(found.resources, wanted)
    return found


def _check_paths(config: SweepConfig) -> None:
    """What names a file of this machine names nothing in a pod."""
    named = [
        *(("data.train", source.path) for source in config.data.train_sources),
        *(("data.held_out", source.path) for source in config.data.held_out_sources),
        ("data.shards_dir", config.data.shards_dir),
        ("base_model.source", config.base_model.source),
    ]
    for field, value in named:
        if value is None or value in BUILTIN_DATASETS:
            continue
        value = value.removeprefix("file://")
        if re.match(r"[a-z][a-z0-9+.-]*:", value):
            continue
        path = PurePosixPath(value)
        local = not path.is_absolute() and (
            value[0] in ".~" or field == "data.shards_dir" or Path(value).exists()
        )
        if local or (path.is_absolute() and not path.is_relative_to(STORAGE)):
            raise ConfigError(
                f"{field}: {value} is a path of this machine, which no pod has: copy it to the "
                f"shared volume and name it {STORAGE}/..., or use a hub id or a URL"
            )


def _check_tracking(uri: str | None) -> None:
    found = re.fullmatch(r"(?:sqlite|file):/{0,3}(/.*)|([^:]+)", uri or "")
    if found and not PurePosixPath(found[1] or found[2]).is_relative_to(STORAGE):
        raise ConfigError(
            f"tracking.uri: {uri} is a place of this machine, which no pod has: leave it out for "
            "the MLflow of the namespace, or name a server's http:// address"
        )


def _worker_groups(prototype: Object, options: KubernetesOptions) -> list[Object]:
    kind = "gpu" if options.gpus else "cpu"
    if options.capacity == "spot-first":
        # The autoscaler takes from the group of the higher priority while it can.
        first = _worker_group(prototype, options, f"{kind}-spot", spot=True)
        return [
            {**first, "priority": 1},
            _worker_group(prototype, options, f"{kind}-on-demand", spot=False),
        ]
    spot = options.capacity == "spot"
    return [_worker_group(prototype, options, f"{kind}-spot" if spot else kind, spot)]


def _worker_group(prototype: Object, options: KubernetesOptions, name: str, spot: bool) -> Object:
    group = copy.deepcopy(prototype)
    fixed = options.num_nodes if options.queue else 0
    group |= {
        "groupName": name,
        "replicas": fixed,
        "minReplicas": fixed,
        "maxReplicas": options.num_nodes,
        # Said, not derived: the operator would take the limits of whichever container is first.
        "rayStartParams": {
            **group.get("rayStartParams", {}),
            "num-cpus": str(options.cpus),
            "num-gpus": str(options.gpus_per_node if options.gpus else 0),
        },
    }
    pod = group["template"]["spec"]
    container = pod["containers"][0]
    size = {"cpu": str(options.cpus), "memory": f"{options.memory_gib}Gi"}
    if options.gpus:
        size[GPU_RESOURCE] = str(options.gpus_per_node)
    # Requests are limits, so that the kubelet evicts these pods last.
    container["resources"] = {"requests": dict(size), "limits": dict(size)}
    for volume in pod.get("volumes", []):
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            gib = max(1, int(options.memory_gib * SHM_FRACTION))
            volume["emptyDir"]["sizeLimit"] = f"{gib}Gi"
    _place(pod, options, spot)
    if spot:
        annotations = group["template"].get("metadata", {}).get("annotations", {})
        for mark in STAY_MARKS:
            annotations.pop(mark, None)
    return group


def _place(pod: Object, options: KubernetesOptions, spot: bool) -> None:
    tolerations: list[Object] = list(pod.get("tolerations", []))
    terms: list[list[Object]] = [[]]
    if options.gpus:
        tolerations.append({"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"})
    if labels := gpu_labels(options.gpu_type):
        terms[0].append({"key": labels.key, "operator": "In", "values": list(labels.values)})
    if spot:
        tolerations += [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
            for key, value in SPOT_MARKS
        ]
        # Terms are alternatives, the expressions of one hold together.
        terms = [
            [*terms[0], {"key": key, "operator": "In", "values": [value]}]
            for key, value in SPOT_MARKS
        ]
    if tolerations:
        pod["tolerations"] = tolerations
    if terms != [[]]:
        nodes = pod.setdefault("affinity", {}).setdefault("nodeAffinity", {})
        # The template's own hold as well, so each of them goes with each of these.
        own = _dig(nodes, REQUIRED, "nodeSelectorTerms") or [{}]
        nodes[REQUIRED] = {
            "nodeSelectorTerms": [
                {
                    **one,
                    "matchExpressions": [*one.get("matchExpressions", []), *copy.deepcopy(term)],
                }
                for one in own
                for term in terms
            ]
        }


def _without_autoscaler(cluster: Object) -> None:
    """Kueue admits all pods of a job at once, and its webhook refuses one that grows by itself."""
    cluster["enableInTreeAutoscaling"] = False
    cluster.pop("autoscalerOptions", None)
    cluster["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] = False


class _Dumper(CoreDumper):
    """Texts of several lines stay so."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value


def _dig(value: Any, *path: str) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value

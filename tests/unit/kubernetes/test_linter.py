"""Each rule of the linter refuses the mistake that it is about, and nothing else does."""

from collections.abc import Mapping
from typing import Any

import pytest

from cluster.kubernetes.linter import check, lint, rule_names
from cluster.kubernetes.options import KubernetesOptions
from cluster.kubernetes.rayjob import load_template
from orchestrator.errors import ConfigError
from tests.manifests import changed, rendered

CLUSTER = "spec/rayClusterSpec"
HEAD = f"{CLUSTER}/headGroupSpec"
GROUP = f"{CLUSTER}/workerGroupSpecs/0"
POD = f"{GROUP}/template/spec"
CONTAINER = f"{POD}/containers/0"
QUEUE = {"kueue.x-k8s.io/queue-name": "team"}
RULES = [{"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}]
SAME_NAME = {"groupName": "gpu", "maxReplicas": 1, "minReplicas": 0, "template": {"spec": {}}}

# rule -> what to change in a job that has no problem: path -> value, ... takes it out.
MISTAKES: dict[str, Mapping[str, Any]] = {
    "name_is_a_dns_label": {"metadata/name": "My.Sweep"},
    "name_is_short": {"metadata/name": "a" * 48},
    "labels_are_valid": {"metadata/labels/team": "a b"},
    "annotations_fit": {"metadata/annotations/note": "x" * 300_000},
    "submission_mode_exists": {"spec/submissionMode": "K8SJob"},
    "submission_is_over_http": {"spec/submissionMode": "K8sJobMode"},
    "entrypoint_is_given": {"spec/entrypoint": " "},
    "entrypoint_fits": {"spec/entrypoint": "x" * 200_000},
    "cluster_is_given": {CLUSTER: ...},
    "selector_goes_without_suspend": {
        "spec/clusterSelector": {"ray.io/cluster": "c"},
        "spec/suspend": True,
    },
    "ttl_is_not_negative": {"spec/ttlSecondsAfterFinished": -1},
    "ttl_needs_shutdown": {"spec/shutdownAfterJobFinishes": False},
    "suspend_needs_shutdown": {
        "spec/suspend": True,
        "spec/shutdownAfterJobFinishes": False,
        "spec/ttlSecondsAfterFinished": 0,
    },
    "deletion_rules_replace_shutdown": {"spec/deletionStrategy": {"deletionRules": RULES}},
    "workers_are_not_deleted_from_an_autoscaler": {
        "spec/deletionStrategy": {"deletionRules": [{**RULES[0], "policy": "DeleteWorkers"}]},
        "spec/shutdownAfterJobFinishes": False,
        "spec/ttlSecondsAfterFinished": 0,
    },
    "backoff_is_small": {"spec/backoffLimit": -1},
    "interactive_has_no_backoff": {
        "spec/submissionMode": "InteractiveMode",
        "spec/backoffLimit": 1,
    },
    "sidecar_has_no_submitter": {
        "spec/submissionMode": "SidecarMode",
        "spec/submitterPodTemplate": {"spec": {"containers": []}},
    },
    "runtime_env_is_yaml": {"spec/runtimeEnvYAML": "a: [b"},
    "runtime_is_limited": {"spec/activeDeadlineSeconds": 0},
    "start_is_limited": {"spec/preRunningDeadlineSeconds": ...},
    "queue_decides_suspend": {
        "metadata/labels": QUEUE,
        "spec/suspend": True,
        f"{CLUSTER}/enableInTreeAutoscaling": False,
    },
    "queued_job_shuts_down": {
        "metadata/labels": QUEUE,
        f"{CLUSTER}/enableInTreeAutoscaling": False,
        "spec/shutdownAfterJobFinishes": False,
        "spec/ttlSecondsAfterFinished": 0,
    },
    "queued_job_does_not_grow": {"metadata/labels": QUEUE},
    "queued_job_has_few_groups": {
        "metadata/labels": QUEUE,
        f"{CLUSTER}/enableInTreeAutoscaling": False,
        f"{CLUSTER}/workerGroupSpecs": [
            {**SAME_NAME, "groupName": f"g{number}"} for number in range(18)
        ],
    },
    "group_names_differ": {f"{CLUSTER}/workerGroupSpecs": [SAME_NAME, SAME_NAME]},
    "replicas_are_in_their_range": {f"{GROUP}/minReplicas": 3},
    "autoscaler_version_is_said_once": {
        f"{HEAD}/template/spec/containers/0/env": [
            {"name": "RAY_enable_autoscaler_v2", "value": "1"}
        ]
    },
    "scaled_pods_are_not_restarted": {f"{POD}/restartPolicy": "Always"},
    "scaled_groups_are_not_suspended": {f"{GROUP}/suspend": True},
    "token_needs_a_new_ray": {f"{CLUSTER}/rayVersion": "2.51.1"},
    "access_needs_a_token": {f"{CLUSTER}/authOptions": ...},
    "resources_are_said_once": {f"{GROUP}/resources": {"CPU": "4"}},
    "ray_labels_have_their_own_field": {f"{GROUP}/rayStartParams/labels": "a=b"},
    "network_policy_is_the_namespaces": {f"{CLUSTER}/networkPolicy": {"enabled": True}},
    "head_trains_nothing": {f"{HEAD}/rayStartParams/num-cpus": "4"},
    "gcs_keeps_no_redis": {
        f"{HEAD}/template/spec/containers/0/env": [{"name": "RAY_REDIS_ADDRESS", "value": "r:6379"}]
    },
    "containers_are_given": {f"{POD}/containers": []},
    "gpu_request_is_its_limit": {f"{CONTAINER}/resources/requests/nvidia.com%gpu": "2"},
    "requests_are_below_limits": {f"{CONTAINER}/resources/requests/memory": "65Gi"},
    "resources_are_said": {f"{CONTAINER}/resources": {}},
    "pull_policy_exists": {f"{CONTAINER}/imagePullPolicy": "Sometimes"},
    "image_is_pinned": {f"{CONTAINER}/image": "registry:5000/team/image"},
    "mounts_have_their_volume": {f"{CONTAINER}/volumeMounts/0/name": "elsewhere"},
    "names_differ": {f"{POD}/volumes/0/name": "shm", f"{CONTAINER}/volumeMounts/0/name": "shm"},
    "mounts_have_places_of_their_own": {f"{CONTAINER}/volumeMounts/0/mountPath": "/dev/shm"},
    "shared_memory_is_enough": {f"{POD}/volumes/1/emptyDir": {}},
    "shared_memory_fits": {f"{POD}/volumes/1/emptyDir/sizeLimit": "64Gi"},
    "secrets_are_referred_to": {f"{CONTAINER}/env": [{"name": "HF_TOKEN", "value": "hf_abc"}]},
    "pods_are_restricted": {f"{CONTAINER}/securityContext": {}},
    "grace_is_long_enough": {f"{POD}/terminationGracePeriodSeconds": 30},
}


@pytest.mark.parametrize("rule", MISTAKES)
def test_a_mistake_is_refused_by_the_rule_about_it(rule: str) -> None:
    job = rendered().rayjob
    assert lint(job) == []
    for path, value in MISTAKES[rule].items():
        job = changed(job, path, value)
    problems = {problem.rule: str(problem) for problem in lint(job)}
    assert rule in problems
    assert len(problems[rule]) > len(rule) + 40  # a path, the rule in words, and the value


def test_every_rule_has_its_mistake() -> None:
    assert sorted(MISTAKES) == sorted(rule_names())


def test_all_problems_are_told_at_once_each_with_its_place() -> None:
    job = changed(rendered().rayjob, "spec/backoffLimit", 6)
    job = changed(job, f"{CONTAINER}/image", "trainer:latest")
    with pytest.raises(ConfigError) as caught:
        check(job)
    first, second = str(caught.value).splitlines()
    assert first.startswith("spec.backoffLimit: 0 or 1, ")
    assert "but got 6" in first
    assert second.startswith("spec.rayClusterSpec.workerGroupSpecs[0].template.spec.containers[0]")


def test_the_template_has_no_problem() -> None:
    assert lint(load_template()) == []


@pytest.mark.parametrize(
    "options",
    [
        KubernetesOptions(nodes=3),
        KubernetesOptions(gpus=16, gpus_per_node=8, gpu_type="h200", capacity="spot-first"),
        KubernetesOptions(gpus=4, queue="team", priority="high", capacity="spot"),
        KubernetesOptions(gpus=8, keep_failed_s=1800),
        KubernetesOptions(gpus=1, retries=1, image="r.io/x@sha256:" + "0" * 64),
    ],
)
def test_what_is_rendered_has_no_problem(options: KubernetesOptions) -> None:
    assert lint(rendered(options).rayjob) == []

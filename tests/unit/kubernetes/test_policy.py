"""Every overlay keeps every policy, and every policy finds what it is there for."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from cluster.kubernetes.api import KINDS
from cluster.kubernetes.checks import RIGHTS
from tests.unit.kubernetes.overlays import OVERLAYS, Manifest, is_ray, one, pods, rendered
from tests.unit.kubernetes.policies import (
    POLICIES,
    Policy,
    default_deny,
    least_rights,
    no_plain_secrets,
    no_service_account_tokens,
    pinned_images,
    read_only_root,
    requests_and_limits,
    restricted_pod_security,
)


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_an_overlay_keeps_the_policy(overlay: str, policy: Policy) -> None:
    assert list(policy(rendered(overlay))) == []


Break = Callable[[list[Manifest]], Any]


def mlflow(manifests: list[Manifest]) -> Manifest:
    """The pod of MLflow."""
    template: Manifest = one(manifests, "Deployment", "mlflow")["spec"]["template"]["spec"]
    return template


def server(manifests: list[Manifest]) -> Manifest:
    container: Manifest = mlflow(manifests)["containers"][0]
    return container


def ray_head(manifests: list[Manifest]) -> Manifest:
    cluster = one(manifests, "RayJob", "sweep")["spec"]["rayClusterSpec"]
    container: Manifest = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    return container


def network(manifests: list[Manifest], name: str) -> Manifest:
    spec: Manifest = one(manifests, "NetworkPolicy", name)["spec"]
    return spec


def first_rule(manifests: list[Manifest], name: str = "sweep-submitter") -> Manifest:
    rule: Manifest = one(manifests, "Role", name)["rules"][0]
    return rule


def set_to(place: Manifest, field: str, value: Any) -> None:
    place[field] = value


BROKEN: list[tuple[Policy, str, Break]] = [
    (
        restricted_pod_security,
        "namespace without the label",
        lambda m: one(m, "Namespace", "orchestrator")["metadata"].pop("labels"),
    ),
    (restricted_pod_security, "root", lambda m: mlflow(m)["securityContext"].pop("runAsNonRoot")),
    (
        restricted_pod_security,
        "user 0",
        lambda m: set_to(server(m)["securityContext"], "runAsUser", 0),
    ),
    (
        restricted_pod_security,
        "no seccomp",
        lambda m: mlflow(m)["securityContext"].pop("seccompProfile"),
    ),
    (
        restricted_pod_security,
        "capabilities of a Ray pod",
        lambda m: ray_head(m)["securityContext"].pop("capabilities"),
    ),
    (
        restricted_pod_security,
        "an added capability",
        lambda m: set_to(server(m)["securityContext"]["capabilities"], "add", ["SYS_ADMIN"]),
    ),
    (
        restricted_pod_security,
        "escalation",
        lambda m: server(m)["securityContext"].pop("allowPrivilegeEscalation"),
    ),
    (
        restricted_pod_security,
        "privileged",
        lambda m: set_to(server(m)["securityContext"], "privileged", True),
    ),
    (restricted_pod_security, "host network", lambda m: set_to(mlflow(m), "hostNetwork", True)),
    (
        restricted_pod_security,
        "a folder of the node",
        lambda m: mlflow(m)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    ),
    (
        restricted_pod_security,
        "a port of the node",
        lambda m: set_to(server(m)["ports"][0], "hostPort", 5000),
    ),
    (
        read_only_root,
        "a writable image",
        lambda m: server(m)["securityContext"].pop("readOnlyRootFilesystem"),
    ),
    (pinned_images, "no tag", lambda m: set_to(server(m), "image", "localhost:5000/mlflow")),
    (pinned_images, "latest", lambda m: set_to(ray_head(m), "image", "rayproject/ray:latest")),
    (pinned_images, "no pull policy", lambda m: server(m).pop("imagePullPolicy")),
    (requests_and_limits, "no limits", lambda m: server(m)["resources"].pop("limits")),
    (requests_and_limits, "no CPU limit", lambda m: server(m)["resources"]["limits"].pop("cpu")),
    (requests_and_limits, "Ray without", lambda m: ray_head(m).pop("resources")),
    (
        requests_and_limits,
        "an init container without",
        lambda m: mlflow(m)["initContainers"][0].pop("resources"),
    ),
    (
        requests_and_limits,
        "memory as a disk",
        lambda m: mlflow(m)["volumes"].append({"name": "x", "emptyDir": {"medium": "Memory"}}),
    ),
    (
        no_plain_secrets,
        "a Secret",
        lambda m: m.append({"kind": "Secret", "metadata": {"name": "x"}, "data": {}}),
    ),
    (
        no_plain_secrets,
        "a variable",
        lambda m: server(m)["env"].append({"name": "PGPASSWORD", "value": "hunter2"}),
    ),
    (
        no_plain_secrets,
        "an argument",
        lambda m: server(m)["args"].append("--backend-store-uri=postgresql://u:hunter2@h/db"),
    ),
    (
        no_plain_secrets,
        "a file",
        lambda m: m.append(
            {
                "kind": "ConfigMap",
                "metadata": {"name": "x"},
                "data": {"a.ini": "[a]\nadmin_password = hunter2"},
            }
        ),
    ),
    (
        no_plain_secrets,
        "a key of a cloud",
        lambda m: set_to(server(m), "args", ["AKIA" + "A" * 16]),
    ),
    (default_deny, "none", lambda m: m.remove(one(m, "NetworkPolicy", "default-deny"))),
    (
        default_deny,
        "ingress alone",
        lambda m: set_to(network(m, "default-deny"), "policyTypes", ["Ingress"]),
    ),
    (default_deny, "from anyone", lambda m: network(m, "mlflow")["ingress"][0].pop("from")),
    (
        default_deny,
        "from all namespaces",
        lambda m: network(m, "mlflow")["ingress"][0]["from"].append({"namespaceSelector": {}}),
    ),
    (
        default_deny,
        "the dashboard to the world",
        lambda m: network(m, "ray-dashboard")["ingress"][0]["from"].append(
            {"ipBlock": {"cidr": "0.0.0.0/0"}}
        ),
    ),
    (
        default_deny,
        "a load balancer",
        lambda m: set_to(one(m, "Service", "mlflow")["spec"], "type", "LoadBalancer"),
    ),
    (
        default_deny,
        "an ingress",
        lambda m: m.append({"kind": "Ingress", "metadata": {"name": "dashboard"}}),
    ),
    (least_rights, "all verbs", lambda m: set_to(first_rule(m), "verbs", ["*"])),
    (least_rights, "all groups", lambda m: set_to(first_rule(m), "apiGroups", ["*"])),
    (least_rights, "all resources", lambda m: set_to(first_rule(m), "resources", ["*"])),
    (least_rights, "exec", lambda m: first_rule(m)["resources"].append("pods/exec")),
    (least_rights, "pods", lambda m: first_rule(m)["resources"].append("pods")),
    (
        least_rights,
        "all secrets",
        lambda m: first_rule(m, "sweep-viewer").update(resources=["secrets"], verbs=["get"]),
    ),
    (
        least_rights,
        "everyone",
        lambda m: set_to(
            one(m, "RoleBinding", "sweep-submitters")["subjects"][0], "name", "default"
        ),
    ),
    (
        least_rights,
        "administrators",
        lambda m: set_to(
            one(m, "RoleBinding", "sweep-submitters")["roleRef"], "name", "cluster-admin"
        ),
    ),
    (
        least_rights,
        "changes to the cluster",
        lambda m: one(m, "ClusterRole", "orchestrator-doctor")["rules"][1]["verbs"].append("patch"),
    ),
    (
        no_service_account_tokens,
        "a pod",
        lambda m: mlflow(m).pop("automountServiceAccountToken"),
    ),
    (
        no_service_account_tokens,
        "an account",
        lambda m: one(m, "ServiceAccount", "mlflow").pop("automountServiceAccountToken"),
    ),
]


@pytest.mark.parametrize(
    ("policy", "break_it"),
    [(policy, break_it) for policy, _, break_it in BROKEN],
    ids=[f"{policy.__name__}: {what}" for policy, what, _ in BROKEN],
)
def test_the_policy_finds_a_broken_manifest(policy: Policy, break_it: Break) -> None:
    manifests = copy.deepcopy(rendered("local"))
    break_it(manifests)
    assert len(list(policy(manifests))) >= 1


def test_every_policy_is_shown_to_find_something() -> None:
    assert {policy for policy, _, _ in BROKEN} == set(POLICIES)


# What every user may ask, and what doctor says that it may not look at.
NOT_GRANTED = {"selfsubjectaccessreviews", "deployments"}


def rules_of_a_submitter() -> list[Manifest]:
    manifests = rendered("local")
    role = one(manifests, "Role", "sweep-submitter")
    return [*role["rules"], *one(manifests, "ClusterRole", "orchestrator-doctor")["rules"]]


def test_a_submitter_may_do_what_submitting_and_following_take() -> None:
    for verb, group, resource in RIGHTS:
        assert any(
            verb in rule["verbs"] and group in rule["apiGroups"] and resource in rule["resources"]
            for rule in rules_of_a_submitter()
        ), (verb, group, resource)


def test_a_submitter_may_read_every_kind_that_the_client_reads_and_no_other() -> None:
    granted = {
        resource
        for rule in rules_of_a_submitter()
        for resource in rule["resources"]
        if "get" in rule["verbs"]
    }
    read = {plural for _, plural in KINDS.values()}
    assert read - granted == NOT_GRANTED
    for_people = {"pods/log", "services/proxy", "priorityclasses", "clusterqueues"}
    for_people |= {"resourceflavors", "workloadpriorityclasses"}
    assert granted - read == for_people


def test_the_secrets_that_a_submitter_may_read_are_those_of_a_sweep() -> None:
    (rule,) = [rule for rule in rules_of_a_submitter() if "secrets" in rule["resources"]]
    named = {
        variable["valueFrom"]["secretKeyRef"]["name"]
        for _, pod in pods(rendered("local"))
        for container in pod["spec"]["containers"]
        if is_ray(pod)
        for variable in container.get("env", [])
        if "secretKeyRef" in variable.get("valueFrom", {})
    }
    token = one(rendered("local"), "RayJob", "sweep")["spec"]["rayClusterSpec"]["authOptions"]
    assert set(rule["resourceNames"]) == named | {token["secretName"]}

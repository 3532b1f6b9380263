"""`orchestrator doctor --target kubernetes` names what a cluster lacks, with the remedy."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from cluster.kubernetes.checks import examine_cluster
from cluster.kubernetes.stand_in import StandIn
from orchestrator.records import Finding

FIELDS = {"preRunningDeadlineSeconds": {"type": "integer"}}
OPERATOR = {"containers": [{"image": "quay.io/kuberay/operator:v1.7.0"}]}


def put(cluster: StandIn, kind: str, name: str, **content: Any) -> None:
    labels = content.pop("labels", {})
    cluster.put({"kind": kind, "metadata": {"name": name, "labels": labels}, **content})


def definition(fields: dict[str, Any]) -> dict[str, Any]:
    schema = {"properties": {"spec": {"properties": fields}}}
    return {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]}


def healthy() -> StandIn:
    cluster = StandIn()
    put(cluster, "Namespace", "default")
    put(cluster, "CustomResourceDefinition", "rayjobs.ray.io", spec=definition(FIELDS))
    labels = {"app.kubernetes.io/name": "kuberay"}
    operator = {"spec": {"template": {"spec": OPERATOR}}, "status": {"readyReplicas": 1}}
    put(cluster, "Deployment", "kuberay-operator", labels=labels, **operator)
    gpus = {"allocatable": {"nvidia.com/gpu": "8"}}
    put(cluster, "Node", "n1", labels={"nvidia.com/gpu.product": "NVIDIA-H100"}, status=gpus)
    claim = {"spec": {"accessModes": ["ReadWriteMany"]}, "status": {"phase": "Bound"}}
    put(cluster, "PersistentVolumeClaim", "orchestrator-storage", **claim)
    put(cluster, "Secret", "ray-token", data={"auth_token": "eA=="})
    put(cluster, "LocalQueue", "team", spec={})
    return cluster


def findings(cluster: StandIn) -> dict[str, Finding]:
    return {f"{f.subject} {f.text}": f for f in examine_cluster(cluster.api())}


def test_a_healthy_cluster_has_nothing_to_fix() -> None:
    found = findings(healthy())
    assert [f for f in found.values() if f.state == "broken"] == []
    text = "\n".join(found)
    for words in ("8 x NVIDIA-H100", "operator:v1.7.0", "team", "ray-token has auth_token"):
        assert words in text


def without(kind: str, name: str) -> Callable[[StandIn], None]:
    return lambda cluster: cluster.api().delete(kind, name)


def old_operator(cluster: StandIn) -> None:
    put(cluster, "CustomResourceDefinition", "rayjobs.ray.io", spec=definition({}))


def operator_down(cluster: StandIn) -> None:
    operator = copy.deepcopy(cluster.object("Deployment", "kuberay-operator"))
    assert operator is not None
    cluster.put({**operator, "status": {}})


def no_rights(cluster: StandIn) -> None:
    cluster.forbidden = {("create", "rayjobs"), ("get", "services/proxy")}


def may_not_look(cluster: StandIn) -> None:
    cluster.forbidden = {("list", "nodes")}


def one_node_storage(cluster: StandIn) -> None:
    claim = {"spec": {"accessModes": ["ReadWriteOnce"]}, "status": {"phase": "Bound"}}
    put(cluster, "PersistentVolumeClaim", "orchestrator-storage", **claim)


def no_volume_yet(cluster: StandIn) -> None:
    put(cluster, "StorageClass", "standard")
    claim = {"spec": {"storageClassName": "fast"}, "status": {"phase": "Pending"}}
    put(cluster, "PersistentVolumeClaim", "orchestrator-storage", **claim)


def full_quota(cluster: StandIn) -> None:
    status = {"hard": {"requests.nvidia.com/gpu": "8"}, "used": {"requests.nvidia.com/gpu": "8"}}
    put(cluster, "ResourceQuota", "gpus", status=status)


def no_kueue(cluster: StandIn) -> None:
    cluster.missing_groups = {"kueue.x-k8s.io"}


@pytest.mark.parametrize(
    ("trouble", "state", "words"),
    [
        (without("Namespace", "default"), "broken", "default is missing: apply an overlay"),
        (
            without("CustomResourceDefinition", "rayjobs.ray.io"),
            "broken",
            "RayJobs are not defined: install KubeRay 1.7",
        ),
        (old_operator, "broken", "no preRunningDeadlineSeconds: install KubeRay 1.7"),
        (operator_down, "broken", "kuberay-operator is not ready"),
        (without("Deployment", "kuberay-operator"), "note", "no Deployment has the label"),
        (no_rights, "broken", "you may not create rayjobs, get services/proxy: bind the role"),
        (may_not_look, "note", "no right to list Nodes"),
        (without("Node", "n1"), "note", "no node has nvidia.com/gpu now"),
        (
            without("PersistentVolumeClaim", "orchestrator-storage"),
            "broken",
            "claim orchestrator-storage is missing",
        ),
        (one_node_storage, "note", "pods on several nodes need ReadWriteMany"),
        (no_volume_yet, "note", "is Pending: is one of the storage classes ['standard'] the right"),
        (without("Secret", "ray-token"), "broken", "ray-token has no auth_token"),
        (full_quota, "note", "requests.nvidia.com/gpu 8 of 8"),
        (no_kueue, "note", "install Kueue, or leave --queue out"),
    ],
)
def test_what_is_lacking_is_found_with_its_remedy(
    trouble: Callable[[StandIn], None], state: str, words: str
) -> None:
    cluster = healthy()
    trouble(cluster)
    matching = [f for text, f in findings(cluster).items() if words in text]
    assert [f.state for f in matching] == [state]

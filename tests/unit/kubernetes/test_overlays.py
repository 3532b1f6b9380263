"""Every overlay is whole: schemas hold, selectors match, and what is named is there."""

import copy
import re
from typing import Any

import kubernetes_validate
import pytest

from tests.manifests import known
from tests.unit.kubernetes.networks import matches
from tests.unit.kubernetes.overlays import (
    K8S,
    OVERLAYS,
    RAY_LABELS,
    Manifest,
    containers,
    is_ray,
    of_kind,
    one,
    pods,
    rendered,
)

KUBERNETES_VERSION = "1.36"
NOT_KUBERNETES_OWN = {"RayJob", "PodMonitor"}
MLFLOW_SERVICE = "mlflow.orchestrator.svc.cluster.local"


def is_core(manifest: Manifest) -> bool:
    return "kueue" not in manifest["apiVersion"] and manifest["kind"] not in NOT_KUBERNETES_OWN


def as_pod(template: Manifest) -> Manifest:
    return {"apiVersion": "v1", "kind": "Pod", **template}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_of_kubernetes_own_is_valid(overlay: str) -> None:
    manifests = rendered(overlay)
    checked = [m for m in manifests if is_core(m)] + [as_pod(pod) for _, pod in pods(manifests)]
    for manifest in checked:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    assert len(checked) > 30


def test_an_unknown_field_is_found() -> None:
    broken = copy.deepcopy(one(rendered("local"), "Deployment", "mlflow"))
    broken["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_custom_resource_is_valid(overlay: str) -> None:
    custom = [m for m in rendered(overlay) if known().knows(m)]
    assert {m["kind"] for m in rendered(overlay) if not is_core(m)} - {"PodMonitor"} == {
        m["kind"] for m in custom
    }
    for manifest in custom:
        assert known().problems(manifest) == [], manifest["metadata"]["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_name_is_taken_twice(overlay: str) -> None:
    names = [
        (m["kind"], m["metadata"].get("namespace", ""), m["metadata"]["name"])
        for m in rendered(overlay)
    ]
    assert len(names) == len(set(names))


def labels_of_pods(manifests: list[Manifest]) -> list[dict[str, str]]:
    return [pod["metadata"]["labels"] for _, pod in pods(manifests)]


def selectors(manifests: list[Manifest]) -> list[tuple[str, dict[str, Any]]]:
    """Every selector of pods of this namespace."""
    found = []
    for manifest in manifests:
        name, spec = f"{manifest['kind']}/{manifest['metadata']['name']}", manifest.get("spec", {})
        match manifest["kind"]:
            case "Service":
                found.append((name, {"matchLabels": spec["selector"]}))
            case "Deployment" | "StatefulSet" | "PodDisruptionBudget" | "PodMonitor":
                found.append((name, spec["selector"]))
            case "NetworkPolicy":
                found.append((name, spec["podSelector"]))
                rules = [*spec.get("ingress", []), *spec.get("egress", [])]
                peers = [p for rule in rules for p in [*rule.get("from", []), *rule.get("to", [])]]
                found += [
                    (f"{name} peer", peer["podSelector"])
                    for peer in peers
                    if "podSelector" in peer and "namespaceSelector" not in peer
                ]
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_selector_matches_a_pod(overlay: str) -> None:
    manifests = rendered(overlay)
    there = labels_of_pods(manifests)
    for name, selector in selectors(manifests):
        assert any(matches(selector, labels) for labels in there), f"{name}: {selector}"
    for workload in of_kind(manifests, "Deployment", "StatefulSet"):
        own = workload["spec"]["template"]["metadata"]["labels"]
        assert matches(workload["spec"]["selector"], own)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_service_leads_to_one_kind_of_pod_and_a_port_it_has(overlay: str) -> None:
    manifests = rendered(overlay)
    for service in of_kind(manifests, "Service"):
        spec = service["spec"]
        (pod,) = [
            pod
            for _, pod in pods(manifests)
            if matches({"matchLabels": spec["selector"]}, pod["metadata"]["labels"])
        ]
        ports = {port["name"] for c in containers(pod) for port in c.get("ports", [])}
        assert {port["targetPort"] for port in spec["ports"]} <= ports


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_that_a_pod_names_is_there(overlay: str) -> None:
    manifests = rendered(overlay)
    there = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    there |= {("Secret", name) for name in secrets_that_are_made()}
    for name, pod in pods(manifests):
        missing = set(references(pod["spec"])) - there
        assert not missing, f"{name} names {missing}"


def references(spec: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    if account := spec.get("serviceAccountName"):
        found.append(("ServiceAccount", account))
    if priority := spec.get("priorityClassName"):
        found.append(("PriorityClass", priority))
    for volume in spec.get("volumes", []):
        if "configMap" in volume:
            found.append(("ConfigMap", volume["configMap"]["name"]))
        if "secret" in volume:
            found.append(("Secret", volume["secret"]["secretName"]))
        if "persistentVolumeClaim" in volume:
            found.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        for source in container.get("envFrom", []):
            for kind, key in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
                if key in source:
                    found.append((kind, source[key]["name"]))
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                found.append(("Secret", reference["name"]))
    return found


def secrets_that_are_made() -> set[str]:
    """By the script that k8s/README.md tells to run."""
    script = (K8S / "create-secrets.sh").read_text()
    return set(re.findall(r"^\s*secret ([a-z0-9-]+)", script, re.MULTILINE))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_mounted_volume_is_there(overlay: str) -> None:
    for name, pod in pods(rendered(overlay)):
        spec = pod["spec"]
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        for container in containers(pod):
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounts <= volumes | {"data"}, name  # data: a claim template's


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name != "local"])
def test_queues_lead_to_flavors_and_topologies_that_are_there(overlay: str) -> None:
    manifests = rendered(overlay)
    (local,) = of_kind(manifests, "LocalQueue")
    queue = one(manifests, "ClusterQueue", local["spec"]["clusterQueue"])
    namespaces = queue["spec"]["namespaceSelector"]["matchLabels"]
    assert namespaces == {"kubernetes.io/metadata.name": local["metadata"]["namespace"]}
    (group,) = queue["spec"]["resourceGroups"]
    for flavor in group["flavors"]:
        resources = [resource["name"] for resource in flavor["resources"]]
        assert resources == group["coveredResources"]
        spec = one(manifests, "ResourceFlavor", flavor["name"]).get("spec", {})
        if "topologyName" in spec:
            one(manifests, "Topology", spec["topologyName"])
    first = {r["name"]: r["nominalQuota"] for r in group["flavors"][0]["resources"]}
    assert first["nvidia.com/gpu"] == 0, "the head would sit on a GPU node"
    flavors = {flavor["name"] for flavor in group["flavors"]}
    assert flavors == {f["metadata"]["name"] for f in of_kind(manifests, "ResourceFlavor")}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_sweep_waits_in_a_queue_and_a_class_that_are_there(overlay: str) -> None:
    manifests = rendered(overlay)
    labels = one(manifests, "RayJob", "sweep")["metadata"]["labels"]
    queue = labels.get("kueue.x-k8s.io/queue-name")
    assert (queue is None) == (overlay == "local")
    if queue is not None:
        one(manifests, "LocalQueue", queue)
    if priority := labels.get("kueue.x-k8s.io/priority-class"):
        one(manifests, "WorkloadPriorityClass", priority)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_queue_has_quota_for_everything_that_a_sweep_asks_for(overlay: str) -> None:
    manifests = rendered(overlay)
    asked = {
        resource
        for _, pod in pods(manifests)
        if is_ray(pod)
        for container in containers(pod)
        for resource in container["resources"]["requests"]
    }
    for queue in of_kind(manifests, "ClusterQueue"):
        (group,) = queue["spec"]["resourceGroups"]
        assert asked <= set(group["coveredResources"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_server_has_the_replicas_and_the_budget_that_go_together(overlay: str) -> None:
    manifests = rendered(overlay)
    budget = one(manifests, "PodDisruptionBudget", "mlflow")["spec"]
    replicas = one(manifests, "Deployment", "mlflow")["spec"]["replicas"]
    assert budget["maxUnavailable"] == 1
    assert replicas == (1 if overlay == "local" else 2)


def server_arguments() -> list[str]:
    spec = one(rendered("local"), "Deployment", "mlflow")["spec"]["template"]["spec"]
    return list(spec["containers"][0]["args"])


def test_mlflow_knows_the_arguments_of_its_server() -> None:
    from mlflow.cli import server

    parsed = server.make_context("server", server_arguments()).params
    assert parsed["app_name"] == "basic-auth"
    assert parsed["backend_store_uri"] == "postgresql+psycopg:///mlflow"
    assert parsed["serve_artifacts"]


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("mlflow:5000", True),
        (f"{MLFLOW_SERVICE}:5000", True),
        ("localhost:5000", True),
        ("127.0.0.1:34567", True),
        ("mlflow", False),
        ("evil.example.com:5000", False),
    ],
)
def test_mlflow_answers_under_the_names_that_sweeps_and_people_use(
    host: str, allowed: bool
) -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    (listed,) = [a for a in server_arguments() if a.startswith("--allowed-hosts=")]
    names = listed.removeprefix("--allowed-hosts=").split(",")
    assert is_allowed_host_header(names, host) == allowed


def test_sweeps_find_mlflow_under_a_name_that_it_allows() -> None:
    uris = {
        variable["value"]
        for _, pod in pods(rendered("local"))
        for container in containers(pod)
        for variable in container.get("env", [])
        if variable["name"] == "MLFLOW_TRACKING_URI"
    }
    assert uris == {"http://mlflow:5000"}


def test_the_monitor_reads_a_port_that_every_ray_pod_names() -> None:
    manifests = rendered("gpu")
    monitor = one(manifests, "PodMonitor", "ray")["spec"]
    ports = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    for name, pod in pods(manifests):
        if is_ray(pod):
            assert ports <= {p["name"] for c in containers(pod) for p in c.get("ports", [])}, name
    assert all(matches(monitor["selector"], labels) for labels in RAY_LABELS.values())

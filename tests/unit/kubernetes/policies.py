"""Rules that every rendered overlay keeps: functions from manifests to what breaks them.

Written from the Kubernetes documentation: Pod Security Standards (restricted), RBAC good practices,
network policies.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from tests.unit.kubernetes.overlays import Manifest, containers, is_ray, of_kind, pods

Policy = Callable[[list[Manifest]], Iterator[str]]

SAFE_VOLUMES = {"configMap", "downwardAPI", "emptyDir", "persistentVolumeClaim", "projected"}
SAFE_VOLUMES |= {"secret", "ephemeral", "csi"}
SECRET_NAMES = re.compile(r"(password|passwd|token|secret|api_?key|access_?key)", re.IGNORECASE)
PASSWORD_IN_URI = re.compile(r"\w+://[^/\s:@]*:[^@\s]+@")
# Rights that lead to every other right.
DANGEROUS_VERBS = {"*", "escalate", "bind", "impersonate"}
DANGEROUS_RESOURCES = {"*", "pods/exec", "pods/attach", "pods/ephemeralcontainers", "nodes/proxy"}
EVERYONE = {"system:authenticated", "system:unauthenticated", "system:serviceaccounts"}
WORKLOADS = {"pods", "deployments", "statefulsets", "daemonsets", "jobs", "cronjobs"}


def restricted_pod_security(manifests: list[Manifest]) -> Iterator[str]:
    for namespace in of_kind(manifests, "Namespace"):
        labels = namespace["metadata"].get("labels", {})
        if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
            yield f"namespace {namespace['metadata']['name']} does not enforce restricted"
    for name, template in pods(manifests):
        spec = template["spec"]
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(field):
                yield f"{name}: {field}"
        for volume in spec.get("volumes", []):
            if extra := set(volume) - {"name"} - SAFE_VOLUMES:
                yield f"{name}: volume {volume['name']} is {extra}"
        for container in containers(template):
            where = f"{name}/{container['name']}"
            yield from _unsafe(where, spec.get("securityContext", {}), container)


def _unsafe(where: str, pod: dict[str, Any], container: Manifest) -> Iterator[str]:
    own = container.get("securityContext", {})
    both = {**pod, **own}
    if both.get("runAsNonRoot") is not True or both.get("runAsUser", 1) == 0:
        yield f"{where}: may run as root"
    if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield f"{where}: no seccomp profile"
    if own.get("allowPrivilegeEscalation") is not False:
        yield f"{where}: may gain privileges"
    if own.get("privileged") or own.get("procMount", "Default") != "Default":
        yield f"{where}: privileged"
    capabilities = own.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"]:
        yield f"{where}: keeps capabilities"
    if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield f"{where}: adds capabilities"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield f"{where}: a port of the node"


def read_only_root(manifests: list[Manifest]) -> Iterator[str]:
    """Ray's pods apart: Ray, torch and compilers write to many places."""
    for name, template in pods(manifests):
        for container in containers(template) if not is_ray(template) else []:
            if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
                yield f"{name}/{container['name']}: can write to its image"


def pinned_images(manifests: list[Manifest]) -> Iterator[str]:
    for name, template in pods(manifests):
        for container in containers(template):
            image = container["image"]
            tag = image.rpartition("/")[2].partition("@")[0].partition(":")[2]
            if "@sha256:" not in image and (not tag or tag == "latest"):
                yield f"{name}: image {image} has no version"
            if container.get("imagePullPolicy") not in ("IfNotPresent", "Always"):
                yield f"{name}: image {image} has no pull policy"


def requests_and_limits(manifests: list[Manifest]) -> Iterator[str]:
    """Ray workers may use idle cores beyond their request."""
    for name, template in pods(manifests):
        for container in containers(template):
            resources = container.get("resources", {})
            needed = {("requests", "cpu"), ("requests", "memory"), ("limits", "memory")}
            if not is_ray(template):
                needed.add(("limits", "cpu"))
            for kind, resource in sorted(needed):
                if resource not in resources.get(kind, {}):
                    yield f"{name}/{container['name']}: no {resource} in {kind}"
        for volume in template["spec"].get("volumes", []):
            empty = volume.get("emptyDir")
            if empty and empty.get("medium") == "Memory" and "sizeLimit" not in empty:
                yield f"{name}: volume {volume['name']} takes memory without a limit"


def no_plain_secrets(manifests: list[Manifest]) -> Iterator[str]:
    for secret in of_kind(manifests, "Secret"):
        yield f"Secret {secret['metadata']['name']} is in the manifests"
    for name, template in pods(manifests):
        for container in containers(template):
            for variable in container.get("env", []):
                if SECRET_NAMES.search(variable["name"]) and "value" in variable:
                    yield f"{name}: {variable['name']} has a value"
            for word in [*container.get("command", []), *container.get("args", [])]:
                if PASSWORD_IN_URI.search(word) or re.search(
                    r"--\S*(password|secret|token)\S*=", word
                ):
                    yield f"{name}: {word}"
    for config in of_kind(manifests, "ConfigMap"):
        for key, text in config.get("data", {}).items():
            lines = [line.strip() for line in text.splitlines() if not line.startswith("#")]
            for line in lines:
                set_here = re.match(
                    r"[\w.-]*(password|secret|token)[\w.-]*\s*[=:]\s*\S", line, re.I
                )
                if set_here and "environ" not in line and "(" not in line:
                    yield f"ConfigMap {config['metadata']['name']}, {key}: {line}"
            if SECRET_NAMES.search(key) or PASSWORD_IN_URI.search(text):
                yield f"ConfigMap {config['metadata']['name']}: {key}"
    if re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|hf_[A-Za-z0-9]{30}", json.dumps(manifests)):
        yield "something looks like a key"


def default_deny(manifests: list[Manifest]) -> Iterator[str]:
    policies = of_kind(manifests, "NetworkPolicy")
    if not any(
        policy["spec"] == {"podSelector": {}, "policyTypes": policy["spec"]["policyTypes"]}
        and set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        for policy in policies
    ):
        yield "no policy denies everything by default"
    for policy in policies:
        name, spec = policy["metadata"]["name"], policy["spec"]
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            for rule in spec.get(direction, []):
                if not rule.get(peers):
                    yield f"{name}: {direction} with anyone"
                for peer in rule.get(peers, []):
                    if not peer or peer in ({"podSelector": {}}, {"namespaceSelector": {}}):
                        yield f"{name}: {direction} with anyone"
        for rule in spec.get("ingress", []):
            for peer in rule.get("from", []):
                cidr = peer.get("ipBlock", {}).get("cidr", "")
                if cidr and not cidr.endswith("/32"):
                    yield f"{name}: ingress from {cidr}"
    for service in of_kind(manifests, "Service"):
        if service["spec"].get("type", "ClusterIP") != "ClusterIP":
            yield f"Service {service['metadata']['name']} is open to the outside"
    for manifest in of_kind(manifests, "Ingress", "Gateway", "HTTPRoute"):
        yield f"{manifest['kind']} {manifest['metadata']['name']}"


def least_rights(manifests: list[Manifest]) -> Iterator[str]:
    for role in of_kind(manifests, "Role", "ClusterRole"):
        name = f"{role['kind']} {role['metadata']['name']}"
        for rule in role["rules"]:
            verbs, resources = set(rule["verbs"]), set(rule["resources"])
            if verbs & DANGEROUS_VERBS or "*" in rule["apiGroups"]:
                yield f"{name}: {rule['apiGroups']} {verbs}"
            if resources & DANGEROUS_RESOURCES:
                yield f"{name}: {resources}"
            if "secrets" in resources and (verbs != {"get"} or not rule.get("resourceNames")):
                yield f"{name}: secrets that are not named"
            if resources & WORKLOADS and verbs - {"get", "list", "watch"}:
                yield f"{name}: may change {resources & WORKLOADS}"
            if role["kind"] == "ClusterRole" and verbs - {"get", "list", "watch"}:
                yield f"{name}: changes things in the whole cluster"
    for binding in of_kind(manifests, "RoleBinding", "ClusterRoleBinding"):
        name = f"{binding['kind']} {binding['metadata']['name']}"
        if binding["roleRef"]["name"] in ("cluster-admin", "admin", "edit"):
            yield f"{name}: {binding['roleRef']['name']}"
        for subject in binding["subjects"]:
            if subject["name"] in EVERYONE | {"default"}:
                yield f"{name}: {subject['name']}"


def no_service_account_tokens(manifests: list[Manifest]) -> Iterator[str]:
    """The head of a Ray cluster apart, whose autoscaler asks the API server for workers."""
    for name, template in pods(manifests):
        head = template["metadata"]["labels"].get("ray.io/node-type") == "head"
        if not head and template["spec"].get("automountServiceAccountToken") is not False:
            yield f"{name}: has a token for the API server"
    for account in of_kind(manifests, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount {account['metadata']['name']}: mounts its token"


POLICIES: tuple[Policy, ...] = (
    restricted_pod_security,
    read_only_root,
    pinned_images,
    requests_and_limits,
    no_plain_secrets,
    default_deny,
    least_rights,
    no_service_account_tokens,
)

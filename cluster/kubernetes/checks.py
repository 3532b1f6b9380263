"""What a cluster and a namespace lack for a sweep, and what to do about each.

In: the API and the template of a RayJob. Out: findings, one after the other. Changes nothing, and
goes on where it may not look.
"""

from collections import Counter
from collections.abc import Callable, Iterator

from cluster.kubernetes.api import KubernetesApi, Refused
from cluster.kubernetes.options import GPU_PRODUCT_LABEL, GPU_RESOURCE
from cluster.kubernetes.quantities import Object, quantity
from cluster.kubernetes.rayjob import load_template, pods
from orchestrator.records import Finding

OPERATOR_LABEL = "app.kubernetes.io/name=kuberay"
# A field that came with KubeRay 1.7, the first version that this project's RayJobs are valid for.
NEW_FIELD = "preRunningDeadlineSeconds"
# Verb, API group, resource: what submitting, following and ending a sweep takes.
RIGHTS = (
    ("create", "ray.io", "rayjobs"),
    ("delete", "ray.io", "rayjobs"),
    ("patch", "ray.io", "rayjobs"),
    ("get", "ray.io", "rayclusters"),
    ("list", "", "pods"),
    ("list", "", "events"),
    ("get", "", "services/proxy"),
    ("create", "", "services/proxy"),
)


def examine_cluster(api: KubernetesApi) -> Iterator[Finding]:
    for check in CHECKS:
        try:
            yield from check(api)
        except Refused as error:  # a right that a user need not have
            yield Finding(check.__name__.strip("_").replace("_", " "), "note", str(error))


def _namespace(api: KubernetesApi) -> Iterator[Finding]:
    if api.get("Namespace", api.namespace) is None:
        yield Finding(
            "namespace", "broken", f"{api.namespace} is missing: apply an overlay of k8s/"
        )
    else:
        yield Finding("namespace", "ok", api.namespace)


def _kuberay(api: KubernetesApi) -> Iterator[Finding]:
    definition = api.get("CustomResourceDefinition", "rayjobs.ray.io")
    remedy = "install KubeRay 1.7 or newer, see k8s/README.md"
    if definition is None:
        yield Finding("KubeRay", "broken", f"RayJobs are not defined: {remedy}")
    elif not _has_field(definition, NEW_FIELD):
        yield Finding("KubeRay", "broken", f"its RayJobs have no {NEW_FIELD}: {remedy}")
    else:
        yield Finding("KubeRay", "ok", f"RayJobs are defined, with {NEW_FIELD}")


def _operator(api: KubernetesApi) -> Iterator[Finding]:
    found = api.list("Deployment", labels=OPERATOR_LABEL, everywhere=True)
    ready = [item for item in found if (item.get("status") or {}).get("readyReplicas")]
    if ready:
        image = ready[0]["spec"]["template"]["spec"]["containers"][0]["image"]
        yield Finding("operator", "ok", image)
    elif found:
        name = found[0]["metadata"]["name"]
        yield Finding("operator", "broken", f"{name} is not ready: see its pod's events and log")
    else:
        yield Finding("operator", "note", f"no Deployment has the label {OPERATOR_LABEL}")


def _rights(api: KubernetesApi) -> Iterator[Finding]:
    lacking = [
        f"{v} {resource}" for v, group, resource in RIGHTS if not api.may(v, group, resource)
    ]
    if lacking:
        text = f"you may not {', '.join(lacking)}: bind the role of k8s/base/rbac.yaml"
        yield Finding("rights", "broken", text)
    else:
        yield Finding("rights", "ok", "to submit, follow and end sweeps")


def _gpus(api: KubernetesApi) -> Iterator[Finding]:
    counted: Counter[str] = Counter()
    for node in api.list("Node"):
        count = quantity((node.get("status") or {}).get("allocatable", {}).get(GPU_RESOURCE, 0))
        label = node["metadata"].get("labels", {}).get(GPU_PRODUCT_LABEL, "without a product label")
        counted[label] += int(count)
    shown = ", ".join(f"{count} x {name}" for name, count in sorted(counted.items()) if count)
    if shown:
        yield Finding("GPUs", "ok", shown)
    else:
        text = f"no node has {GPU_RESOURCE} now: sweeps train on CPUs, or wait for new nodes"
        yield Finding("GPUs", "note", text)


def _storage(api: KubernetesApi) -> Iterator[Finding]:
    for name in sorted(_claims()):
        claim = api.get("PersistentVolumeClaim", name)
        if claim is None:
            text = f"the volume claim {name} is missing: apply k8s/base/storage.yaml"
            yield Finding("storage", "broken", text)
            continue
        phase = (claim.get("status") or {}).get("phase", "Pending")
        modes = claim["spec"].get("accessModes", [])
        if phase != "Bound":
            classes = [item["metadata"]["name"] for item in api.list("StorageClass")]
            text = f"{name} is {phase}: is one of the storage classes {classes} the right one?"
            yield Finding("storage", "note", text)
        elif "ReadWriteMany" not in modes:
            text = f"{name} is {', '.join(modes)}: pods on several nodes need ReadWriteMany"
            yield Finding("storage", "note", text)
        else:
            yield Finding("storage", "ok", f"{name} is bound, ReadWriteMany")


def _secrets(api: KubernetesApi) -> Iterator[Finding]:
    auth = load_template()["spec"]["rayClusterSpec"]["authOptions"]
    wanted = [(auth["secretName"], "auth_token", False), *sorted(_secret_keys())]
    for name, key, optional in wanted:
        secret = api.get("Secret", name)
        if secret is not None and key in secret.get("data", {}):
            yield Finding("secret", "ok", f"{name} has {key}")
        elif optional:
            yield Finding("secret", "note", f"{name} has no {key}: fine unless a sweep needs it")
        else:
            text = f"{name} has no {key}: make it as k8s/README.md says"
            yield Finding("secret", "broken", text)


def _quota(api: KubernetesApi) -> Iterator[Finding]:
    for item in api.list("ResourceQuota"):
        status = item.get("status") or {}
        hard, used = status.get("hard", {}), status.get("used", {})
        left = {name: (used.get(name, "0"), hard[name]) for name in hard}
        full = [n for n, (now, most) in left.items() if quantity(now) >= quantity(most)]
        shown = ", ".join(f"{name} {now} of {most}" for name, (now, most) in sorted(left.items()))
        yield Finding(f"quota {item['metadata']['name']}", "note" if full else "ok", shown)


def _queues(api: KubernetesApi) -> Iterator[Finding]:
    names = [item["metadata"]["name"] for item in api.list("LocalQueue")]
    yield Finding("queues", "ok", ", ".join(names) or "none: leave --queue out")


CHECKS: tuple[Callable[[KubernetesApi], Iterator[Finding]], ...] = (
    _namespace,
    _kuberay,
    _operator,
    _rights,
    _gpus,
    _storage,
    _secrets,
    _quota,
    _queues,
)


def _has_field(definition: Object, name: str) -> bool:
    versions = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schemas = [v["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"] for v in versions]
    return any(name in fields for fields in schemas)


def _claims() -> set[str]:
    volumes = [volume for pod in pods(load_template()) for volume in pod["spec"].get("volumes", [])]
    claims = [volume.get("persistentVolumeClaim") for volume in volumes]
    return {claim["claimName"] for claim in claims if claim}


def _secret_keys() -> set[tuple[str, str, bool]]:
    containers = [c for pod in pods(load_template()) for c in pod["spec"]["containers"]]
    entries = [env for container in containers for env in container.get("env", [])]
    refs = [(entry.get("valueFrom") or {}).get("secretKeyRef") for entry in entries]
    return {(ref["name"], ref["key"], bool(ref.get("optional"))) for ref in refs if ref}

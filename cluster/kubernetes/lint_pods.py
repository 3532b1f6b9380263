"""The linter's rules about pods, each a generator of (path, problem).

See linter.py. In: a pod's spec. The API server looks at a pod template only when a pod is made from
it: then the RayJob stays Initializing, and an event of the RayCluster says why.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator

from cluster.kubernetes.quantities import Object, quantity

Found = Iterator[tuple[str, str]]

PULL_POLICIES = ("Always", "IfNotPresent", "Never")
DEFAULT_SHM = "64 MB, the container runtime's"
SECRET_NAME = r"(TOKEN|PASSWORD|PASSWD|SECRET|_KEY)$"


def containers_are_given(pod: Object) -> Found:  # fails
    if not pod.get("containers"):
        yield "containers", "at least one, but got none: the first one is Ray's"


def gpu_request_is_its_limit(pod: Object) -> Found:  # hangs: FailedCreateWorkerPod
    for path, container in _containers(pod):
        resources = container.get("resources", {})
        requests, limits = resources.get("requests", {}), resources.get("limits", {})
        for name in {*requests, *limits}:
            if "/" not in name:
                continue
            request, limit = requests.get(name, limits.get(name)), limits.get(name)
            if str(request) != str(limit):
                rule = f"a request of {name} equals its limit"
                yield f"{path}.resources", f"{rule}, but got {request} and {limit}"


def requests_are_below_limits(pod: Object) -> Found:  # hangs: FailedCreateWorkerPod
    for path, container in _containers(pod):
        resources = container.get("resources", {})
        for name, limit in resources.get("limits", {}).items():
            request = resources.get("requests", {}).get(name, limit)
            if "/" not in name and quantity(request) > quantity(limit):
                rule = f"a request of {name} is at most its limit"
                yield f"{path}.resources.requests.{name}", f"{rule} {limit}, but got {request}"


def resources_are_said(pod: Object) -> Found:  # a neighbour, or the head, is ended for memory
    for path, container in _containers(pod):
        limits = container.get("resources", {}).get("limits", {})
        requests = container.get("resources", {}).get("requests", {})
        if "memory" not in limits or "cpu" not in {**limits, **requests}:
            yield f"{path}.resources", "a CPU request and a memory limit are needed: give both"


def pull_policy_exists(pod: Object) -> Found:  # hangs: FailedCreateWorkerPod
    for path, container in _containers(pod):
        policy = container.get("imagePullPolicy", "IfNotPresent")
        if policy not in PULL_POLICIES:
            rule = f"one of {', '.join(PULL_POLICIES)}"
            yield f"{path}.imagePullPolicy", f"{rule}, but got {policy!r}"


def image_is_pinned(pod: Object) -> Found:  # pods of one sweep may run different code
    for path, container in _containers(pod):
        image = container.get("image", "")
        name = image.rsplit("/", 1)[-1]
        if "@sha256:" not in image and (":" not in name or name.endswith(":latest")):
            rule = "a tag other than latest, or a digest"
            yield f"{path}.image", f"{rule}, but got {image!r}: name one with --image"


def mounts_have_their_volume(pod: Object) -> Found:  # hangs: FailedCreateWorkerPod
    volumes = {volume.get("name") for volume in pod.get("volumes", [])}
    for path, container in _containers(pod):
        for index, mount in enumerate(container.get("volumeMounts", [])):
            if mount.get("name") not in volumes:
                rule = f"a volume of the pod ({', '.join(sorted(map(str, volumes)))})"
                yield f"{path}.volumeMounts[{index}].name", f"{rule}, but got {mount.get('name')}"


def names_differ(pod: Object) -> Found:  # hangs: FailedCreateWorkerPod
    for kind in ("containers", "volumes"):
        counted = Counter(item.get("name") for item in pod.get(kind, []))
        for name, count in counted.items():
            if count > 1:
                yield kind, f"each has its own name, but {name} is there {count} times: rename one"


def mounts_have_places_of_their_own(pod: Object) -> Found:  # hangs: FailedCreateWorkerPod
    for path, container in _containers(pod):
        counted = Counter(mount.get("mountPath") for mount in container.get("volumeMounts", []))
        for place, count in counted.items():
            if count > 1:
                yield f"{path}.volumeMounts", f"{place} is mounted {count} times: leave one"


def shared_memory_is_enough(pod: Object) -> Found:  # NCCL and data loaders die with a bus error
    containers = pod.get("containers") or []
    mounts = [mount for container in containers for mount in container.get("volumeMounts", [])]
    names = [mount.get("name") for mount in mounts if mount.get("mountPath") == "/dev/shm"]
    found = [volume for volume in pod.get("volumes", []) if volume.get("name") in names]
    memory = found[0].get("emptyDir") or {} if found else {}
    if containers and memory.get("medium") != "Memory":
        yield "volumes", f"an emptyDir of medium Memory at /dev/shm, but it has {DEFAULT_SHM}"
    elif containers and "sizeLimit" not in memory:
        yield "volumes", "a sizeLimit of /dev/shm, which else takes half of the node's memory"


def shared_memory_fits(pod: Object) -> Found:  # it counts as the container's memory
    for container in (pod.get("containers") or [])[:1]:
        limit = container.get("resources", {}).get("limits", {}).get("memory")
        for volume in pod.get("volumes", []):
            memory = volume.get("emptyDir") or {}
            if memory.get("medium") == "Memory" and limit and "sizeLimit" in memory:
                size = memory["sizeLimit"]
                if quantity(size) >= quantity(limit):
                    rule = f"sizeLimit of {volume['name']} below the container's memory {limit}"
                    yield "volumes", f"{rule}, but got {size}: lower it"


def secrets_are_referred_to(pod: Object) -> Found:  # whoever may read the RayJob reads them
    for path, container in _containers(pod):
        for env in container.get("env", []):
            if re.search(SECRET_NAME, env.get("name", "")) and env.get("value"):
                rule = f"{env['name']} comes from a secret"
                yield (
                    f"{path}.env",
                    f"{rule}, but its value stands here: use valueFrom.secretKeyRef",
                )


def pods_are_restricted(pod: Object) -> Found:  # refused in a namespace that enforces `restricted`
    if not pod.get("containers"):
        return
    shared = pod.get("securityContext", {})
    seccomp = shared.get("seccompProfile", {}).get("type")
    if seccomp not in ("RuntimeDefault", "Localhost"):
        yield "securityContext.seccompProfile", f"RuntimeDefault, but got {seccomp}: set it"
    for path, container in _containers(pod):
        own = container.get("securityContext", {})
        if not own.get("runAsNonRoot", shared.get("runAsNonRoot")):
            yield f"{path}.securityContext", "runAsNonRoot: true, but it is not said: set it"
        if own.get("allowPrivilegeEscalation", True) or own.get("privileged"):
            yield f"{path}.securityContext", "allowPrivilegeEscalation: false, but not said: set it"
        if own.get("capabilities", {}).get("drop") != ["ALL"]:
            yield f"{path}.securityContext", "capabilities.drop: [ALL], but not said: set it"


def grace_is_long_enough(pod: Object) -> Found:  # a step and a checkpoint do not fit into 30 s
    grace = pod.get("terminationGracePeriodSeconds", 30)
    if pod.get("containers") and grace < 60:
        yield (
            "terminationGracePeriodSeconds",
            f"60 or more, to save what is trained, but got {grace}",
        )


def _containers(pod: Object) -> Iterator[tuple[str, Object]]:
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(pod.get(kind) or []):
            yield f"{kind}[{index}]", container


POD_RULES: tuple[Callable[[Object], Found], ...] = (
    containers_are_given,
    gpu_request_is_its_limit,
    requests_are_below_limits,
    resources_are_said,
    pull_policy_exists,
    image_is_pinned,
    mounts_have_their_volume,
    names_differ,
    mounts_have_places_of_their_own,
    shared_memory_is_enough,
    shared_memory_fits,
    secrets_are_referred_to,
    pods_are_restricted,
    grace_is_long_enough,
)

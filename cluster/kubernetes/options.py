"""What a user may ask of Kubernetes for a sweep, and what names of GPUs mean there.

In: command-line options. Out: KubernetesOptions. Imports nothing of Kubernetes.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from orchestrator.errors import ConfigError

GPU_RESOURCE = "nvidia.com/gpu"
STORAGE = "/mnt/orchestrator"
# What NVIDIA's GPU feature discovery writes on nodes, by the card's everyday name.
GPU_PRODUCT_LABEL = "nvidia.com/gpu.product"
GPU_PRODUCTS: dict[str, tuple[str, ...]] = {
    "a10": ("NVIDIA-A10", "NVIDIA-A10G"),
    "a100-40gb": ("NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-PCIE-40GB"),
    "a100-80gb": ("NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-80GB-PCIe"),
    "b200": ("NVIDIA-B200",),
    "h100": ("NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-PCIe", "NVIDIA-H100-NVL"),
    "h200": ("NVIDIA-H200", "NVIDIA-H200-NVL"),
    "l4": ("NVIDIA-L4",),
    "l40s": ("NVIDIA-L40S",),
    "t4": ("Tesla-T4",),
    "v100": ("Tesla-V100-SXM2-16GB", "Tesla-V100-SXM2-32GB", "Tesla-V100-PCIE-16GB"),
}


@dataclass(frozen=True)
class NodeLabels:
    """Labels of which a node must have one."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class KubernetesOptions:
    namespace: str | None = None
    """None: the kubeconfig's."""
    gpus: int = 0
    """Of the whole sweep; 0 trains on CPUs."""
    gpus_per_node: int = 1
    nodes: int = 1
    """Worker pods of a sweep without GPUs; with GPUs it follows from them."""
    cpus_per_node: int = 0
    """0: 8 per GPU, or 4 without GPUs."""
    memory_gib_per_node: int = 0
    """0: 64 per GPU, or 16 without GPUs."""
    gpu_type: str | None = None
    """A name of GPU_PRODUCTS, a product label's value, or LABEL=VALUE."""
    capacity: Literal["on-demand", "spot", "spot-first"] = "on-demand"
    queue: str | None = None
    priority: str | None = None
    image: str | None = None
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] | None = None
    max_runtime_s: int = 86_400
    max_wait_s: int = 1_800
    retries: int = 0
    keep_failed_s: int = 0
    """How long the cluster of a sweep that failed stays, for a look."""
    template: Path | None = None

    @property
    def num_nodes(self) -> int:
        return self.gpus // self.gpus_per_node if self.gpus else self.nodes

    @property
    def cpus(self) -> int:
        return self.cpus_per_node or (8 * self.gpus_per_node if self.gpus else 4)

    @property
    def memory_gib(self) -> int:
        return self.memory_gib_per_node or (64 * self.gpus_per_node if self.gpus else 16)


def shape(options: KubernetesOptions) -> str:
    """What a sweep takes of the cluster, in words."""
    card = f" ({options.gpu_type})" if options.gpu_type else ""
    gpus = f"{options.gpus_per_node} GPU{card}, " if options.gpus else ""
    size = f"{gpus}{options.cpus} CPU cores and {options.memory_gib} GiB"
    place = f", in the queue {options.queue}" if options.queue else ""
    pods = "1 pod" if options.num_nodes == 1 else f"{options.num_nodes} pods"
    return f"a head and {pods} of {size}{place}"


def check_options(options: KubernetesOptions) -> KubernetesOptions:
    """With one GPU or all that are asked for in a pod, whichever is possible.

    Raises:
        ConfigError: with the rule, the value and the remedy.
    """
    if options.gpus and options.gpus % options.gpus_per_node:
        raise ConfigError(
            f"--gpus must be a multiple of --gpus-per-node, but got {options.gpus} and "
            f"{options.gpus_per_node}"
        )
    if options.gpus_per_node != 1 and not options.gpus:
        raise ConfigError(
            f"--gpus-per-node {options.gpus_per_node} needs --gpus, the number of GPUs in all"
        )
    if options.nodes != 1 and options.gpus:
        raise ConfigError(
            f"--nodes is of sweeps without GPUs: with --gpus {options.gpus} there are as many as "
            f"hold them, but got --nodes {options.nodes}: give --gpus-per-node instead"
        )
    if options.gpu_type and not options.gpus:
        raise ConfigError(f"--gpu-type {options.gpu_type} needs --gpus, the number of GPUs")
    if options.priority and not options.queue:
        raise ConfigError(f"--priority {options.priority} needs --queue: Kueue orders its queues")
    if options.queue and options.capacity == "spot-first":
        raise ConfigError(
            "--capacity spot-first needs the autoscaler, which a job of a queue does not have: "
            "use spot or on-demand, or leave --queue out"
        )
    if options.queue and options.keep_failed_s:
        raise ConfigError(
            "--keep-failed holds what a job of a queue must give back: leave --queue or "
            "--keep-failed out"
        )
    if options.image is not None:
        check_image(options.image)
    gpu_labels(options.gpu_type)
    return replace(options)


def check_image(image: str) -> None:
    name = image.rsplit("/", 1)[-1]
    if "@sha256:" not in image and (":" not in name or name.endswith(":latest")):
        raise ConfigError(
            f"--image needs a tag other than latest, or a digest, so that all pods run the same, "
            f"but got {image}"
        )


def gpu_labels(gpu_type: str | None) -> NodeLabels | None:
    """Raises ConfigError if the name is no card's and no label's."""
    if gpu_type is None:
        return None
    key, equals, value = gpu_type.partition("=")
    if equals:
        return NodeLabels(key, (value,))
    if products := GPU_PRODUCTS.get(gpu_type.lower()):
        return NodeLabels(GPU_PRODUCT_LABEL, products)
    if re.match(r"(NVIDIA|Tesla|Quadro|GeForce)-", gpu_type):
        return NodeLabels(GPU_PRODUCT_LABEL, (gpu_type,))
    raise ConfigError(
        f"--gpu-type must be one of {', '.join(GPU_PRODUCTS)}, a value of the node label "
        f"{GPU_PRODUCT_LABEL}, or LABEL=VALUE, but got {gpu_type}"
    )

"""Workers of several kinds: what is known of GPUs by name, and which of them a sweep uses."""

import pytest

from orchestrator.config import ResourcesConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.capacity import Node
from orchestrator.planning.gpus import GPUS, find_gpu, parse_gpus, relative_speed
from orchestrator.planning.kinds import WorkerKind, worker_kinds
from orchestrator.planning.memory import GIB


@pytest.mark.parametrize(
    ("written", "known"),
    [
        ("H100", "H100"),
        ("H100-80GB", "H100"),
        ("NVIDIA-L40S", "L40S"),
        ("a100", "A100"),
        ("A100-80GB", "A100-80G"),
        ("A100-80G", "A100-80G"),
        ("A100-40G", "A100"),
        ("L4", "L4"),
        ("Tesla T4", "T4"),
        ("A100-80", "A100-80G"),
        ("A100-SXM4-80GB", "A100-80G"),
        ("NVIDIA A100-SXM4-80GB", "A100-80G"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100-80G"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("H100-NVL-94GB", "H100-NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200"),
        ("H200-141GB", "H200"),
        ("Tesla V100-SXM2-16GB", "V100-16G"),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("L4-24GB", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
    ],
)
def test_a_gpu_is_known_by_the_names_that_people_and_ray_use(written: str, known: str) -> None:
    assert find_gpu(written) is GPUS[known]


def test_gpus_are_written_as_numbers_and_names() -> None:
    found = parse_gpus("8xH100-80GB, 4 x L40S")
    assert [(count, name) for count, name, _ in found] == [(8, "H100-80GB"), (4, "L40S")]
    assert [count for count, _, _ in parse_gpus("H200")] == [1]


@pytest.mark.parametrize(
    "written",
    ["8xH1000", "0xH100", "eight H100", "", "8x", "8xH100-800GB", "8xL4-48GB", "8xA100-60"],
)
def test_gpus_that_are_not_known_are_refused_with_those_that_are(written: str) -> None:
    with pytest.raises(ConfigError, match="known: H200, H100"):
        parse_gpus(written)


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA GH200 480GB", ""])
def test_what_the_driver_reports_and_nobody_knows_has_no_estimate(name: str) -> None:
    assert find_gpu(name) is None
    assert relative_speed(name) == 1.0


NODES = [
    Node(16, 2, 40 * GIB, gpu_kind="A100"),
    Node(16, 4, 80 * GIB, gpu_kind="H100"),
    Node(16, 1, 79 * GIB, gpu_kind="H100"),
    Node(64, 0),
]


def test_the_fastest_kind_is_used_first_with_the_memory_of_its_least_gpu() -> None:
    assert worker_kinds(ResourcesConfig(), NODES, 7) == (
        WorkerKind("H100", 5, 79 * GIB, 1.0),
        WorkerKind("A100", 2, 40 * GIB, relative_speed("A100")),
    )
    assert [kind.count for kind in worker_kinds(ResourcesConfig(), NODES, 6)] == [5, 1]
    assert [kind.name for kind in worker_kinds(ResourcesConfig(), NODES, 5)] == ["H100"]


def test_gpus_that_are_all_alike_are_no_kinds() -> None:
    assert worker_kinds(ResourcesConfig(), NODES[1:], 5) == ()

"""Rules for trials; how many workers fit the machines, and what a machine has."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from orchestrator.config import ResourcesConfig
from orchestrator.errors import ConfigError
from orchestrator.planning import machine
from orchestrator.planning.capacity import (
    Node,
    host_memory_bytes,
    worker_count,
    worker_memory_bytes,
)
from orchestrator.planning.compatibility import RULED_FIELDS, problems
from tests.sweeps import sweep_config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trial__batch_size": 8, "trial__micro_batch_size": 3}, "micro_batch_size=3"),
        ({"trial__schedule__warmup_steps": 6}, "less than steps"),
        (
            {"trial__quant__bit_width": 8, "trial__quant__quant_type": "fp4"},
            "quant.quant_type=fp4, quant.bit_width=8",
        ),
        ({"trial__strategy__kind": "zero"}, "needs strategy.stage"),
        ({"trial__strategy__offload_optimizer": "cpu"}, "need strategy.kind: zero"),
        (
            {
                "trial__strategy__kind": "zero",
                "trial__strategy__stage": 2,
                "trial__strategy__offload_params": "cpu",
            },
            "needs strategy.stage: 3",
        ),
        (
            {
                "trial__quant__bit_width": 8,
                "trial__strategy__kind": "zero",
                "trial__strategy__stage": 3,
                "trial__strategy__offload_params": "cpu",
            },
            "cannot move the weights of quant.bit_width: 8",
        ),
        ({"trial__quant__compute_dtype": "float64"}, "needs quant.bit_width: 16"),
    ],
)
def test_what_cannot_work_is_refused_with_both_fields(changes: dict[str, Any], words: str) -> None:
    (problem,) = problems(sweep_config(**changes).trial)
    assert words in problem


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trial__batch_size": 6}, "workers_per_pack=4, micro_batch_size=None, batch_size=6"),
        ({"trial__micro_batch_size": 4}, "workers_per_pack=4, micro_batch_size=4, batch_size=8"),
    ],
)
def test_workers_that_cannot_share_a_step_evenly_are_refused(
    changes: dict[str, Any], words: str
) -> None:
    trial = sweep_config(**changes).trial
    assert problems(trial) == []
    (problem,) = problems(trial, workers_per_pack=4)
    assert words in problem


def test_the_default_trial_has_no_problem() -> None:
    assert problems(sweep_config().trial) == []


class Spy:
    """Stands before a trial and notes the dotted fields that are read."""

    def __init__(self, target: Any, read: set[str], prefix: str = "") -> None:
        self._target, self._read, self._prefix = target, read, prefix

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if isinstance(value, BaseModel):
            return Spy(value, self._read, f"{self._prefix}{name}.")
        self._read.add(self._prefix + name)
        return value


def test_the_rules_read_no_field_beyond_those_that_they_name() -> None:
    read: set[str] = set()
    for kind in ("replicated", "zero"):
        for bits in (4, 8, 16):
            strategy = {"kind": kind, "stage": 2, "offload_params": "cpu"}
            changes = {"trial__strategy": strategy, "trial__micro_batch_size": 1}
            trial = sweep_config(trial__quant__bit_width=bits, **changes).trial
            problems(Spy(trial, read))  # type: ignore[arg-type]
    assert {"quant.bit_width", "steps", "strategy.offload_params"} <= read
    assert all(field.startswith(RULED_FIELDS) for field in read), read


def resources(**fields: Any) -> ResourcesConfig:
    return ResourcesConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "device", "nodes", "count"),
    [
        ({}, "cpu", [Node(2, 0)], 2),
        ({"cpus_per_worker": 3}, "cpu", [Node(4, 0), Node(8, 0)], 3),
        ({}, "cuda", [Node(16, 2), Node(1, 8), Node(16, 0)], 3),
        ({"num_workers": 2}, "cpu", [Node(4, 0)], 2),
    ],
)
def test_workers_are_counted_node_by_node(
    fields: dict[str, Any], device: str, nodes: list[Node], count: int
) -> None:
    assert worker_count(resources(**fields), device, nodes) == count


@pytest.mark.parametrize(
    ("fields", "device", "nodes", "words"),
    [
        (
            {"num_workers": 3, "cpus_per_worker": 3},
            "cpu",
            [Node(4, 0), Node(4, 0)],
            "3 workers of 3 CPU cores do not fit 2 nodes of 4 CPU cores: 2 fit: lower "
            "num_workers or cpus_per_worker",
        ),
        (
            {"num_workers": 3},
            "cuda",
            [Node(8, 2)],
            "1 CPU core and 1 GPU do not fit 1 node of 8 CPU cores and 2 GPUs: 2 fit",
        ),
        (
            {"cpus_per_worker": 8},
            "cpu",
            [Node(4, 0), Node(4, 0)],
            "no worker of 8 CPU cores fits 2 nodes of 4 CPU cores: lower cpus_per_worker=8",
        ),
        ({}, "cpu", [Node(0, 0)], "give Ray CPU cores"),
        ({"workers_per_pack": 3}, "cpu", [Node(2, 0)], "there are 2: set it to 2 or less"),
        ({}, "cuda", [Node(4, 0)], "there is no GPU"),
    ],
)
def test_workers_that_do_not_fit_are_refused_with_the_remedy(
    fields: dict[str, Any], device: str, nodes: list[Node], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        worker_count(resources(**fields), device, nodes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 4), ("", 0), ("-1", 0), ("2", 1), ("0,3", 2), ("0,1,2,3,4", 4)]
)
def test_only_gpus_that_this_process_may_see_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int
) -> None:
    for number in range(4):
        (tmp_path / f"0000:{number}").mkdir()
    monkeypatch.setattr(machine, "NVIDIA_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.this_machine().num_gpus == count


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "350000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_only_cpus_that_this_process_may_use_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], count: int
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.this_machine().num_cpus == count


@pytest.mark.parametrize(
    ("fields", "device", "nodes", "num_workers", "num_bytes"),
    [
        ({}, "cuda", [Node(8, 2, 80, 500), Node(8, 1, 40, 500)], 3, 40),
        ({}, "cuda", [Node(8, 2, 80, 500), Node(8, 0, 0, 500)], 2, 80),
        ({}, "cuda", [Node(8, 2, 80, 500), Node(8, 1)], 3, 0),
        ({}, "cpu", [Node(4, 0, 0, 400)], 4, 100),
        ({}, "cpu", [Node(4, 0, 0, 400)], 2, 200),
        ({"cpus_per_worker": 2}, "cpu", [Node(4, 0, 0, 400), Node(1, 0, 0, 7)], 2, 200),
    ],
)
def test_a_worker_has_the_memory_of_the_least_gpu_or_its_part_of_a_node(
    fields: dict[str, Any], device: str, nodes: list[Node], num_workers: int, num_bytes: int
) -> None:
    assert worker_memory_bytes(resources(**fields), device, nodes, num_workers) == num_bytes


def test_gpu_workers_share_their_nodes_own_memory() -> None:
    nodes = [Node(8, 2, 80, 500), Node(8, 4, 80, 600), Node(8, 0, 0, 7)]
    assert host_memory_bytes(resources(), nodes, 6) == 150
    assert host_memory_bytes(resources(), nodes, 1) == 500
    assert host_memory_bytes(resources(), [*nodes, Node(8, 1, 80)], 7) == 0
    assert host_memory_bytes(resources(), nodes[2:], 1) == 0


@pytest.mark.parametrize(
    ("files", "least"),
    [
        ({}, None),
        ({"memory.max": "max"}, None),
        ({"memory.max": "1048576"}, 1048576),
        ({"memory/memory.limit_in_bytes": "2097152"}, 2097152),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
    ],
)
def test_a_container_has_the_memory_that_its_limit_says(
    tmp_path: Path, files: dict[str, str], least: int | None
) -> None:
    whole = machine.memory_bytes(tmp_path / "none")
    assert whole > 2**28
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert machine.memory_bytes(tmp_path) == (least or whole)


class StandInNvml:
    """pynvml's functions, over GPUs of 80, 40 and 16 bytes."""

    sizes = (80, 40, 16)
    names = ("NVIDIA H200", "NVIDIA H200", "NVIDIA H200 MIG 1g.18gb")

    def __init__(self) -> None:
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.sizes)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return ("GPU-a", "GPU-b", "MIG-c").index(uuid)

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.names[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=self.sizes[handle])


@pytest.mark.parametrize(
    ("visible", "least", "name"),
    [
        (None, 16, ""),
        (["1", "0"], 40, "NVIDIA H200"),
        (["GPU-a", "MIG-c"], 16, ""),
        ([], 0, ""),
    ],
)
def test_the_least_memory_of_the_visible_gpus_counts_and_the_name_that_all_have(
    visible: list[str] | None, least: int, name: str
) -> None:
    nvml = StandInNvml()
    assert machine.ask_gpus(nvml, visible) == (least, name)
    assert nvml.open == 0

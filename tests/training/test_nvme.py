"""A trial whose optimizer and base DeepSpeed swaps to a disk is the replicated one.

DeepSpeed swaps what has a mebibyte or more, so base and adapters are wider here than elsewhere.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import QuantConfig, TrialConfig
from orchestrator.records import BaseModel, Checkpointed, Leave, PackSpec, TrialDone
from orchestrator.tracking.adapter_model import base_digest
from orchestrator.training.pack import PackWorker
from orchestrator.training.zero import ZeroEngine
from tests.tiny import make_base_model
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_pack import assert_equal, task, train
from tests.training.test_zero import train_until

pytestmark = [
    pytest.mark.slow,  # compiling async_io takes minutes where the cache does not hold it
    pytest.mark.filterwarnings("ignore:`torch.distributed"),
    pytest.mark.usefixtures("async_io"),
]

NVME_STRATEGIES: dict[str, dict[str, Any]] = {
    "optimizer on NVMe": {"offload_optimizer": "nvme"},
    "optimizer on NVMe, parameters on the CPU": {
        "offload_optimizer": "nvme",
        "offload_params": "cpu",
    },
    "parameters on NVMe": {"offload_params": "nvme"},
    "all on NVMe": {"offload_optimizer": "nvme", "offload_params": "nvme"},
}
# A fifth of the row is beyond one group of what is swapped together.
MAX_RANK = 320
# torch's norm of ten million fp32 values on a CPU, which clips a replicated trial, is off by 3e-4.
TOLERANCE = 2e-5

MakeSwapped = Callable[..., tuple[PackSpec, PackSpec]]


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base_model(tmp_path_factory.mktemp("wide"), hidden_size=1024)


@pytest.fixture
def specs(make_spec: MakeSpec, wide_base: Path, tmp_path: Path) -> MakeSwapped:
    """A replicated pack, and the same under ZeRO-3 with a strategy of these."""

    def make(name: str, **changes: Any) -> tuple[PackSpec, PackSpec]:
        spec = wide_spec(make_spec, wide_base, **changes)
        return spec, swapped(spec, name, tmp_path / "nvme")

    return make


def wide_spec(make_spec: MakeSpec, base: Path, **changes: Any) -> PackSpec:
    spec = make_spec(num_slots=1, max_rank=MAX_RANK, **changes)
    return replace(spec, base_model=BaseModel("wide", None, str(base), base_digest(base)))


def swapped(spec: PackSpec, name: str, folder: Path) -> PackSpec:
    strategy = {"kind": "zero", "stage": 3, **NVME_STRATEGIES[name], "nvme_path": str(folder)}
    return replace(spec, strategy=strategy)


def wide_trial(**changes: Any) -> TrialConfig:
    """With a large eps Adam does not turn the rounding of near-zero gradients into whole steps."""
    fields = {"adapter__rank": MAX_RANK, "optimizer__eps": 1e-3}
    return trial_config(**fields | changes)


def swapped_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.swp"))


@pytest.mark.parametrize("bit_width", [4, 16])
@pytest.mark.parametrize("name", NVME_STRATEGIES)
def test_trials_one_after_another_on_nvme_end_as_replicated_ones_do(
    specs: MakeSwapped, tmp_path: Path, name: str, bit_width: int
) -> None:
    trials = [
        wide_trial(optimizer__weight_decay=0.1, optimizer__max_grad_norm=0.05, steps=4),
        wide_trial(
            adapter__rank=8,
            adapter__alpha=0.2,  # scaled as the other: gradients as small beside eps
            seed=2,
            batch_size=4,
            micro_batch_size=2,
            steps=3,
        ),
    ]
    plain, on_nvme = specs(name, bit_width=bit_width)
    replicated, _ = train(plain, trials, tmp_path / "one")
    zero, _ = train(on_nvme, trials, tmp_path / "other")
    for number in range(len(trials)):
        assert_equal(zero[number], replicated[number], TOLERANCE)


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("all on NVMe", {"bit_width": 4, "double_quant": False}),
        ("all on NVMe", {"bit_width": 4, "quant_type": "fp4"}),
        ("optimizer on NVMe", {"bit_width": 8}),
    ],
)
def test_every_kind_of_base_trains_on_nvme(
    specs: MakeSwapped, tmp_path: Path, name: str, quant: dict[str, Any]
) -> None:
    config = QuantConfig.model_validate(quant | {"compute_dtype": "float32"}).model_dump()
    plain, on_nvme = specs(name, quant=config)
    replicated, _ = train(plain, [wide_trial(steps=3)], tmp_path / "one")
    zero, _ = train(on_nvme, [wide_trial(steps=3)], tmp_path / "other")
    assert_equal(zero[0], replicated[0], TOLERANCE)


@pytest.mark.parametrize("bit_width", [4, 16])
def test_a_bfloat16_base_on_nvme_trains_to_the_bits_of_one_on_the_host(
    specs: MakeSwapped, tmp_path: Path, bit_width: int
) -> None:
    quant = QuantConfig.model_validate({"bit_width": bit_width, "compute_dtype": "bfloat16"})
    _, spec = specs("all on NVMe", quant=quant.model_dump())
    host = {"kind": "zero", "stage": 3, "offload_optimizer": "cpu", "offload_params": "cpu"}
    trials = [wide_trial(optimizer__max_grad_norm=None, steps=3)]
    on_nvme, _ = train(spec, trials, tmp_path / "one")
    on_host, _ = train(replace(spec, strategy=host), trials, tmp_path / "other")
    assert_equal(on_nvme[0], on_host[0], tolerance=0)


@pytest.mark.parametrize("optimizer", ["adamw", "deepspeed_cpu_adam"])
@pytest.mark.parametrize("name", ["optimizer on NVMe", "all on NVMe"])
def test_a_trial_resumed_from_nvme_ends_with_the_same_adapter_bytes(
    specs: MakeSwapped, tmp_path: Path, name: str, optimizer: str
) -> None:
    config = wide_trial(optimizer__name=optimizer, adapter__dropout=0.1)
    _, spec = specs(name, bit_width=4, dropout=True)
    _, events = train(spec, [config], tmp_path / "whole")
    (undisturbed,) = [event for event in events if isinstance(event, TrialDone)]

    worker = PackWorker(spec)
    worker.load()
    # Another trial went through the slot before, and its states lie in the files.
    other = wide_trial(seed=5, steps=2)
    train_until(worker, TrialDone, [task(1, other, tmp_path / "cut")])
    train_until(worker, Checkpointed, [task(0, config, tmp_path / "cut")])
    del worker  # killed: what is on disk is all there is

    worker = PackWorker(spec)
    worker.load()
    train_until(worker, TrialDone, [task(1, other, tmp_path / "cut", attempt=2)])
    events = train_until(worker, TrialDone, [task(0, config, tmp_path / "cut", attempt=2)])
    (resumed,) = [event for event in events if isinstance(event, TrialDone)]
    assert resumed.adapter_digest == undisturbed.adapter_digest


def test_what_nvme_holds_is_not_in_memory_and_goes_with_the_pack(
    specs: MakeSwapped, tmp_path: Path
) -> None:
    _, spec = specs("all on NVMe", bit_width=16)
    worker = PackWorker(spec)
    worker.load()
    worker.advance([task(0, wide_trial(steps=100), tmp_path)])
    assert isinstance(worker.engine, ZeroEngine)
    partitions = worker.engine._partitions.tensors
    assert len(partitions) == 2
    assert all(partition.numel() == 0 for partition in partitions)
    base = worker.base.num_params
    adapter = worker.rows.rows.numel()
    assert swapped_bytes(tmp_path / "nvme") > 4 * (0.8 * base + 3 * adapter)
    worker.advance([Leave(save=False)])
    assert [path.name for path in (tmp_path / "nvme").iterdir()] == ["folders.lock"]

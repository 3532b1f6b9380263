from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from orchestrator.config import ResourcesConfig
from orchestrator.errors import ConfigError
from orchestrator.planning import machine
from orchestrator.planning.capacity import Node, worker_count
from orchestrator.planning.compatibility import RULED_FIELDS, problems
from orchestrator.planning.packs import PackKey, pack_key, plan_pack, preview_packs
from orchestrator.records import TrialSpec
from orchestrator.sweep.policy import (
    AbandonPack,
    AssignTrial,
    PackView,
    ReleasePack,
    StartPack,
    SweepView,
    decide,
)
from tests.sweeps import sweep_config


def trials(*bit_widths: int, **changes: Any) -> list[TrialSpec]:
    return [
        TrialSpec(n, {}, sweep_config(trial__quant__bit_width=bits, **changes).trial)
        for n, bits in enumerate(bit_widths)
    ]


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
    ],
)
def test_what_cannot_work_is_refused_with_both_fields(changes: dict[str, Any], words: str) -> None:
    (problem,) = problems(sweep_config(**changes).trial)
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


def test_trials_share_a_pack_if_they_share_base_and_program() -> None:
    one, other = trials(4, 4)
    assert pack_key(one.config) == pack_key(other.config)
    (wide,) = trials(16)
    assert pack_key(one.config) != pack_key(wide.config)


def test_two_bases_on_two_workers_get_one_pack_each() -> None:
    packs = preview_packs(trials(4, 4, 16, 16), num_workers=2, slots_per_pack=None)
    assert [[trial.number for trial in members] for _, members in packs] == [[0, 1], [2, 3]]


def test_one_base_on_two_workers_is_loaded_by_both() -> None:
    packs = preview_packs(trials(4, 4, 4, 4), num_workers=2, slots_per_pack=None)
    assert [[trial.number for trial in members] for _, members in packs] == [[0, 1], [2, 3]]


def test_the_user_decides_the_number_of_slots() -> None:
    packs = preview_packs(trials(4, 4, 4, 4), num_workers=1, slots_per_pack=3)
    assert [plan.num_slots for plan, _ in packs] == [3]


@pytest.mark.parametrize(
    "changes",
    [
        {"trial__strategy__kind": "zero", "trial__strategy__stage": 2},
        {"trial__quant__bit_width": 8},
    ],
)
def test_what_slots_cannot_share_runs_alone_and_the_plan_says_why(changes: dict[str, Any]) -> None:
    alone = [TrialSpec(n, {}, sweep_config(**changes).trial) for n in range(2)]
    ((plan, members), *_) = preview_packs(alone, num_workers=1, slots_per_pack=4)
    assert plan.num_slots == len(members) == 1
    assert "alone" in plan.reason


def test_nothing_is_planned_without_waiting_trials_or_free_workers() -> None:
    (trial,) = trials(4)
    key = pack_key(trial.config)
    assert plan_pack({key: []}, {}, 1, None) is None
    assert plan_pack({key: [trial]}, {}, 0, None) is None


def view(waiting: list[TrialSpec], *packs: PackView, **changes: Any) -> SweepView:
    return SweepView(tuple(waiting), packs, 2, None, **changes)


def pack(key: PackKey, occupied: int, ready: bool = True, idle: bool = True) -> PackView:
    return PackView(0, key, 2, occupied, ready, idle)


def test_a_waiting_trial_goes_into_a_free_slot_before_a_new_pack_is_started() -> None:
    (trial,) = trials(4)
    actions = decide(view([trial], pack(pack_key(trial.config), occupied=1)))
    assert actions == [AssignTrial(0, 0)]


def test_trials_that_a_loading_pack_will_take_start_no_second_pack() -> None:
    waiting = trials(4, 4)
    loading = pack(pack_key(waiting[0].config), occupied=0, ready=False, idle=False)
    assert decide(view(waiting, loading)) == []


def test_an_empty_pack_is_released_and_its_worker_starts_another_base() -> None:
    four, sixteen = trials(4, 16)
    empty = pack(pack_key(four.config), occupied=0)
    assert decide(view([], empty)) == [ReleasePack(0, save=False)]
    first, second = decide(view([sixteen], empty))
    assert first == ReleasePack(0, save=False)
    assert isinstance(second, StartPack)


def test_an_interrupt_saves_packs_that_train_and_abandons_those_that_load() -> None:
    (trial,) = trials(4)
    key = pack_key(trial.config)
    assert decide(view([trial], pack(key, 1), interrupted=True)) == [ReleasePack(0, save=True)]
    assert decide(view([trial], pack(key, 1, idle=False), interrupted=True)) == []
    loading = pack(key, 0, ready=False, idle=False)
    assert decide(view([trial], loading, interrupted=True)) == [AbandonPack(0)]

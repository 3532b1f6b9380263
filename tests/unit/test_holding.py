"""Packs go to kinds of workers that hold them, and trials that none holds are refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.dry_run import show_plan
from jobs.plan import show
from orchestrator.config import SweepConfig
from orchestrator.errors import ConfigError
from orchestrator.loading import override_config
from orchestrator.planning.capacity import Node
from orchestrator.planning.gpus import GPUS
from orchestrator.planning.holding import takers, why_too_large
from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.memory import GIB
from orchestrator.planning.packs import PackPlan, one_kind, preview_packs
from orchestrator.planning.shape import BaseShape, UnknownShape
from orchestrator.planning.waiting import pack_key
from orchestrator.records import Checkpointed, Notice, PackSpec, TrialResult, TrialSpec
from orchestrator.search.space import next_trial
from orchestrator.sweep.admission import Admission
from orchestrator.sweep.controller import Controller, Observer
from orchestrator.sweep.executor import InProcessExecutor
from orchestrator.sweep.forecast import forecast
from orchestrator.sweep.lessons import heeding
from orchestrator.sweep.run_store import RunStore
from orchestrator.sweep.simulated import SimulatedWorker
from tests.sweeps import (
    LLAMA_8B,
    llama_shape,
    make_controller,
    make_store,
    pack_spec,
    premises,
    sweep_config,
)
from tests.unit.test_memory_plan import sweep_file

__all__ = ["sweep_file"]  # a fixture

LLAMA_70B = llama_shape(80, 8192, 28672, 64, 8, 128_256)
QWEN_32B = llama_shape(64, 5120, 27648, 40, 8, 152_064)
UNKNOWN = UnknownShape("a mixture of experts")
H100 = WorkerKind("H100", 1, GPUS["H100"].memory_bytes, 1.0)
L40S = WorkerKind("L40S", 1, GPUS["L40S"].memory_bytes, 0.4)
A100 = WorkerKind("A100-80G", 1, GPUS["A100-80G"].memory_bytes, 0.3)
SMALL_BATCH = {"trial__batch_size": 4, "data": {"train": "x", "block_length": 1024}}


class OutOfMemoryError(Exception):
    pass


def run(
    folder: Path,
    kinds: tuple[WorkerKind, ...],
    shape: BaseShape | UnknownShape,
    runs_out: frozenset[tuple[str, str]],
    **changes: Any,
) -> tuple[RunStore, list[PackPlan]]:
    """A sweep whose packs of the given bases run out of memory on the given kinds."""
    config = sweep_config(**changes)
    store = make_store(folder, config)
    plans: dict[int, PackPlan] = {}

    class Worker(SimulatedWorker):
        def load(self) -> Any:
            plan = plans[self._spec.pack]
            if (plan.kind.name, plan.key.title) in runs_out:
                raise OutOfMemoryError("tried to allocate 1 GiB")
            return super().load()

    def ask(known: list[TrialSpec], results: list[TrialResult]) -> TrialSpec | None:
        return next_trial(config, known, results, 8)

    def build_pack(number: int, plan: PackPlan) -> PackSpec:
        plans[number] = plan
        return pack_spec(number, plan)

    given = premises(config, "cuda", shape, min(kind.memory_bytes for kind in kinds))
    executor = InProcessExecutor(Worker)
    workers = sum(kind.count for kind in kinds)
    controller = Controller(store, executor, ask, build_pack, workers, given, kinds=kinds)
    assert controller.run()
    return store, list(plans.values())


def states(store: RunStore) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for result in store.results:
        found.setdefault(result.state, []).append(result.number)
    return found


@pytest.mark.parametrize("kinds", [(H100, L40S), (L40S, A100)])
def test_a_base_that_one_kind_alone_holds_waits_for_it_whether_it_is_faster_or_slower(
    kinds: tuple[WorkerKind, ...], tmp_path: Path
) -> None:
    bare = frozenset({("L40S", "16-bit")})
    store, plans = run(tmp_path / "run", kinds, QWEN_32B, bare, **SMALL_BATCH)
    assert states(store) == {"finished": [0, 1, 2, 3]}
    assert all(plan.fit.fits for plan in plans)
    assert {plan.kind.name for plan in plans if plan.key.title == "16-bit"} <= {"H100", "A100-80G"}


def test_a_base_without_an_estimate_is_tried_and_then_goes_where_there_is_more_memory(
    tmp_path: Path,
) -> None:
    bare = frozenset({("L40S", "16-bit")})
    slow = replace(H100, speed=0.1)
    store, plans = run(tmp_path / "run", (L40S, slow), UNKNOWN, bare)
    assert states(store) == {"finished": [0, 1, 2, 3]}
    tried = [plan for plan in plans if (plan.kind.name, plan.key.title) == ("L40S", "16-bit")]
    assert 1 <= len(tried) <= 3, "with fewer slots each time, and then no more"
    reasons = [d["reason"] for d in store.decisions if d["action"] == "plan_less_memory"]
    assert reasons[-1] == "16-bit runs out of the memory of L40S: only on H100"
    again = heeding(premises(store.sweep.config, "cuda", UNKNOWN, GIB), store.decisions)
    waiting = [trial for trial in store.trials if trial.config.quant.bit_width == 16]
    packs = preview_packs(waiting, 2, again, kinds=(L40S, slow))
    assert {plan.kind.name for plan, _ in packs} == {"H100"}, "a resume remembers it"


def test_what_runs_out_of_the_largest_memory_too_fails(tmp_path: Path) -> None:
    bare = frozenset({("L40S", "16-bit"), ("H100", "16-bit")})
    store, _ = run(tmp_path / "run", (H100, L40S), UNKNOWN, bare)
    assert states(store) == {"finished": [0, 1], "failed": [2, 3]}
    reasons = {result.reason for result in store.results if result.state == "failed"}
    assert reasons == {"out_of_memory"}


def test_trials_that_no_kind_holds_are_refused_before_a_worker_is_taken(tmp_path: Path) -> None:
    store, plans = run(tmp_path / "run", (L40S,), QWEN_32B, frozenset(), **SMALL_BATCH)
    assert states(store) == {"finished": [0, 1], "failed": [2, 3]}
    assert {plan.key.title for plan in plans} == {"4-bit nf4"}
    failed = store.results[-1]
    assert (failed.reason, failed.attempt) == ("out_of_memory", 0)
    assert "does not fit: 16-bit takes at least" in failed.message
    assert "44.5 GiB of each L40S: lower quant.bit_width" in failed.message


def test_what_may_fit_if_the_estimate_is_a_little_high_is_tried() -> None:
    config = sweep_config(trial__quant={"bit_width": 16}, search={}, **SMALL_BATCH)
    trial = TrialSpec(0, {}, config.trial)
    given = premises(config, "cuda", QWEN_32B, GIB)
    ((least, _),) = preview_packs([trial], 1, given, kinds=(L40S,))
    assert least.fit.memory is not None
    needed = least.fit.memory.total_bytes
    for part, refused in ((0.95, False), (1.05, True)):
        kind = replace(L40S, memory_bytes=int(needed / part))
        assert bool(why_too_large(config.trial, (kind,), given)) == refused


@pytest.mark.parametrize(
    ("count", "workers_per_pack", "refused"),
    [(1, None, True), (4, None, False), (4, 1, True), (4, 4, False), (3, None, False)],
)
def test_a_trial_under_zero_is_refused_only_if_no_pack_that_it_may_have_holds_it(
    count: int, workers_per_pack: int | None, refused: bool
) -> None:
    config = sweep_config(
        trial__strategy={"kind": "zero", "stage": 2},
        trial__adapter__rank=128,
        resources={"workers_per_pack": workers_per_pack},
        search={},
        **SMALL_BATCH,
    )
    given = premises(config, "cuda", QWEN_32B, GIB)
    why = why_too_large(config.trial, (replace(L40S, count=count),), given)
    assert bool(why) == refused
    assert "share it among workers" not in why  # who are not there, or not wanted


def test_what_is_offloaded_must_fit_a_workers_part_of_its_node() -> None:
    offloaded = {
        "kind": "zero",
        "stage": 3,
        "offload_optimizer": "nvme",
        "nvme_path": "/scratch",
        "offload_params": "cpu",
    }
    config = sweep_config(trial__strategy=offloaded, search={}, **SMALL_BATCH)
    given = premises(config, "cuda", QWEN_32B, 40 * GIB)
    found = [
        why_too_large(config.trial, (kind,), replace(given, host_memory_bytes=host * GIB))
        for host in (0, 8, 64)
        for kind in one_kind(1, given)
    ]
    assert (found[0], found[2]) == ("", "")
    assert re.match(
        r"it does not fit its node: 4-bit nf4 takes at least \d\d\.\d GiB of its memory, and a "
        r"worker's part is 8\.0 GiB: set strategy\.offload_optimizer: none, set "
        r"strategy\.offload_params: nvme or none, or take nodes with more memory",
        found[1],
    )


@pytest.mark.parametrize(("workers", "refused"), [(1, True), (4, False), (None, False)])
def test_workers_of_a_pack_share_what_is_offloaded_to_their_nodes(
    workers: int | None, refused: bool
) -> None:
    config = sweep_config(
        trial__strategy={"kind": "zero", "stage": 2, "offload_optimizer": "cpu"},
        trial__adapter__rank=128,
        resources={"workers_per_pack": workers},
        search={},
        **SMALL_BATCH,
    )
    given = premises(config, "cuda", QWEN_32B, GIB)
    kind = replace(L40S, count=4, host_memory_bytes=16 * GIB)
    why = why_too_large(config.trial, (kind,), given)
    assert why.startswith("it does not fit its node") == refused
    assert bool(why) == refused


def test_what_is_offloaded_goes_to_the_kind_whose_nodes_hold_it() -> None:
    offloaded = {"kind": "zero", "stage": 3, "offload_params": "cpu", "offload_optimizer": "cpu"}
    config = sweep_config(trial__strategy=offloaded, search={}, **SMALL_BATCH)
    given = premises(config, "cuda", QWEN_32B, 40 * GIB)
    small, large = (
        replace(H100, host_memory_bytes=8 * GIB),
        replace(L40S, host_memory_bytes=GIB * 99),
    )
    assert takers(pack_key(config.trial), (small, large), given) == [large]


def test_a_plan_and_a_dry_run_refuse_a_base_that_fits_no_gpu(
    sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = ["trial.batch_size=1", "trial.micro_batch_size=1", "data.block_length=4000000"]
    with pytest.raises(ConfigError, match="no trial can be trained: it does not fit: 4-bit"):
        show(sweep_file, huge, "1xL4,1xT4", Node(4, 0, 0, 8 * GIB))
    assert "trial 0 will not be trained: it does not fit" in capsys.readouterr().out
    show_plan(sweep_file, huge, None, None, Node(8, 1, 24 * GIB, 500 * GIB))
    out = capsys.readouterr().out
    assert "trial 1 will not be trained: it does not fit" in out
    assert "24.0 GiB of each GPU: lower data.block_length" in out


def test_trials_that_no_worker_begins_are_an_error_and_not_an_empty_sweep(tmp_path: Path) -> None:
    kinds = (replace(H100, count=2), replace(L40S, count=2))
    four = {"workers_per_pack": 4}
    words = (
        "trials 0, 1, 2, 3 wait for packs .16-bit and 4-bit nf4. that 2 H100 workers and "
        "2 L40S workers cannot make up: lower resources.workers_per_pack"
    )
    with pytest.raises(ConfigError, match=words):
        run(tmp_path / "run", kinds, QWEN_32B, frozenset(), resources=four, **SMALL_BATCH)
    config = sweep_config(resources=four)
    waiting = [TrialSpec(number, {}, config.trial) for number in range(2)]
    given = premises(config, "cuda", QWEN_32B, GIB)
    found = forecast(waiting, kinds, given, lambda plan, slots: 1.0, lambda plan: 1.0)
    assert found.waiting == waiting


ZERO_3 = {"trial__strategy": {"kind": "zero", "stage": 3}}


@pytest.mark.parametrize("num_trials", [1, 2, 4])
def test_a_base_that_no_gpu_holds_gets_as_many_as_hold_it(num_trials: int) -> None:
    """However many trials wait for their first worker."""
    config = sweep_config(**SMALL_BATCH, **ZERO_3, trial__quant__bit_width=16)
    given = premises(config, "cuda", QWEN_32B, L40S.memory_bytes)
    trials = [TrialSpec(number, {}, config.trial) for number in range(num_trials)]
    ((plan, begun),) = preview_packs(trials, 4, given)
    assert plan.world_size == 4
    assert plan.fit.fits
    assert len(begun) == 1
    assert ("4 workers, as fewer do not hold it" in plan.reason) == (num_trials > 1)
    assert preview_packs(trials, 3, given)[0][0].fit.fits is False


def test_where_no_number_is_expected_to_hold_a_base_the_one_that_comes_nearest_tries() -> None:
    config = sweep_config(**SMALL_BATCH, **ZERO_3, trial__quant__bit_width=16)
    trials = [TrialSpec(number, {}, config.trial) for number in range(4)]
    needs = [
        preview_packs(trials, 4, premises(replace_workers(config, size), "cuda", LLAMA_70B, 1))
        for size in (1, 2, 4)
    ]
    totals = [packs[0][0].fit.memory.total_bytes for packs in needs if packs[0][0].fit.memory]
    assert totals == sorted(totals, reverse=True)
    given = premises(config, "cuda", LLAMA_70B, int(totals[-1] / 0.95))  # and 90 % are for plans
    assert why_too_large(config.trial, one_kind(4, given), given) == ""
    ((plan, _),) = preview_packs(trials, 4, given)
    assert plan.world_size == 4


def replace_workers(config: SweepConfig, size: int) -> SweepConfig:
    return override_config(config, [f"resources.workers_per_pack={size}"])


def test_a_resume_on_smaller_gpus_says_so_and_loses_nothing(tmp_path: Path) -> None:
    config = sweep_config(
        trial__steps=40, search__space={"adapter.rank": [4, 8, 16, 32]}, resources__slots_per_pack=2
    )
    store = make_store(tmp_path / "run", config)

    def stop(notice: Notice) -> None:
        if isinstance(notice, Checkpointed) and notice.step >= 30:
            controller.request_stop()

    def start(memory_bytes: int, observe: Observer = lambda notice: None) -> Controller:
        given = premises(config, "cuda", LLAMA_8B, memory_bytes)
        return make_controller(store, InProcessExecutor(SimulatedWorker), 1, observe, given=given)

    controller = start(80 * GIB, stop)
    assert not controller.run()
    kept = [[path.name for path in store.checkpoints(number)] for number in range(4)]
    assert kept[0]
    with pytest.raises(ConfigError, match="trial 0: it does not fit: 4-bit .*5.0 GiB of each GPU"):
        start(5 * GIB).run()
    assert store.results == []
    assert kept == [[path.name for path in store.checkpoints(number)] for number in range(4)]
    assert start(80 * GIB).run()
    assert states(store) == {"finished": [0, 1, 2, 3]}


def test_a_base_goes_to_many_small_gpus_where_a_large_one_does_not_hold_it() -> None:
    config = sweep_config(**SMALL_BATCH, **ZERO_3, trial__quant__bit_width=16)
    given = premises(config, "cuda", QWEN_32B, 1)
    kinds = (replace(A100, memory_bytes=60 * GIB), replace(L40S, count=4))
    assert takers(pack_key(config.trial), kinds, given) == [kinds[1]]
    refused = why_too_large(config.trial, kinds[:1], given)
    assert "GiB, and a pack may take 60.0 GiB of each A100-80G" in refused


def test_too_few_workers_for_a_base_are_said_to_be_too_few() -> None:
    changes = {**SMALL_BATCH, **ZERO_3, "trial__quant__bit_width": 16}
    config = sweep_config(**changes, resources__workers_per_pack=2)
    given = premises(config, "cuda", LLAMA_70B, 1)
    refused = why_too_large(config.trial, (replace(L40S, count=4),), given)
    assert "GiB of each of 2 workers" in refused
    assert "raise resources.workers_per_pack" in refused


def test_a_resume_with_fewer_workers_loses_nothing_to_a_constraint(tmp_path: Path) -> None:
    """What eight workers hold under the limit, one would not."""
    changes = {"trial__batch_size": 8, "trial__quant__bit_width": 16, **ZERO_3}
    config = sweep_config(**changes, search__constraints={"peak_memory_gib": 15})
    given = premises(config, "cuda", LLAMA_8B, 140 * GIB)
    trial = TrialSpec(0, {}, config.trial)

    def admission(num_workers: int) -> Admission:
        return Admission(given, config.search.constraints, one_kind(num_workers, given))

    assert admission(8).refused_new(trial) is None
    assert admission(8).refused_stored([trial]) == []
    with pytest.raises(ConfigError, match=r"peak_memory_gib is .*: resume with as many as before"):
        admission(1).refused_stored([trial])

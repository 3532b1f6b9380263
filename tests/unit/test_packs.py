"""Which trials share a pack, which pack starts next, and what the policy does about it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.memory import GIB
from orchestrator.planning.packs import PackPlan, learn_from, one_kind, plan_pack, preview_packs
from orchestrator.planning.shape import BaseShape
from orchestrator.planning.waiting import FRESH, Lines, PackKey, Waiting, pack_key
from orchestrator.records import Arithmetic, TrialSpec
from orchestrator.sweep.pack_views import PackView
from orchestrator.sweep.policy import (
    AbandonPack,
    Action,
    AssignTrial,
    ReleasePack,
    StartPack,
    SweepView,
    decide,
)
from tests.sweeps import LLAMA_8B, LLAMA_HALF_B, premises, sweep_config


def trials(*bit_widths: int, **changes: Any) -> list[TrialSpec]:
    return [
        TrialSpec(n, {}, sweep_config(trial__quant__bit_width=bits, **changes).trial)
        for n, bits in enumerate(bit_widths)
    ]


def test_trials_share_a_pack_if_they_share_base_and_program() -> None:
    one, other = trials(4, 4)
    assert pack_key(one.config) == pack_key(other.config)
    (wide,) = trials(16)
    assert pack_key(one.config) != pack_key(wide.config)


def test_trials_with_dora_share_packs_with_each_other_alone_and_the_plan_says_so() -> None:
    adapters = [False, True, False, True]
    waiting = [
        TrialSpec(n, {}, sweep_config(trial__adapter__use_dora=dora).trial)
        for n, dora in enumerate(adapters)
    ]
    packs = preview(waiting, 2)
    assert members(packs) == [[0, 2], [1, 3]]
    assert [plan.reason.split(":")[0] for plan, _ in packs] == ["4-bit nf4", "4-bit nf4, DoRA"]
    plain, dora = (plan.fit.memory for plan, _ in preview(waiting, 2, LLAMA_8B))
    assert plain is not None
    assert dora is not None
    assert dora.total_bytes > plain.total_bytes


def test_trials_of_different_batches_share_a_pack_only_with_a_set_micro_batch() -> None:
    def key(**changes: Any) -> PackKey:
        return pack_key(sweep_config(**changes).trial)

    assert key(trial__batch_size=4) != key(trial__batch_size=8)
    set_to_two = {"trial__micro_batch_size": 2}
    assert key(trial__batch_size=4, **set_to_two) == key(trial__batch_size=8, **set_to_two)


def preview(
    waiting: list[TrialSpec],
    num_workers: int,
    shape: BaseShape | None = None,
    **changes: Any,
) -> list[tuple[PackPlan, list[int]]]:
    """On a CPU, or with a shape on GPUs of 141 GiB."""
    config = sweep_config(**changes)
    given = premises(config, "cuda", shape, 141 * GIB) if shape else premises(config)
    packs = preview_packs(waiting, num_workers, given)
    return [(plan, [trial.number for trial in members]) for plan, members in packs]


def members(packs: list[tuple[PackPlan, list[int]]]) -> list[list[int]]:
    return [numbers for _, numbers in packs]


def test_two_bases_on_two_workers_get_one_pack_each() -> None:
    assert members(preview(trials(4, 4, 16, 16), 2)) == [[0, 1], [2, 3]]


def test_one_base_on_two_workers_is_loaded_by_both() -> None:
    assert members(preview(trials(4, 4, 4, 4), 2)) == [[0, 1], [2, 3]]


def test_the_user_decides_the_number_of_slots() -> None:
    assert members(preview(trials(4, 4, 4, 4), 1, resources__slots_per_pack=3)) == [[0, 1, 2]]


def test_eighteen_trials_on_one_gpu_become_two_waves_of_nine() -> None:
    waiting = trials(*[4] * 18, trial__batch_size=1)
    ((plan, first),) = preview(waiting, 1, LLAMA_HALF_B)
    assert plan.num_slots == len(first) == 9


def test_a_pack_takes_no_more_slots_than_fill_the_gpu() -> None:
    waiting = trials(*[4] * 8, trial__batch_size=8)
    ((large, _),) = preview(waiting, 1, LLAMA_8B)
    ((small, _),) = preview(waiting, 1, LLAMA_HALF_B)
    assert (large.num_slots, small.num_slots) == (1, 2)


def test_two_trials_on_eight_gpus_train_data_parallel() -> None:
    packs = preview(trials(4, 4), 8, LLAMA_8B)
    assert members(packs) == [[0], [1]]
    assert [plan.world_size for plan, _ in packs] == [4, 4]
    assert [plan.fit.micro_batch_size for plan, _ in packs] == [2, 2]
    assert "4 workers, 2 waiting over 8 free" in packs[0][0].reason


def test_no_pack_has_a_second_worker_while_a_trial_waits_for_its_first() -> None:
    packs = preview(trials(4, 4, 4, 16, 16), 7, LLAMA_8B)
    assert sorted(number for numbers in members(packs) for number in numbers) == [0, 1, 2, 3, 4]
    assert sum(plan.world_size for plan, _ in packs) <= 7


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"trial__batch_size": 6}, [3]),
        ({"trial__batch_size": 1}, [1]),
        ({"trial__batch_size": 8, "trial__micro_batch_size": 4}, [2]),
        ({"trial__strategy__kind": "zero", "trial__strategy__stage": 2}, [4]),
    ],
)
def test_workers_of_a_pack_share_a_step_evenly(changes: dict[str, Any], sizes: list[int]) -> None:
    packs = preview(trials(4, **changes), 5, LLAMA_8B)
    assert [plan.world_size for plan, _ in packs] == sizes


def test_the_user_decides_how_many_workers_train_a_pack() -> None:
    packs = preview(trials(4, 4, 4, 4), 5, LLAMA_8B, resources__workers_per_pack=2)
    assert [plan.world_size for plan, _ in packs] == [2, 2]
    assert preview(trials(4), 1, LLAMA_8B, resources__workers_per_pack=2) == []


def test_the_plan_says_which_workers_the_setting_leaves_idle() -> None:
    packs = preview(trials(4, 4, 4, 4), 5, LLAMA_8B, resources__workers_per_pack=2)
    assert ["leaves 1 of 3 free ones idle" in plan.reason for plan, _ in packs] == [False, True]


def test_a_pack_on_cpus_has_one_worker_unless_more_are_set() -> None:
    def sizes(**changes: Any) -> list[int]:
        return [plan.world_size for plan, _ in preview(trials(4), 2, **changes)]

    assert sizes() == [1]
    assert sizes(resources__workers_per_pack=2) == [2]


def test_a_preview_lists_trials_that_the_pack_can_train() -> None:
    waiting = [
        replace(trial, number=number)
        for number, size in enumerate((3, 4, 6))
        for trial in trials(4, trial__batch_size=size, trial__micro_batch_size=1)
    ]
    packs = preview(waiting, 2, LLAMA_8B, resources__workers_per_pack=2)
    assert members(packs) == [[2, 1]]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"trial__strategy__kind": "zero", "trial__strategy__stage": 2}, "DeepSpeed engine"),
        ({"trial__quant__bit_width": 8}, "LLM.int8 treats a batch as one"),
    ],
)
def test_what_slots_cannot_share_runs_alone_and_the_plan_says_why(
    changes: dict[str, Any], why: str
) -> None:
    alone = [TrialSpec(n, {}, sweep_config(**changes).trial) for n in range(2)]
    ((plan, numbers), *_) = preview(alone, 1, LLAMA_8B, resources__slots_per_pack=4)
    assert plan.num_slots == len(numbers) == 1
    assert plan.fit.step_program == "eager"
    assert not plan.fit.dequantise_once
    assert "alone" in plan.reason
    assert why in plan.reason
    assert "resources.slots_per_pack: 4 is for trials that can share" in plan.reason


def test_nothing_is_planned_without_waiting_trials_or_free_workers() -> None:
    given = premises(sweep_config())
    assert plan_pack(Lines(Waiting(), {}), {}, one_kind(1, given), given) is None
    assert plan_pack(Lines(Waiting(trials(4)), {}), {}, one_kind(0, given), given) is None


def test_a_plan_becomes_a_record_with_its_choices_and_bytes() -> None:
    ((plan, _),) = preview(trials(4), 1, LLAMA_8B)
    record = plan.to_json()
    assert record["base"] == "4-bit nf4"
    assert record["memory"]["base_bytes"] > GIB
    assert {"world_size", "num_slots", "micro_batch_size", "dequantise_once"} <= record.keys()


def view(waiting: list[TrialSpec], *packs: PackView, **changes: Any) -> SweepView:
    return SweepView(tuple(waiting), packs, 2, premises(sweep_config()), **changes)


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


def test_a_pack_occupies_all_of_its_workers() -> None:
    four, sixteen = trials(4, 16)
    one = pack(pack_key(four.config), occupied=2)
    assert decide(view([sixteen], replace(one, arithmetic=Arithmetic(2, 1, False)))) == []
    (start,) = decide(view([sixteen], one))
    assert isinstance(start, StartPack)


def test_a_refill_goes_only_to_workers_that_can_share_its_batch() -> None:
    odd, even = (
        TrialSpec(n, {}, sweep_config(trial__batch_size=size, trial__micro_batch_size=1).trial)
        for n, size in enumerate((3, 4))
    )
    pair = replace(pack(pack_key(odd.config), 1), arithmetic=Arithmetic(2, 1, False))
    assert decide(view([odd, even], pair)) == [AssignTrial(0, 1)]


@pytest.mark.parametrize(
    "changes",
    [
        {"trial__batch_size": 3},
        {"trial__batch_size": 3, "trial__micro_batch_size": 1},
    ],
)
def test_no_pack_is_started_that_no_waiting_trial_can_use(changes: dict[str, Any]) -> None:
    (odd,) = trials(4, **changes)
    given = premises(sweep_config(resources__workers_per_pack=2))
    assert decide(SweepView((odd,), (), 2, given)) == []
    (even,) = trials(4, trial__batch_size=4, trial__micro_batch_size=1)
    (start,) = decide(SweepView((odd, replace(even, number=1)), (), 2, given))
    assert isinstance(start, StartPack)
    assert start.plan.key == pack_key(even.config)


def on_gpus(
    waiting: list[TrialSpec],
    *packs: PackView,
    num_workers: int = 2,
    memory_bytes: int = 141 * GIB,
    had: Mapping[int, Arithmetic] = FRESH,
    **changes: Any,
) -> list[Action]:
    given = premises(sweep_config(**changes), "cuda", LLAMA_8B, memory_bytes)
    return decide(SweepView(tuple(waiting), packs, num_workers, given, had=had))


def started(actions: list[Action]) -> list[tuple[Arithmetic, int]]:
    """Of each new pack, what it chose and its slots."""
    plans = [action.plan for action in actions if isinstance(action, StartPack)]
    return [(plan.arithmetic, plan.num_slots) for plan in plans]


HAD = Arithmetic(1, 4, True, kept_layers=2)


def test_a_half_trained_trial_gets_a_pack_of_the_arithmetic_that_it_had() -> None:
    (alone,) = trials(4)
    assert started(on_gpus([alone])) == [(Arithmetic(2, 4, False), 1)]
    (start,) = on_gpus([alone], had={0: HAD})
    assert started([start]) == [(HAD, 1)]
    assert "1 worker, as half-trained trials had" in start.reason
    assert "4 blocks in a pass, as half-trained trials had" in start.reason


def test_a_fresh_trial_may_share_the_pack_of_a_half_trained_one_which_goes_first() -> None:
    waiting = trials(4, 4)
    had = {1: Arithmetic(1, 1, False)}
    assert started(on_gpus(waiting, num_workers=1, had=had)) == [(had[1], 2)]
    loaded = replace(pack(pack_key(waiting[0].config), occupied=0), arithmetic=had[1])
    assert on_gpus(waiting, loaded, num_workers=1, had=had) == [
        AssignTrial(0, 1),
        AssignTrial(0, 0),
    ]
    narrow = replace(loaded, num_slots=1)
    assert on_gpus(waiting, narrow, num_workers=1, had=had) == [AssignTrial(0, 1)]


def test_half_trained_trials_that_had_different_arithmetics_get_a_pack_each() -> None:
    waiting = trials(4, 4, 4)
    had = {0: HAD, 1: Arithmetic(1, 8, True), 2: HAD}
    assert started(on_gpus(waiting, had=had)) == [(HAD, 1), (Arithmetic(1, 8, True), 1)]


def test_a_half_trained_trial_is_no_refill_for_a_pack_of_another_arithmetic() -> None:
    waiting = trials(4, 4)
    running = replace(pack(pack_key(waiting[0].config), occupied=1), arithmetic=HAD)
    other = {0: Arithmetic(1, 8, True)}
    assert on_gpus(waiting, running, num_workers=1, had=other) == [AssignTrial(0, 1)]
    assert on_gpus(waiting, running, num_workers=1, had={0: HAD}) == [AssignTrial(0, 0)]


def test_what_was_had_and_runs_out_of_memory_is_given_up_in_the_end() -> None:
    changes: dict[str, Any] = {
        "data__block_length": 1024,
        "trial__batch_size": 1,
        "trial__gradient_checkpointing": "selective",
        "resources__slots_per_pack": 4,
    }
    waiting = trials(*8 * [4], **changes)
    given = premises(sweep_config(**changes), "cuda", LLAMA_8B, 24 * GIB)
    ((alone, _),) = preview_packs(waiting[:1], 1, given)
    had = {0: alone.arithmetic}
    for _ in range(20):
        ((plan, _),) = preview_packs(waiting, 1, given, had)
        if (learned := learn_from(plan, given)) is None:
            break
        given, _ = learned
    assert learned is None


def test_a_half_trained_trial_waits_for_the_workers_that_it_had() -> None:
    four, sixteen = trials(4, 16)
    busy = pack(pack_key(sixteen.config), occupied=2)
    assert on_gpus([four], busy, had={0: Arithmetic(2, 4, False)}) == []
    assert started(on_gpus([four], had={0: Arithmetic(2, 2, False)})) == [
        (Arithmetic(2, 2, False), 1)
    ]


@pytest.mark.parametrize(
    ("had", "given", "why"),
    [
        (Arithmetic(2, 2, False), {"num_workers": 1}, "the sweep has 1 worker now"),
        (
            Arithmetic(2, 2, False),
            {"resources__workers_per_pack": 1},
            "resources.workers_per_pack is 1 now",
        ),
        (Arithmetic(1, 8, False), {"memory_bytes": 16 * GIB}, "it does not fit the memory now"),
    ],
)
def test_a_half_trained_trial_is_planned_anew_where_it_must_and_the_reason_says_so(
    had: Arithmetic, given: dict[str, Any], why: str
) -> None:
    waiting = trials(4)
    ((new, slots),) = started(on_gpus(waiting, had={0: had}, **given))
    assert new != had
    assert started(on_gpus(waiting, **given)) == [(new, slots)]
    running = replace(pack(pack_key(waiting[0].config), occupied=1), arithmetic=new)
    (assign,) = on_gpus(waiting, running, had={0: had}, **given)
    assert assign == AssignTrial(0, 0)
    assert f"planned anew, as it was trained with {had} so far and {why}" in assign.reason


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


LARGE = WorkerKind("H200", 1, 140 * GIB, 1.0)
SMALL = WorkerKind("L4", 1, 22 * GIB, 0.6)


def kinds_view(waiting: list[TrialSpec], *packs: PackView, shape: BaseShape) -> SweepView:
    given = premises(sweep_config(), "cuda", shape, SMALL.memory_bytes)
    return SweepView(tuple(waiting), packs, 2, given, kinds=(LARGE, SMALL))


def test_a_pack_is_planned_for_the_kind_of_gpu_that_it_will_run_on() -> None:
    actions = decide(kinds_view(trials(4, 4), shape=LLAMA_8B))
    plans = [action.plan for action in actions if isinstance(action, StartPack)]
    assert [plan.kind.name for plan in plans] == ["H200", "L4"]
    assert [plan.fit.dequantise_once for plan in plans] == [True, False]
    assert "4-bit nf4 on L4" in plans[1].reason


def test_the_longest_trials_go_to_the_fastest_gpus() -> None:
    waiting = [
        TrialSpec(number, {}, sweep_config(trial__steps=steps).trial)
        for number, steps in enumerate((10, 400))
    ]
    packs = preview_packs(
        waiting, 2, premises(sweep_config(), "cuda", LLAMA_8B, GIB), kinds=(LARGE, SMALL)
    )
    assert {plan.kind.name: [t.number for t in mine] for plan, mine in packs} == {
        "H200": [1],
        "L4": [0],
    }


def test_a_kind_whose_workers_are_all_taken_gets_no_pack() -> None:
    (trial, other) = trials(4, 16)
    busy = replace(pack(pack_key(trial.config), occupied=2, idle=False), kind="H200")
    (start,) = decide(kinds_view([other], busy, shape=LLAMA_HALF_B))
    assert isinstance(start, StartPack)
    assert start.plan.kind.name == "L4"


def test_a_slow_gpu_begins_nothing_that_a_fast_one_would_end_sooner() -> None:
    short, long = (TrialSpec(n, {}, sweep_config(trial__steps=10**n).trial) for n in (1, 2))
    slow = replace(SMALL, speed=0.1)
    given = premises(sweep_config(), "cuda", LLAMA_8B)
    packs = preview_packs([short, long], 2, given, kinds=(LARGE, slow))
    assert [(plan.kind.name, t.number) for plan, mine in packs for t in mine] == [("H200", 2)]
    idle = replace(pack(pack_key(short.config), 0), kind="L4")
    view = SweepView((short,), (idle,), 1, given, kinds=(replace(LARGE, count=0), slow))
    assert decide(view) == [AssignTrial(0, 1)]
    view = replace(view, kinds=(LARGE, slow), packs=(idle, replace(idle, number=1, kind="H200")))
    assert decide(view) == [ReleasePack(0, save=False), AssignTrial(1, 1)]


def test_a_slow_gpu_passes_over_what_is_too_long_for_its_slots_for_what_is_not() -> None:
    long = [TrialSpec(n, {}, sweep_config(trial__steps=1000).trial) for n in range(6)]
    changes = {"trial__steps": 100, "trial__quant": {"bit_width": 16}}
    short = [TrialSpec(6 + n, {}, sweep_config(**changes).trial) for n in range(12)]
    given = premises(sweep_config(resources__slots_per_pack=4), "cuda", LLAMA_8B)
    busy = replace(pack(pack_key(long[0].config), occupied=4, idle=False), kind="H200")
    kinds = (LARGE, replace(LARGE, name="A100", speed=0.25))
    view = SweepView((*long, *short), (busy,), 2, given, kinds=kinds)
    (start,) = (action for action in decide(view) if isinstance(action, StartPack))
    assert (start.plan.kind.name, start.plan.key.title) == ("A100", "16-bit")


def test_a_slow_gpu_that_loads_holds_no_trial_back_from_faster_ones() -> None:
    """Which of them begins it was decided when its pack was started, and may look different now."""
    (long,) = (TrialSpec(0, {}, sweep_config(trial__steps=100).trial),)
    given = premises(sweep_config(), "cuda", LLAMA_8B)
    loading = replace(pack(pack_key(long.config), 0, ready=False, idle=False), kind="L4")
    slow = replace(SMALL, speed=0.1)
    (start,) = (
        a
        for a in decide(SweepView((long,), (loading,), 2, given, kinds=(LARGE, slow)))
        if isinstance(a, StartPack)
    )
    assert start.plan.kind.name == "H200"


def test_a_slow_gpu_begins_what_a_pack_on_a_faster_one_waits_for_in_vain() -> None:
    """A node that is gone may not come back."""
    (long,) = (TrialSpec(0, {}, sweep_config(trial__steps=100).trial),)
    given = premises(sweep_config(), "cuda", LLAMA_8B)
    loading = replace(pack(pack_key(long.config), 0, ready=False, idle=False), kind="H200")
    slow = replace(SMALL, speed=0.1)
    view = SweepView((long,), (loading,), 2, given, kinds=(LARGE, slow))
    assert decide(view) == []
    dropped, start = decide(replace(view, queued=frozenset({loading.number})))
    assert dropped == AbandonPack(loading.number)
    assert isinstance(start, StartPack)
    assert start.plan.kind.name == "L4"


def test_where_ray_has_no_room_for_a_pack_no_other_one_is_begun() -> None:
    waiting = trials(4, 16)
    loading = pack(pack_key(waiting[0].config), 0, ready=False, idle=False)
    view = SweepView(tuple(waiting), (loading,), 2, premises(sweep_config()))
    (start,) = decide(view)
    assert isinstance(start, StartPack)
    assert decide(replace(view, queued=frozenset({loading.number}))) == []


def test_a_half_trained_trial_goes_on_where_its_arithmetic_fits() -> None:
    (trial,) = trials(4, trial__batch_size=8)
    had = Arithmetic(1, 8, False)  # 8 blocks at once do not fit the small kind
    seen = replace(kinds_view([trial], shape=LLAMA_8B), had={0: had})
    (start,) = decide(seen)
    assert isinstance(start, StartPack)
    assert (start.plan.kind.name, start.plan.arithmetic) == ("H200", had)

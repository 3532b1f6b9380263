"""What a sweep learns of its packs' speed from their workers' reports, and what it leaves alone."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import SweepConfig
from orchestrator.planning.capacity import Node
from orchestrator.planning.durations import Durations
from orchestrator.planning.gpus import GPUS
from orchestrator.planning.kinds import ALIKE, known_gpus
from orchestrator.planning.packs import PackPlan, one_kind, preview_packs
from orchestrator.planning.waiting import Waiting
from orchestrator.records import (
    Evaluated,
    Event,
    Notice,
    Progress,
    Standing,
    TrialOpened,
    TrialSpec,
)
from orchestrator.sweep.earlier import earlier_speeds, keep_speeds, speeds_to_begin_with
from orchestrator.sweep.executor import InProcessExecutor
from orchestrator.sweep.pace import FIRST_AFTER_S, Pace
from orchestrator.sweep.run_store import RunStore
from orchestrator.sweep.running import RunningPack
from orchestrator.sweep.simulated import TOKENS_PER_STEP, SimulatedWorker
from tests.sweeps import LLAMA_8B, make_controller, make_store, premises, sweep_config
from tests.unit.test_search_resume import conclusion

H200 = GPUS["H200"]
CONFIG = sweep_config(trial__steps=1000, trial__batch_size=2, search__space={})
TRIALS = {number: TrialSpec(number, {}, CONFIG.trial) for number in range(2)}


def durations(config: SweepConfig = CONFIG) -> Durations:
    given = premises(config, "cuda", LLAMA_8B, H200.memory_bytes)
    return Durations(given, LLAMA_8B, {ALIKE.name: H200})


def the_plan(num_trials: int = 1) -> PackPlan:
    ((plan, _),) = preview_packs(list(TRIALS.values())[:num_trials], 1, durations().premises)
    return plan


STEP_S = 2 * durations().block_s(the_plan(), 1)
"""As expected of a trial that is alone."""
KINDS = one_kind(1, durations().premises)
STEPS = round(2 * FIRST_AFTER_S / STEP_S)


def report(step: int, slower: float = 1.0, trial: int = 0) -> Progress:
    """Steps of 100 tokens, so much slower than expected."""
    rate = 100 / (STEP_S * slower)
    return Progress(trial, 1, 0.0, step, 100 * step, 1.0, 1e-3, 1.0, rate)


def measured(*events: Event, plan: PackPlan | None = None) -> dict[str, Any] | None:
    """What the last event brings."""
    pace = Pace(durations())
    plan = plan or the_plan()
    pace.start(0, plan)
    facts = None
    for event in events:
        facts = pace.take(0, plan, 1, event, TRIALS)
    return facts


def test_a_packs_rate_is_what_its_reports_say_against_what_was_expected() -> None:
    facts = measured(report(1), report(1 + STEPS, slower=1.5))
    assert facts is not None
    assert (facts["gpu"], facts["base"]) == ("H200", "4-bit nf4, dequantised")
    assert facts["measured_s"] / facts["expected_s"] == pytest.approx(1.5, rel=1e-4)
    assert facts["tokens"] == 100 * STEPS


def test_what_is_not_steady_training_is_not_measured() -> None:
    assert measured(report(STEPS)) is None, "the first report has warm-up in it"
    evaluated = Evaluated(0, 1, 0.0, 1, 100, 2.0)
    assert measured(report(1), evaluated, report(1 + STEPS)) is None
    assert measured(report(1), TrialOpened(1, 1, 0), report(1 + STEPS)) is None
    assert measured(report(1), report(2)) is None, "too short"
    assert measured(report(1), evaluated, report(2), report(2 + STEPS)) is not None


def test_a_pack_is_measured_again_when_its_time_has_doubled() -> None:
    facts = [
        measured(*(report(1 + STEPS * count) for count in range(number + 1)))
        for number in range(1, 9)
    ]
    assert [number for number, found in enumerate(facts, 1) if found] == [1, 2, 4, 8]


def test_each_slot_counts_with_its_share() -> None:
    plan = the_plan(2)
    pace = Pace(durations())
    pace.start(0, plan)
    for step in (1, 1 + STEPS):
        for trial in (0, 1):
            found = pace.take(0, plan, 2, report(step, trial=trial), TRIALS)
    assert found is not None
    together = durations().block_s(plan, 2)
    assert found["expected_s"] == pytest.approx(2 * STEPS * together, rel=1e-4)
    assert found["measured_s"] == pytest.approx(STEPS * STEP_S, rel=1e-4)
    assert found["tokens"] == 2 * 100 * STEPS


def test_gpus_that_nothing_is_known_of_teach_nothing() -> None:
    pace = Pace(Durations(durations().premises, LLAMA_8B, {"L4": GPUS["L4"]}))
    pace.start(0, the_plan())
    for step in (1, 1 + STEPS):
        assert pace.take(0, the_plan(), 1, report(step), TRIALS) is None
    assert (
        pace.left_s(Waiting(TRIALS.values()), [], TRIALS, 0, one_kind(1, durations().premises))
        is None
    )


def test_what_is_left_is_all_work_at_the_rates_that_were_measured() -> None:
    pace, plan = Pace(durations()), the_plan()
    pace.start(0, plan)
    pack = RunningPack(plan, {0: 1})
    waiting = Waiting([TRIALS[1]])
    kinds = one_kind(1, durations().premises)
    pace.take(0, plan, 1, report(400), TRIALS)
    assert pace.left_s(waiting, [pack], TRIALS, 0, kinds) == pytest.approx(1600 * STEP_S)
    assert pace.left_s(waiting, [pack], TRIALS, 2, kinds) == pytest.approx(3600 * STEP_S)
    two = one_kind(2, durations().premises)
    assert pace.left_s(waiting, [pack], TRIALS, 0, two) == pytest.approx(800 * STEP_S)
    alone = pace.left_s(Waiting(), [pack], TRIALS, 0, one_kind(8, durations().premises))
    assert alone == pytest.approx(600 * STEP_S), "one trial takes its time on however many"
    for number in range(3):
        pace.start(number, plan)
        row = {"gpu": "H200", "base": plan.base, "tokens": 1, "expected_s": 1.0, "measured_s": 2.0}
        pace.learn(number, row)
    assert pace.left_s(waiting, [pack], TRIALS, 0, kinds) == pytest.approx(3200 * STEP_S)


def test_what_is_left_is_known_though_the_last_pack_is_on_a_gpu_that_nobody_knows() -> None:
    pace, plan = Pace(durations()), the_plan()
    pace.start(0, plan)
    known = pace.left_s(Waiting([TRIALS[1]]), [RunningPack(plan, {0: 1})], TRIALS, 0, KINDS)
    pace.start(1, replace(plan, kind=replace(ALIKE, name="B300")))
    packs = [RunningPack(plan, {0: 1})]
    assert pace.left_s(Waiting([TRIALS[1]]), packs, TRIALS, 0, KINDS) == known
    assert known is not None


LONG: dict[str, Any] = {"trial__steps": 40, "resources__slots_per_pack": 1}


def sweep(
    folder: Path, tokens_per_s: float, config: SweepConfig, pace: Pace | None = None
) -> RunStore:
    """By workers of whom a GPU is said; each step has 100 tokens."""
    store = make_store(folder, config)
    executor = InProcessExecutor(partial(SimulatedWorker, tokens_per_s=tokens_per_s))
    given = durations(config)
    pace = pace or Pace(given)
    assert make_controller(store, executor, given=given.premises, pace=pace).run()
    return store


def test_a_sweep_says_what_it_learns_and_a_resume_learns_the_same(tmp_path: Path) -> None:
    pace = Pace(durations(sweep_config(**LONG)))
    store = sweep(tmp_path / "run", TOKENS_PER_STEP / 1.0, sweep_config(**LONG), pace)
    said = [d for d in store.decisions if d["action"] == "learn_speed"]
    assert {decision["subject"] for decision in said} == {
        "4-bit nf4, dequantised on H200",
        "16-bit on H200",
    }
    assert "measured 100 in 1 pack: durations x " in said[0]["reason"]
    again = Pace(durations(sweep_config(**LONG)))
    make_controller(store, InProcessExecutor(SimulatedWorker), pace=again).run()
    assert again.factors.to_json() == pace.factors.to_json() != []
    assert store.read("plan")["speed"] == pace.factors.to_json()  # type: ignore[index]


def test_the_display_is_told_how_long_the_rest_will_take(tmp_path: Path) -> None:
    told: list[float | None] = []

    def note(notice: Notice) -> None:
        if isinstance(notice, Standing):
            told.append(notice.left_s)

    config = sweep_config(**LONG)
    given = durations(config)
    store = make_store(tmp_path / "run", config)
    executor = InProcessExecutor(SimulatedWorker)
    make_controller(store, executor, observe=note, given=given.premises, pace=Pace(given)).run()
    assert told[0] is not None
    assert told[0] > 0


def test_no_verdict_depends_on_what_was_measured(tmp_path: Path) -> None:
    config = sweep_config(
        search__space={"adapter.rank": [9, 4, 12, 2, 24, 6, 3, 16], "quant.bit_width": [4, 16]},
        search__pruner="asha",
        **LONG,
    )
    slow, fast = (
        sweep(tmp_path / name, rate, config) for name, rate in (("slow", 10.0), ("fast", 1e6))
    )
    assert any(decision["action"] == "learn_speed" for decision in slow.decisions)
    assert not any(decision["action"] == "learn_speed" for decision in fast.decisions)
    assert conclusion(slow) == conclusion(fast)


def test_what_a_sweep_learnt_is_there_for_the_next_one_and_stays_as_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    first = make_store(tmp_path / "first", CONFIG)
    assert speeds_to_begin_with(first, LLAMA_8B) == {}
    pace = Pace(durations())
    for number in range(3):
        pace.start(number, the_plan())
        row = {"gpu": "H200", "base": "16-bit", "tokens": 1, "expected_s": 1.0, "measured_s": 2.0}
        pace.learn(number, row)
    keep_speeds(LLAMA_8B, pace.factors)
    assert earlier_speeds(LLAMA_8B)["H200", "16-bit"].factor == 2.0
    second = make_store(tmp_path / "second", CONFIG)
    assert speeds_to_begin_with(second, LLAMA_8B) == earlier_speeds(LLAMA_8B)
    assert speeds_to_begin_with(first, LLAMA_8B) == {}, "a resume goes by the same as the start"


@pytest.mark.parametrize(
    ("names", "known"),
    [(["H100"], {"": "H100"}), (["H100", "L4"], {"H100": "H100", "L4": "L4"}), (["TPU"], {})],
)
def test_the_gpus_of_a_cluster_are_known_by_the_names_of_their_kinds(
    names: list[str], known: dict[str, str]
) -> None:
    nodes = [Node(8, 1, 0, 0, name) for name in names]
    assert {kind: gpu.name for kind, gpu in known_gpus(nodes).items()} == known

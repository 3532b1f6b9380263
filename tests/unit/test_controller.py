from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import SweepConfig
from orchestrator.errors import ConfigError, DiskFull
from orchestrator.files import read_json, write_json
from orchestrator.planning.memory import GIB
from orchestrator.planning.options import Premises
from orchestrator.planning.packs import preview_packs
from orchestrator.planning.shape import UnknownShape
from orchestrator.planning.waiting import pack_key
from orchestrator.records import (
    Arithmetic,
    Checkpointed,
    Decision,
    Directive,
    Evaluated,
    Event,
    Notice,
    PackLost,
    PackReady,
    PackSpec,
    TrialDone,
    TrialSpec,
)
from orchestrator.sweep.executor import InProcessExecutor
from orchestrator.sweep.pack_views import PackView
from orchestrator.sweep.policy import AbandonPack, SweepView, decide
from orchestrator.sweep.run_store import RunStore
from orchestrator.sweep.selection import select_winner
from orchestrator.sweep.simulated import SimulatedWorker
from tests.sweeps import LLAMA_8B, make_controller, make_store, premises, sweep_config


def finished(store: RunStore) -> list[int]:
    return [result.number for result in store.results if result.state == "finished"]


def test_every_trial_is_trained_once_and_the_best_wins(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    assert make_controller(store, InProcessExecutor(SimulatedWorker)).run()
    assert finished(store) == [0, 1, 2, 3]
    assert Counter(result.attempt for result in store.results) == {1: 4}
    winner = select_winner(store.trials, store.results)
    assert winner is not None
    assert winner.trial == 3  # 16 bits and rank 16 have the least simulated loss


def test_a_free_slot_is_given_to_the_next_trial_of_the_same_base(tmp_path: Path) -> None:
    config = sweep_config(
        search__space={"adapter.rank": [1, 2, 3, 4, 5]}, resources__slots_per_pack=2
    )
    store = make_store(tmp_path / "run", config)
    assert make_controller(store, InProcessExecutor(SimulatedWorker), num_workers=1).run()
    assert finished(store) == [0, 1, 2, 3, 4]
    started = [d for d in store.decisions if d["action"] == "start_pack"]
    assert len(started) == 1  # one base was loaded for all five


@pytest.mark.parametrize("at_fault", [{0}, {0, 1}])
def test_a_worker_that_raises_fails_those_trials_alone_that_raise_alone(
    tmp_path: Path, at_fault: set[int]
) -> None:
    store = make_store(tmp_path / "run", sweep_config())  # 0 and 1 share the 4-bit base
    factory = partial(SimulatedWorker, faults=dict.fromkeys(at_fault, "raise"))
    assert make_controller(store, InProcessExecutor(factory)).run()
    failed = {result.number: result.reason for result in store.results if result.state == "failed"}
    assert failed == dict.fromkeys(at_fault, "raised")
    assert finished(store) == sorted({0, 1, 2, 3} - at_fault)
    assert "a simulated error" in store.results[0].message


def test_a_trial_that_diverges_harms_no_neighbour(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    factory = partial(SimulatedWorker, faults={0: "nan"})
    assert make_controller(store, InProcessExecutor(factory)).run()
    failed = {result.number: result.reason for result in store.results if result.state == "failed"}
    assert failed == {0: "loss_not_finite"}
    assert finished(store) == [1, 2, 3]


def test_a_base_that_cannot_be_loaded_fails_all_trials_that_wait_for_it(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    factory = partial(SimulatedWorker, faults={-1: "raise"})
    assert make_controller(store, InProcessExecutor(factory)).run()
    assert [result.state for result in store.results] == ["failed"] * 4
    assert select_winner(store.trials, store.results) is None


def test_a_full_disk_stops_the_sweep_and_fails_no_trial(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    factory = partial(SimulatedWorker, faults={1: "disk_full"})
    with pytest.raises(DiskFull, match="disk is full"):
        make_controller(store, InProcessExecutor(factory)).run()
    assert store.results == []


def test_a_sweep_that_was_asked_to_stop_saves_and_resumes_where_it_was(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())

    def stop_after_three_steps(event: Event) -> None:
        if getattr(event, "step", 0) == 3:
            controller.request_stop()

    executor = InProcessExecutor(SimulatedWorker)
    controller = make_controller(store, executor, observe=stop_after_three_steps)
    assert not controller.run()
    assert store.results == []
    steps_before = {point["step"] for point in store.points(0)}

    again = make_controller(RunStore.open(store.folder), InProcessExecutor(SimulatedWorker))
    assert again.run()
    assert finished(store) == [0, 1, 2, 3]
    first_attempts = [p["step"] for p in store.points(0) if p["attempt"] == 1]
    second_attempts = [p["step"] for p in store.points(0) if p["attempt"] == 2]
    assert max(first_attempts) == max(steps_before)
    assert min(second_attempts) == max(steps_before) + 1  # no step was trained twice


def on_gpus(config: SweepConfig) -> Premises:
    """The planner's premises; what simulated workers run on does not matter to them."""
    return premises(config, "cuda", LLAMA_8B, 141 * GIB)


def test_a_resumed_sweep_gives_a_half_trained_trial_the_arithmetic_that_it_had(
    tmp_path: Path,
) -> None:
    config = sweep_config(search__space={"steps": [2, 6]})
    store = make_store(tmp_path / "run", config)

    def stop_after_three_steps(event: Event) -> None:
        if getattr(event, "step", 0) == 3:
            controller.request_stop()

    controller = make_controller(
        store,
        InProcessExecutor(SimulatedWorker),
        observe=stop_after_three_steps,
        given=on_gpus(config),
    )
    assert not controller.run()
    assert finished(store) == [0]
    had = store.arithmetic(1)
    assert had is not None
    ((free, _),) = preview_packs([store.trials[1]], 2, on_gpus(config))
    assert free.arithmetic != had  # alone, it would get both workers

    again = RunStore.open(store.folder)
    executor = InProcessExecutor(SimulatedWorker)
    assert make_controller(again, executor, given=on_gpus(config)).run()
    assert finished(again) == [0, 1]
    attempts = again.trial_dir(1) / "attempts"
    assert [read_json(attempts / n / "arithmetic.json") for n in "12"] == [asdict(had)] * 2
    (planned,) = again.read("plan")["packs"]
    assert planned["world_size"] == had.world_size == 1


@pytest.mark.parametrize(
    ("num_workers", "had", "words"),
    [
        (1, Arithmetic(1, 2, True), ""),
        (
            1,
            Arithmetic(2, 2, True),
            "; planned anew, as it was trained with world_size=2, micro_batch_size=2, recomputation"
            " so far and the sweep has 1 worker now",
        ),
    ],
)
def test_the_decision_says_of_a_resumed_trial_whether_it_is_planned_anew(
    tmp_path: Path, num_workers: int, had: Arithmetic, words: str
) -> None:
    config = sweep_config(search__space={"steps": [6]})
    store = make_store(tmp_path / "run", config)
    store.add_trial(TrialSpec(0, {"steps": 6}, config.trial))
    _, attempt = store.start_attempt(0, had)
    write_json(attempt / "checkpoint-00000004" / "checkpoint.json", {"step": 4})  # and is killed
    executor = InProcessExecutor(SimulatedWorker)
    assert make_controller(store, executor, num_workers, given=on_gpus(config)).run()
    assert finished(store) == [0]
    assert [d["reason"] for d in store.decisions if d["action"] == "assign"] == [
        f"a slot of pack 0 is free{words}"
    ]


def test_finished_trials_are_not_trained_again_on_resume(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    make_controller(store, InProcessExecutor(SimulatedWorker)).run()
    before = {path: path.stat().st_mtime_ns for path in store.folder.rglob("result.json")}
    make_controller(store, InProcessExecutor(SimulatedWorker)).run()
    assert {path: path.stat().st_mtime_ns for path in store.folder.rglob("result.json")} == before


def test_a_pack_that_never_loads_does_not_outlive_the_last_trial() -> None:
    trial = sweep_config().trial
    given = premises(sweep_config())
    loading = PackView(0, pack_key(trial), 2, occupied=0, ready=False, idle=False)
    assert decide(SweepView((), (loading,), 2, given)) == [AbandonPack(0)]
    assert decide(SweepView((TrialSpec(0, {}, trial),), (loading,), 1, given)) == []


class LosesOneLoad(InProcessExecutor):
    """The first pack is lost while it loads; the machine was at fault."""

    def start_pack(self, spec: PackSpec) -> None:
        super().start_pack(spec)
        if spec.pack == 0:
            self._due[0] = lambda: [PackLost(0, "worker_lost", "the node is gone")]


@pytest.mark.parametrize("num_workers", [1, 4])
def test_workers_lost_while_loading_fail_no_trial(tmp_path: Path, num_workers: int) -> None:
    config = sweep_config(search__space={"adapter.rank": [1, 2, 3, 4]})
    store = make_store(tmp_path / "run", config)
    assert make_controller(store, LosesOneLoad(SimulatedWorker), num_workers).run()
    assert finished(store) == [0, 1, 2, 3]


def test_a_point_that_cannot_work_is_a_failed_trial_and_ends_nothing(tmp_path: Path) -> None:
    config = sweep_config(search__space={"schedule.warmup_steps": [0, 6]})
    store = make_store(tmp_path / "run", config)
    assert make_controller(store, InProcessExecutor(SimulatedWorker)).run()
    assert [(result.state, result.reason) for result in store.results] == [
        ("finished", ""),
        ("failed", "not_valid"),
    ]
    assert "warmup_steps" in store.results[1].message


def test_bits_that_a_base_of_gpt_2s_kind_cannot_have_take_no_worker(tmp_path: Path) -> None:
    config = sweep_config(search__space={"quant.bit_width": [4, 8]})
    store = make_store(tmp_path / "run", config)
    given = premises(config, shape=UnknownShape("it has no hidden_size", conv1d=True))
    executor = InProcessExecutor(SimulatedWorker)
    assert make_controller(store, executor, given=given).run()
    refused, finished = store.results
    assert (refused.state, refused.reason, finished.state) == ("failed", "not_valid", "finished")
    assert refused.message.startswith("a base model of GPT-2's kind")
    started = [event["base"] for event in store.pack_events if event["what"] == "start"]
    assert started == ["8-bit"]


class OutOfMemoryError(Exception):
    """Named as torch's."""


class TightWorker(SimulatedWorker):
    """Its memory holds one slot."""

    def advance(self, directives: Sequence[Directive]) -> list[Event]:
        self._need_memory()
        return super().advance(directives)

    def _need_memory(self) -> None:
        if self._spec.num_slots > 1:
            raise OutOfMemoryError("tried to allocate 1 GiB")


class TightLoader(TightWorker):
    def load(self) -> PackReady:
        self._need_memory()
        return super().load()


def four_trials(folder: Path, **changes: Any) -> RunStore:
    return make_store(folder, sweep_config(search__space={"adapter.rank": [1, 2, 3, 4]}, **changes))


@pytest.mark.parametrize("worker", [TightWorker, TightLoader])
def test_a_pack_that_runs_out_of_memory_is_planned_with_less_and_its_trials_are_retried(
    tmp_path: Path, worker: type[SimulatedWorker]
) -> None:
    store = four_trials(tmp_path / "run", max_restarts=0)  # which it does not count against
    assert make_controller(store, InProcessExecutor(worker), num_workers=1).run()
    assert finished(store) == [0, 1, 2, 3]
    learned = [d["reason"] for d in store.decisions if d["action"] == "plan_less_memory"]
    assert learned == [
        "4 slots ran out of memory: at most 2 from now on",
        "2 slots ran out of memory: at most 1 from now on",
    ]


def test_packs_that_run_out_of_memory_together_are_all_planned_with_less(tmp_path: Path) -> None:
    """The second was planned before the first one's loss was learnt from."""
    config = sweep_config(search__space={"adapter.rank": list(range(1, 9))}, max_restarts=0)
    store = make_store(tmp_path / "run", config)
    assert make_controller(store, InProcessExecutor(TightWorker), num_workers=2).run()
    assert finished(store) == list(range(8))
    learned = [d["reason"] for d in store.decisions if d["action"] == "plan_less_memory"]
    assert "it was planned before another such pack taught this" in learned


def test_a_resume_does_not_run_out_of_memory_again(tmp_path: Path) -> None:
    store = four_trials(tmp_path / "run")

    def stop_once_one_slot_is_left(notice: Notice) -> None:
        if isinstance(notice, Decision) and "at most 1 from" in notice.reason:
            controller.request_stop()

    executor = InProcessExecutor(TightWorker)
    controller = make_controller(store, executor, 1, stop_once_one_slot_is_left)
    assert not controller.run()
    before = len(store.decisions)
    assert make_controller(store, InProcessExecutor(TightWorker), num_workers=1).run()
    assert finished(store) == [0, 1, 2, 3]
    assert "plan_less_memory" not in {d["action"] for d in store.decisions[before:]}


def test_trials_whose_pack_can_give_up_nothing_fail_for_want_of_memory(tmp_path: Path) -> None:
    store = four_trials(tmp_path / "run", resources__slots_per_pack=2)
    assert make_controller(store, InProcessExecutor(TightLoader), num_workers=1).run()
    assert [result.reason for result in store.results] == ["out_of_memory"] * 4
    assert "tried to allocate 1 GiB" in store.results[0].message


def test_stored_trials_that_do_not_suit_the_settings_of_a_resume_are_refused(
    tmp_path: Path,
) -> None:
    store = four_trials(tmp_path / "run", trial__batch_size=3)
    store.add_trial(TrialSpec(0, {"adapter.rank": 1}, store.sweep.config.trial))
    executor = InProcessExecutor(SimulatedWorker)
    with pytest.raises(ConfigError) as refused:
        make_controller(store, executor, workers_per_pack=2).run()
    message = str(refused.value)
    assert message.startswith("trial 0: resources.workers_per_pack")
    assert "batch_size=3: set resources.workers_per_pack: 1" in message
    assert store.results == []


def test_a_stored_trial_that_cannot_work_at_all_is_over_when_the_sweep_resumes(
    tmp_path: Path,
) -> None:
    config = sweep_config(search__space={"schedule.warmup_steps": [6, 0]})
    store = make_store(tmp_path / "run", config)
    invalid = sweep_config(trial__schedule__warmup_steps=6).trial
    store.add_trial(TrialSpec(0, {"schedule.warmup_steps": 6}, invalid))  # and is killed here
    assert make_controller(store, InProcessExecutor(SimulatedWorker)).run()
    assert [result.reason for result in store.results] == ["not_valid", ""]


def test_checkpoints_of_finished_trials_are_removed(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    make_controller(store, InProcessExecutor(SimulatedWorker)).run()
    assert list(store.folder.rglob("checkpoint-*")) == []


def pruned_config(**changes: Any) -> SweepConfig:
    search = {"space": {"adapter.rank": list(range(16, 0, -1))}, "pruner": "asha"}
    return sweep_config(search=search, trial__steps=16, **changes)


def test_a_pruned_trial_gives_up_its_slot_at_once(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", pruned_config(resources__slots_per_pack=4))
    assert make_controller(store, InProcessExecutor(SimulatedWorker), num_workers=1).run()
    results = {result.number: result for result in store.results}
    assert finished(store) == [0]  # the ranks fall, and less rank is more loss
    assert {results[number].steps for number in range(1, 16)} == {1}
    assert {results[number].reason for number in range(1, 16)} == {"asha"}
    trained = {number: max(p["step"] for p in store.points(number)) for number in results}
    assert trained == {0: 16} | dict.fromkeys(range(1, 16), 1)
    packs = [event for event in store.pack_events if event["what"] == "start"]
    assert len(packs) == 1
    assert list(store.folder.rglob("checkpoint-*")) == []


class AnswersAfterAVerdict(InProcessExecutor):
    """Pack 1 runs ahead until its answer has an event of this kind. That answer is under way while
    pack 0 comes to its first rung, where trials of pack 1 are stopped."""

    def __init__(self, kind: type[Checkpointed] | type[TrialDone]) -> None:
        super().__init__(SimulatedWorker)
        self.written: list[Path] = []
        self.kept = False
        self._kind = kind
        self._under_way: list[tuple[int, list[Event]]] = []
        self._begun = self._at_rung = False

    def poll(self, timeout_s: float) -> list[tuple[int, list[Event]]]:
        if self._under_way and self._at_rung:
            self.kept = all(folder.exists() for folder in self.written)
            answers, self._under_way = self._under_way, []
            return answers
        if not self.written:
            self._due = dict(sorted(self._due.items(), reverse=self._begun))
            self._begun = True
        answers = super().poll(timeout_s)
        events = [event for _, found in answers for event in found]
        self._at_rung |= bool(self.written) and any(isinstance(e, Evaluated) for e in events)
        if self.written or not any(isinstance(event, self._kind) for event in events):
            return answers
        self._under_way = answers
        self.written = [
            Path(event.folder if isinstance(event, Checkpointed) else event.adapter_dir)
            for event in events
            if isinstance(event, Checkpointed | TrialDone)
        ]
        return []


@pytest.mark.parametrize("kind", [Checkpointed, TrialDone])
def test_files_of_a_stopped_trial_go_only_once_its_pack_has_answered(
    tmp_path: Path, kind: type[Checkpointed] | type[TrialDone]
) -> None:
    search = {"space": {"adapter.rank": [16, 8, 4, 2]}, "pruner": "asha"}
    config = sweep_config(search=search, resources__slots_per_pack=2)
    store = make_store(tmp_path / "run", config)
    executor = AnswersAfterAVerdict(kind)
    assert make_controller(store, executor, num_workers=2).run()
    assert [result.state for result in store.results] == ["finished"] + ["pruned"] * 3
    assert len(executor.written) == 2  # of trials 2 and 3
    assert executor.kept, "who writes there would fail"
    assert list(store.folder.rglob("checkpoint-*")) == []
    assert list(store.folder.rglob("adapter")) == [store.folder / store.results[0].adapter_dir]


def test_a_pruned_trial_never_wins_and_is_spoken_of(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", pruned_config())
    assert make_controller(store, InProcessExecutor(SimulatedWorker)).run()
    winner = select_winner(store.trials, store.results)
    assert winner is not None
    assert winner.trial == 0
    assert "of 1 finished trial; 15 trials were stopped early" in winner.reason


def test_each_verdict_is_recorded_with_its_reason(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", pruned_config())
    make_controller(store, InProcessExecutor(SimulatedWorker)).run()
    verdicts = [d for d in store.decisions if d["action"] in ("keep_trial", "stop_trial")]
    assert len(verdicts) == 17  # all at the first rung, one at the second
    assert verdicts[1]["facts"] == {
        "trial": 1,
        "rung": 1,
        "eval_loss": store.results[1].eval_loss,
    }
    assert "is the 2nd of 2 so far, and is not among the best 1" in verdicts[1]["reason"]


def test_an_extended_sweep_reuses_all_that_is_there(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    make_controller(store, InProcessExecutor(SimulatedWorker)).run()
    before = {path: path.stat().st_mtime_ns for path in store.folder.rglob("result.json")}
    store.write("done", {})
    store.write("winner", {})
    wider = {"quant.bit_width": [4, 16], "adapter.rank": [4, 16, 32]}
    store.change_config(sweep_config(search__space=wider))
    assert store.read("done") is store.read("winner") is None
    again = RunStore.open(store.folder)
    assert make_controller(again, InProcessExecutor(SimulatedWorker)).run()
    after = {path: path.stat().st_mtime_ns for path in store.folder.rglob("result.json")}
    assert {path: after[path] for path in before} == before
    assert [(t.number, t.config.quant.bit_width, t.config.adapter.rank) for t in again.trials][
        4:
    ] == [(4, 4, 32), (5, 16, 32)]
    (extension,) = [d for d in again.decisions if d["action"] == "extend"]
    assert extension["reason"] == "search.space.adapter.rank: [4, 16] -> [4, 16, 32]"


def test_a_trial_that_breaks_a_constraint_takes_no_slot_and_the_rest_is_trained(
    tmp_path: Path,
) -> None:
    config = sweep_config(
        search={"space": {"adapter.rank": [4, 64]}, "constraints": {"adapter_mb": 200}}
    )
    store = make_store(tmp_path / "run", config)
    executor = InProcessExecutor(SimulatedWorker)
    assert make_controller(store, executor, num_workers=1, given=on_gpus(config)).run()
    assert [(r.number, r.state, r.reason) for r in store.results] == [
        (0, "finished", ""),
        (1, "failed", "constraint"),
    ]
    (told,) = [d for d in store.decisions if d["subject"] == "trial 1"]
    assert "search.constraints.adapter_mb allows 200" in told["reason"]
    assert not (store.trial_dir(1) / "attempts").exists()

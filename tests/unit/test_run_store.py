import json
import math
import multiprocessing
import os
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from orchestrator.errors import RunFolderError
from orchestrator.files import (
    append_json_line,
    file_digest,
    read_json_lines,
    whole_folder,
    write_file,
    write_json,
)
from orchestrator.records import (
    Arithmetic,
    Assign,
    Evaluated,
    GroupPlace,
    Progress,
    SlotTask,
    TrialDone,
    TrialResult,
    TrialSpec,
)
from orchestrator.sweep.results import finished_result
from orchestrator.sweep.run_store import RunStore
from orchestrator.sweep.selection import select_winner
from orchestrator.sweep.simulated import SimulatedWorker
from tests.sweeps import make_store, pack_plan, pack_spec, sweep_config


def result(number: int, eval_loss: float | None, **changes: object) -> TrialResult:
    values = {"number": number, "state": "finished", "attempt": 1, "time": 0.0}
    values |= {"eval_loss": eval_loss, "baseline_eval_loss": 4.0, **changes}
    return TrialResult(**values)  # type: ignore[arg-type]


def trial(number: int, bit_width: int = 4) -> TrialSpec:
    return TrialSpec(number, {}, sweep_config(trial__quant__bit_width=bit_width).trial)


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    spec = TrialSpec(3, {"adapter.rank": 4}, sweep_config().trial)
    store.add_trial(spec)
    store.finish_trial(result(3, 1.5))
    again = RunStore.open(store.folder)
    assert again.sweep == store.sweep
    assert again.trials == [spec]
    assert again.results == [result(3, 1.5)]


def test_trials_and_results_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    for number in (1001, 101, 1000, 99):
        store.add_trial(trial(number))
        store.finish_trial(result(number, 1.5))
    assert [one.number for one in store.trials] == [99, 101, 1000, 1001]
    assert [one.number for one in store.results] == [99, 101, 1000, 1001]


def test_a_refusal_without_its_trial_is_of_a_start_that_was_killed(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    store.add_trial(trial(0), result(0, 1.5))
    assert store.results == [result(0, 1.5)]
    (store.trial_dir(0) / "trial.json").unlink()
    assert store.results == []
    store.add_trial(trial(0))  # which this start takes
    assert (store.trials, store.results) == ([trial(0)], [])


def test_a_finished_trial_never_changes(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    store.add_trial(trial(0))
    store.finish_trial(result(0, 1.5))
    with pytest.raises(RunFolderError, match="trial 0 is over"):
        store.finish_trial(result(0, 1.0))
    assert store.results == [result(0, 1.5)]


def test_a_folder_of_the_same_sweep_is_to_be_resumed_not_started(tmp_path: Path) -> None:
    make_store(tmp_path / "my run", sweep_config())
    words = re.escape(f"orchestrator resume '{tmp_path / 'my run'}'")
    with pytest.raises(RunFolderError, match=f"already holds this sweep.*{words}"):
        make_store(tmp_path / "my run", sweep_config())


def test_a_folder_of_another_sweep_is_refused_with_what_differs(tmp_path: Path) -> None:
    make_store(tmp_path / "run", sweep_config())
    with pytest.raises(RunFolderError, match=r"trial.steps: 6 -> 9.*another --run-dir"):
        make_store(tmp_path / "run", sweep_config(trial__steps=9))


def test_a_folder_without_a_sweep_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run folder"):
        RunStore.open(tmp_path)


def _hold(folder: Path, held: "multiprocessing.synchronize.Event") -> None:
    with RunStore.open(folder).locked():
        held.set()
        multiprocessing.Event().wait(60)


def test_a_folder_in_use_is_refused_until_its_process_is_gone(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=(store.folder, held))
    process.start()
    assert held.wait(30)
    with pytest.raises(RunFolderError, match="in use by another process"), store.locked():
        pass
    process.kill()
    process.join()
    with store.locked():
        pass


def test_attempts_are_numbered_and_checkpoints_found_furthest_first(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    for attempt, steps in ((1, (2, 4)), (2, (6,)), (3, (4,))):
        number, folder = store.start_attempt(0, Arithmetic(1, 8, False))
        assert number == attempt
        for step in steps:
            write_json(folder / f"checkpoint-{step:08d}" / "checkpoint.json", {})
    (folder / "checkpoint-00000009").mkdir()  # cut off before it was complete
    found = [(int(path.parent.name), path.name[-1]) for path in store.checkpoints(0)]
    assert found == [(2, "6"), (3, "4"), (1, "4"), (1, "2")]


def test_what_a_trial_was_trained_with_is_that_of_the_attempt_that_got_furthest(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    assert store.arithmetic(0) is None
    for world_size, steps in ((1, 2), (2, 6), (3, 4)):
        _, folder = store.start_attempt(0, Arithmetic(world_size, 8, True))
        assert (store.arithmetic(0) is None) == (world_size == 1)
        write_json(folder / f"checkpoint-{steps:08d}" / "checkpoint.json", {})
    assert store.arithmetic(0) == Arithmetic(2, 8, True)


def test_a_checkpoint_that_cannot_be_removed_keeps_no_other(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    _, folder = store.start_attempt(0, Arithmetic(1, 8, False))
    (folder / "checkpoint-00000002").symlink_to(tmp_path)  # which rmtree refuses
    for step in (1, 3):
        write_json(folder / f"checkpoint-{step:08d}" / "checkpoint.json", {})
    store.drop_files(result(0, 1.0))
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-00000002"]


def test_a_curve_shows_the_latest_attempt_where_attempts_overlap(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    for attempt, step, loss in ((1, 1, 3.0), (1, 2, 2.0), (2, 2, 2.5), (2, 3, 1.0)):
        store.add_point(Progress(0, attempt, 0.0, step, 10, loss, 1e-3, 1.0, 5.0))
    store.add_point(Evaluated(0, 2, 0.0, 3, 10, 1.5))
    losses = [point["train_loss"] for point in store.points(0) if point["kind"] == "progress"]
    assert losses == [3.0, 2.5, 1.0]


def test_a_line_that_a_kill_cut_off_loses_no_other(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_json_line(path, {"n": 1})
    with path.open("a") as file:
        file.write('{"n": 2, "cut')
    append_json_line(path, {"n": 3})
    assert read_json_lines(path) == [{"n": 1}, {"n": 3}]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"n": 1})

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        write_file(path, fail)
    assert json.loads(path.read_text()) == {"n": 1}
    assert [other.name for other in tmp_path.iterdir()] == ["record.json"]


def test_weights_can_be_read_by_all_who_can_read_the_records_beside_them(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        save_file({"a": np.zeros(1)}, path)

    old = os.umask(0o027)
    try:
        write_json(tmp_path / "record.json", {})
        write_file(tmp_path / "weights.safetensors", fill)
        with whole_folder(tmp_path / "out") as temporary:
            fill(temporary / "weights.safetensors")
    finally:
        os.umask(old)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.*")}
    assert modes == {0o640}


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    def fill(fail: bool) -> None:
        with whole_folder(tmp_path / "out") as temporary:
            (temporary / "a").write_text("a")
            if fail:
                raise ValueError("half way")

    with pytest.raises(ValueError, match="half"):
        fill(fail=True)
    assert list(tmp_path.iterdir()) == []
    fill(fail=False)
    assert file_digest(tmp_path / "out" / "a") == (
        "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    )


def test_the_least_loss_wins_and_nan_and_failures_never_do() -> None:
    results = [
        result(0, math.nan),
        result(1, 2.0),
        result(2, 1.0),
        result(3, 0.5, state="failed"),
    ]
    winner = select_winner([trial(n) for n in range(4)], results)
    assert winner is not None
    assert winner.trial == 2
    assert "1.0000" in winner.reason
    assert "next is trial 1" in winner.reason


def test_ties_go_to_fewer_bits_then_the_smaller_adapter_then_the_earlier_trial() -> None:
    specs = [trial(0, 16), trial(1, 4), trial(2, 4), trial(3, 4)]
    results = [
        result(0, 1.0, num_adapter_params=1),
        result(1, 1.0, num_adapter_params=9),
        result(2, 1.0, num_adapter_params=5),
        result(3, 1.0, num_adapter_params=5),
    ]
    winner = select_winner(specs, results)
    assert winner is not None
    assert winner.trial == 2


def test_without_a_finite_loss_there_is_no_winner() -> None:
    assert select_winner([trial(0)], [result(0, math.inf)]) is None
    assert select_winner([], []) is None


def test_a_trial_that_was_trained_before_its_run_folder_was_moved_is_finished_after(
    tmp_path: Path,
) -> None:
    """Its verdict was due when the sweep ended."""
    store = make_store(tmp_path / "run", sweep_config(trial__steps=2))
    spec = trial(0)
    store.add_trial(spec)
    _, folder = store.start_attempt(0, Arithmetic(1, 1, False))
    worker = SimulatedWorker(pack_spec(0, pack_plan(spec.config, 1)), GroupPlace(0, 1))
    worker.advance([Assign(SlotTask(0, 1, spec.config, str(folder)))])
    events = [event for _ in range(spec.config.steps) for event in worker.advance([])]
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    store.add_done_event(done)
    store.folder.rename(tmp_path / "elsewhere")
    moved = RunStore.open(tmp_path / "elsewhere")
    result = finished_result(moved, moved.done_events[0])
    assert (moved.folder / result.adapter_dir / "adapter_config.json").exists()

"""What a driver prints of its trials is read back into the same table elsewhere."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jobs.display import SweepDisplay, results_table
from jobs.followed import FollowedSweep
from jobs.progress import FORMS, TRAINED, Row, line, read_line, sweep_table
from orchestrator.files import write_json
from orchestrator.records import (
    Answered,
    Arithmetic,
    Decision,
    Evaluated,
    PackQueued,
    PackStanding,
    Standing,
    TrialResult,
)
from orchestrator.search.space import ask
from orchestrator.search_config import SearchConfig
from orchestrator.sweep.executor import InProcessExecutor
from orchestrator.sweep.simulated import SimulatedWorker
from tests.sweeps import make_controller, make_store, sweep_config

values = st.none() | st.floats(allow_nan=False, min_value=-1e9, max_value=1e9)
words = st.from_regex(r"[^\n\r]*", fullmatch=True)
counts = st.integers(0, 10**6)
rows = st.builds(
    Row,
    number=counts,
    bits=st.sampled_from([4.0, 4.5, 8.0, 16.0]),
    rank=counts,
    steps=counts,
    also=st.sampled_from(["", "lr 0.0001, alpha 8", r"rank_pattern layers\.(0|1): 4; (v): 2"]),
    step=counts,
    train_loss=values,
    eval_loss=values,
    tokens_per_s=values,
    eta_s=st.none() | st.integers(0, 10**6),
    reason=st.sampled_from(["out_of_memory", "raised"]),
    message=words,
)


@given(rows, st.sampled_from(sorted(FORMS)))
def test_a_line_that_is_printed_can_be_read(row: Row, form: str) -> None:
    text = line(row, form)
    read = read_line(text, {})
    assert read is not None
    assert line(read, form) == text
    assert read.also == row.also
    assert read.state == FORMS[form]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "trial 1",
        "trial 1 (4-bit, rank 8): did something new at step 3/4",
        "pack 0: base loaded in 1 s",
        "| 0 | 4 | 16 | 2.1 |",
    ],
)
def test_a_line_that_tells_of_no_trial_is_left_alone(text: str) -> None:
    known: dict[int, Row] = {}
    assert read_line(text, known) is None
    assert known == {}


def screen(width: int = 110) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells(followed: FollowedSweep) -> str:
    console = screen()
    console.print(followed.table())
    return shown(console)


def test_a_sweep_that_is_followed_has_the_table_that_it_has_where_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    display = SweepDisplay(store)
    with display.shown():
        executor = InProcessExecutor(SimulatedWorker)
        assert make_controller(store, executor, observe=display.observe).run()
    console = screen()
    followed = FollowedSweep("sums", console)
    followed.take(capsys.readouterr().out)
    table = cells(followed)
    assert [result.state for result in store.results] == ["finished"] * 4
    for result in store.results:
        assert f"{result.eval_loss:.4f}" in table
    assert table.count("6/6") == table.count("finished") == 4
    assert "step 6/6" not in shown(console)
    assert "base loaded" in shown(console)


def test_a_driver_that_is_started_again_says_what_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    executor = InProcessExecutor(SimulatedWorker)
    assert make_controller(store, executor).run()
    with SweepDisplay(store).shown():
        followed = FollowedSweep("sums", screen())
        followed.take(capsys.readouterr().out)
    assert cells(followed).count("finished") == 4


def test_a_trial_that_waits_to_be_resumed_is_shown_at_the_step_it_goes_on_from(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    for number in range(2):
        store.add_trial(ask(store.sweep.config, store.trials, []))
        _, attempt = store.start_attempt(number, Arithmetic(1, 8, False))
        if number == 1:
            write_json(attempt / "checkpoint-00000004" / "checkpoint.json", {})
    console = screen()
    console.print(SweepDisplay(store).table())
    assert "0/6" in shown(console)
    assert "4/6" in shown(console)
    assert shown(console).count("waiting") == 2


def test_a_trial_that_failed_is_in_the_table_and_said_above_it() -> None:
    console = screen()
    followed = FollowedSweep("sums", console)
    followed.take("trial 3 (4-bit, rank 8): failed at step 2/6: raised: it broke: badly")
    assert "failed: raised" in cells(followed)
    assert "it broke: badly" in shown(console)


def test_a_trial_that_starts_again_trains_again() -> None:
    row = Row(1, 4, 8, 6, step=3, train_loss=2.5, tokens_per_s=1234.0, eta_s=75)
    known: dict[int, Row] = {}
    read_line(line(row, TRAINED), known)
    read_line("trial 1 (4-bit, rank 8): training from step 2/6", known)
    console = screen()
    console.print(sweep_table("t", known.values(), 25))
    assert "2/6" in shown(console)
    assert "training" in shown(console)


def test_a_trial_that_answers_its_questions_says_how_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    trial = ask(store.sweep.config, [], [])
    store.add_trial(trial)
    display = SweepDisplay(store)
    display.observe(Evaluated(0, 1, 100.0, 6, 60, 2.5))
    display.observe(Answered(0, 1, 116.0, 3, 16))
    followed = FollowedSweep("sums", screen())
    followed.take(capsys.readouterr().out)
    assert "answers 3/16" in cells(followed)
    followed.take("trial 0 (4-bit, rank 4): training from step 4/6")
    assert "answers" not in cells(followed)


def test_the_last_table_has_right_answers_where_trials_gave_some() -> None:
    trial = ask(sweep_config(), [], [])
    result = TrialResult(0, "finished", 1, 0.0, eval_loss=1.0, baseline_eval_loss=2.0)
    console = screen(80)
    console.print(results_table([trial], [result], SearchConfig()))
    assert "right" not in shown(console)
    scored = replace(result, task_score=0.25, adapter_bytes=10**9, tokens_per_s=99_999.0)
    console.print(results_table([trial], [scored], SearchConfig()))
    assert "right" in shown(console)
    assert "25.0%" in shown(console)
    assert "…" not in shown(console), "on a screen of 80 columns"


RATES = {"optimizer.learning_rate": [1e-4, 1e9]}


def test_the_live_lines_and_table_tell_trials_apart_by_every_searched_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "run", sweep_config(search__space=RATES))
    display = SweepDisplay(store)
    with display.shown():
        executor = InProcessExecutor(SimulatedWorker)
        assert make_controller(store, executor, observe=display.observe).run()
    printed = capsys.readouterr().out
    assert "trial 0 (4-bit, rank 16, lr 0.0001): step 6/6" in printed
    assert "trial 1 (4-bit, rank 16, lr 1e+09): step 6/6" in printed
    followed = FollowedSweep("sums", screen())
    followed.take(printed)
    for table in (display.table(), followed.table()):
        console = screen(80)
        console.print(table)
        rows = [line for line in shown(console).splitlines() if line.startswith("│")]
        assert ["lr 0.0001" in rows[-2], "lr 1e+09" in rows[-1]] == [True, True]
        assert "…" not in shown(console), "on a screen of 80 columns"


def test_a_live_row_of_a_searched_rate_is_one_line_of_80_columns() -> None:
    row = Row(0, 4, 16, 120, "training", 100, 2.333, 2.4444, 12345, 75, also="lr 0.0001")
    console = screen(80)
    console.print(sweep_table("t", [row], 25))
    (text,) = [line for line in shown(console).splitlines() if "100/120" in line]
    for cell in ("lr 0.0001", "2.333", "2.4444", "12,345", "training", "1:15"):
        assert cell in text


def test_the_last_table_has_a_column_for_each_searched_field() -> None:
    space = RATES | {"adapter.target_modules": [["q_proj", "v_proj"], ["[up_proj]"]]}
    config = sweep_config(search__space=space)
    trials = [ask(config, [], [])]
    trials.append(replace(trials[0], number=1, params={"optimizer.learning_rate": 1e9}))
    results = [
        TrialResult(number, "finished", 1, 0.0, eval_loss=1.0, baseline_eval_loss=2.0)
        for number in range(2)
    ]
    console = screen()
    console.print(results_table(trials, results, SearchConfig()))
    table = [[cell.strip() for cell in line.split("│")] for line in shown(console).splitlines()]
    assert [row[4:6] for row in table if row[1:2] in (["0"], ["1"])] == [
        ["q_proj,v_proj", "0.0001"],
        ["-", "1e+09"],
    ]


def test_the_last_table_of_a_searched_rate_fits_80_columns() -> None:
    trials = [ask(sweep_config(search__space=RATES), [], [])]
    result = TrialResult(0, "finished", 1, 0.0, eval_loss=1.0, baseline_eval_loss=2.0)
    scored = replace(result, task_score=0.25, adapter_bytes=10**9, tokens_per_s=99_999.0)
    console = screen(80)
    console.print(results_table(trials, [scored], SearchConfig()))
    (row,) = [line for line in shown(console).splitlines() if "finished" in line]
    for cell in ("0.0001", "1.0000", "25.0%", "99,999", "953.7"):
        assert cell in row


def test_the_last_table_begins_with_the_winner_and_ends_with_what_cannot_win() -> None:
    spec = ask(sweep_config(), [], [])
    trials = [replace(spec, number=number) for number in range(3)]
    finished = TrialResult(0, "finished", 1, 0.0, eval_loss=1.0, baseline_eval_loss=2.0)
    results = [
        replace(finished, task_score=0.25),
        replace(finished, number=1, eval_loss=1.5, task_score=0.75),
        replace(finished, number=2, state="pruned", eval_loss=0.5),
    ]
    console = screen()
    search = SearchConfig(objectives=("task_score",))
    console.print(results_table(trials, results, search))
    order = [line.split()[1] for line in shown(console).splitlines() if line.startswith("│")]
    assert order == ["1", "0", "2"]


def test_a_small_screen_has_the_trials_that_train_and_counts_the_others() -> None:
    known = {number: Row(number, 4, 8, 6, "finished", 6, eval_loss=1.0) for number in range(50)}
    known |= {number: Row(number, 4, 8, 6) for number in range(50, 60)}
    known[37].state = "training"
    console = screen()
    console.print(sweep_table("t", known.values(), 12))
    text = shown(console)
    assert len(text.splitlines()) < 12
    assert "37" in text
    assert "60 trials: 1 training, 10 waiting, 49 finished" in text


def test_failed_trials_of_the_run_folder_keep_their_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    store.add_trial(ask(store.sweep.config, [], []))
    store.finish_trial(TrialResult(0, "failed", 1, 0.0, "loss_not_finite", "at step 2", steps=2))
    with SweepDisplay(store).shown():
        printed = capsys.readouterr().out
    assert "failed at step 2/6: loss_not_finite: at step 2" in printed


def test_the_display_says_what_was_learnt_or_given_up_and_how_long_the_rest_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    display = SweepDisplay(make_store(tmp_path / "run", sweep_config()))
    display.observe(Standing(4, 0, 0, 0, (), left_s=None))
    assert capsys.readouterr().out == ""
    display.observe(Standing(3, 0, 0, 0, (), left_s=7800.0))
    display.observe(Standing(2, 0, 0, 0, (), left_s=7790.0))
    display.observe(Decision(0.0, "learn_speed", "16-bit on H200", "durations x 1.13"))
    display.observe(Decision(0.0, "give_up_pack", "pack 3", "it hangs"))
    display.observe(Decision(0.0, "split_pack", "pack 4", "it raised"))
    display.observe(Decision(0.0, "share", "sweep", "may use 2 of 4 GPUs"))
    display.observe(Decision(0.0, "yield_pack", "pack 5", "gives way"))
    assert capsys.readouterr().out.splitlines() == [
        "about 2:10:00 left",
        "16-bit on H200: durations x 1.13",
        "pack 3: it hangs",
        "pack 4: it raised",
        "sweep: may use 2 of 4 GPUs",
        "pack 5: gives way",
    ]


def test_packs_that_wait_for_the_cluster_are_one_line_until_none_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    display = SweepDisplay(make_store(tmp_path / "run", sweep_config()))
    display.observe(PackQueued(0, "waits"))
    display.observe(PackQueued(1, "waits"))
    display.observe(Standing(4, 0, 0, 0, (PackStanding(1, 2, (), 0),)))
    display.observe(PackQueued(2, "waits"))
    display.observe(Standing(4, 0, 0, 0, ()))
    display.observe(PackQueued(3, "waits"))
    assert capsys.readouterr().out.splitlines() == ["pack 0: waits", "pack 3: waits"]

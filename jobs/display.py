"""Where a person follows a sweep: one live table in a terminal, plain lines elsewhere.

A Display (orchestrator/sweep/flow.py). In: events. Out: text on stdout, nothing else.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jobs.progress import (
    ANSWERED,
    ENDS,
    EVALUATED,
    FAILED,
    FINISHED,
    OPENED,
    PRUNED,
    TIGHT,
    TRAINED,
    Row,
    duration,
    line,
    number,
    sweep_table,
)
from orchestrator.records import (
    Answered,
    Decision,
    Evaluated,
    Notice,
    PackLost,
    PackQueued,
    PackReady,
    Progress,
    Standing,
    TrialDone,
    TrialOpened,
    TrialPruned,
    TrialResult,
    TrialSpec,
    TrialStopped,
)
from orchestrator.search_config import SearchConfig
from orchestrator.sweep.run_store import RunStore, checkpoint_step
from orchestrator.sweep.selection import ranking
from orchestrator.tracking.translation import beyond_bits_and_rank, brief, searched, title_parts

PLAIN_PROGRESS_EVERY_S = 15.0
PLAIN_LEFT_EVERY_S = 60.0
# Decisions that are said beside a live table, too.
SAID = ("share", "yield_pack", "give_up_pack", "split_pack")


class SweepDisplay:
    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._console = Console()
        self._rows: dict[int, Row] = {}
        self._first: dict[int, Progress] = {}
        """First report of this process, by trial: what it is from there to the end is guessed."""
        self._live: Live | None = None
        self._printed: dict[int, float] = {}
        self._left_s: float | None = None
        self._queued: set[int] = set()
        self._left_printed = -PLAIN_LEFT_EVERY_S
        self._refresh_rows()

    @contextmanager
    def shown(self) -> Iterator[None]:
        if not sys.stdout.isatty():
            for row in self._rows.values():  # what is over before this process begins
                if row.state in ENDS:
                    self.say(line(row, ENDS[row.state]))
            yield
            return
        with Live(
            get_renderable=self.table, console=self._console, refresh_per_second=2
        ) as self._live:
            yield
        self._live = None

    def say(self, line: str | Table) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def observe(self, event: Notice) -> None:
        trial = getattr(event, "trial", None)
        if isinstance(event, PackReady) or (trial is not None and trial not in self._rows):
            self._refresh_rows()
        if isinstance(event, Standing):
            self._left_s = event.left_s
            self._queued &= {pack.pack for pack in event.packs}
        if trial is not None:
            self._update(self._rows[trial], event)
        if (
            self._live is None
            or isinstance(event, PackQueued | PackReady | PackLost | TrialStopped)
            or (isinstance(event, Decision) and event.action in SAID)
        ):
            self._print(event)

    def _refresh_rows(self) -> None:
        for trial in self._store.trials:
            if trial.number not in self._rows:
                self._rows[trial.number] = self._row(trial)
        for result in self._store.results:
            row = self._rows[result.number]
            row.state, row.step, row.eval_loss = result.state, result.steps, result.eval_loss
            row.tokens_per_s = result.tokens_per_s or None
            row.reason, row.message = result.reason, result.message

    def _row(self, trial: TrialSpec) -> Row:
        """Of a trial that waits: at the step that a resume goes on from."""
        config = trial.config
        also = ", ".join(title_parts(beyond_bits_and_rank(trial.params)))
        row = Row(
            trial.number, config.quant.mean_bits, config.adapter.rank, config.steps, also=also
        )
        for furthest in self._store.checkpoints(trial.number)[:1]:
            row.step = checkpoint_step(furthest)
        return row

    def _update(self, row: Row, event: Notice) -> None:
        match event:
            case TrialOpened():
                row.state, row.step, row.questions = "training", event.step, 0
                self._first.pop(row.number, None)
            case Progress():
                row.state, row.step = "training", event.step
                row.train_loss, row.tokens_per_s = event.train_loss, event.tokens_per_s
                row.eta_s = self._eta_s(row, event)
            case Evaluated():
                row.step, row.eval_loss = event.step, event.eval_loss
            case Answered():
                row.answered, row.questions = event.num_answered, event.num_questions
            case TrialDone():
                row.state, row.step, row.eval_loss = "finished", event.steps, event.eval_loss
                row.tokens_per_s = event.tokens_per_s
            case TrialPruned():
                row.state, row.step, row.eval_loss = "pruned", event.rung, event.eval_loss
                row.message = event.reason
            case TrialStopped():
                row.state, row.reason, row.message = "failed", event.reason, event.message
            case _:
                pass

    def _eta_s(self, row: Row, event: Progress) -> float | None:
        first = self._first.setdefault(row.number, event)
        if event.step <= first.step:
            return None
        return (event.time - first.time) / (event.step - first.step) * (row.steps - event.step)

    def table(self) -> Table:
        title = self._store.folder.name
        if self._left_s is not None:
            title += f", about {duration(self._left_s)} left"
        return sweep_table(title, self._rows.values(), self._console.height)

    def _print(self, event: Notice) -> None:
        match event:
            case PackQueued():
                if not self._queued:  # one line for all that wait
                    self.say(f"pack {event.pack}: {event.reason}")
                self._queued.add(event.pack)
            case PackReady():
                self._queued.discard(event.pack)
                self.say(
                    f"pack {event.pack}: base loaded in {event.load_s:.0f} s, "
                    f"{event.num_base_params / 1e6:,.0f} M weights in "
                    f"{event.base_bytes / 2**20:,.0f} MiB; untrained held-out loss "
                    f"{event.baseline_eval_loss:.4f}; step program {event.step_program}"
                    + (f" ({event.note})" if event.note else "")
                )
                if event.base_note:
                    self.say(f"pack {event.pack}: {event.base_note}")
            case Decision() if event.action in ("learn_speed", *SAID):
                self.say(f"{event.subject}: {event.reason}")
            case Standing() if event.left_s is not None:
                if time.monotonic() - self._left_printed >= PLAIN_LEFT_EVERY_S:
                    self._left_printed = time.monotonic()
                    self.say(f"about {duration(event.left_s)} left")
            case PackLost():
                self.say(f"pack {event.pack}: lost: {event.reason}: {event.message}")
            case TrialOpened():
                self.say(line(self._rows[event.trial], OPENED))
            case Progress() if self._is_due(event):
                self.say(line(self._rows[event.trial], TRAINED))
            case Evaluated() if event.step:
                self.say(line(self._rows[event.trial], EVALUATED))
            case Answered() if self._is_due(event):
                self.say(line(self._rows[event.trial], ANSWERED))
            case TrialDone():
                self.say(line(self._rows[event.trial], FINISHED))
            case TrialPruned():
                self.say(line(self._rows[event.trial], PRUNED))
            case TrialStopped():
                self.say(line(self._rows[event.trial], FAILED))
            case _:
                pass

    def _is_due(self, event: Progress | Answered) -> bool:
        if event.time - self._printed.get(event.trial, 0.0) < PLAIN_PROGRESS_EVERY_S:
            return False
        self._printed[event.trial] = event.time
        return True


def results_table(
    trials: list[TrialSpec], results: list[TrialResult], search: SearchConfig
) -> Table:
    """The end of a sweep: the winner first, those that cannot win last."""
    specs = {trial.number: trial for trial in trials}
    best = ranking(trials, results, search)
    may_win = {result.number for result in best}
    rest = [result for result in results if result.number not in may_win]
    rest.sort(key=lambda result: (result.eval_loss is None, result.eval_loss or 0.0))
    others = {trial.number: searched(beyond_bits_and_rank(trial.params)) for trial in trials}
    names = list(dict.fromkeys(name for found in others.values() for name in found))
    table = Table(padding=TIGHT if names else (0, 1))
    scored = any(result.task_score is not None for result in results)
    heads = ["trial", "bits", "rank", *(name.replace("_", "\n") for name in names)]
    heads += ["eval\nloss", "gain", *(["right"] if scored else []), "tokens/s", "MiB", "state"]
    for name in heads:
        table.add_column(name, justify="left" if name == "state" else "right", overflow="fold")
    for result in [*best, *rest]:
        config, other = specs[result.number].config, others[result.number]
        gain = (result.baseline_eval_loss or 0.0) - (result.eval_loss or 0.0)
        finished = result.state == "finished"
        table.add_row(
            str(result.number),
            str(config.quant.mean_bits),
            str(config.adapter.rank),
            # A dash where a condition leaves the field as the trial is written.
            *(Text(brief(other[name]) if name in other else "-") for name in names),
            number(result.eval_loss, ".4f"),
            number(gain if finished else None, ".4f"),
            *([number(result.task_score, ".1%")] if scored else []),
            number(result.tokens_per_s if finished else None, ",.0f"),
            f"{result.adapter_bytes / 2**20:.1f}" if finished else "",
            _outcome(result),
        )
    return table


def _outcome(result: TrialResult) -> str:
    if result.state == "pruned":
        return f"pruned at step {result.steps}"
    return result.state if result.state == "finished" else f"failed: {result.reason}"


def command_name() -> str:
    """How to call this command again: by name, or by path where it is not on PATH."""
    called = Path(sys.argv[0])
    found = shutil.which("orchestrator")
    if called.name != "orchestrator" or (found and Path(found).samefile(called)):
        return "orchestrator"
    return str(shown_path(called.absolute()))


def shown_path(path: Path) -> Path:
    """Relative to the working folder where that is shorter to read."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

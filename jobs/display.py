"""Where a person follows a sweep: one live table in a terminal, plain lines elsewhere.

A Display (orchestrator/sweep/flow.py). In: events. Out: text on stdout, nothing else.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from orchestrator.records import (
    Evaluated,
    Notice,
    PackLost,
    PackReady,
    Progress,
    TrialDone,
    TrialOpened,
    TrialResult,
    TrialSpec,
    TrialStopped,
)
from orchestrator.sweep.run_store import RunStore

PLAIN_PROGRESS_EVERY_S = 15.0


@dataclass
class _Row:
    trial: TrialSpec
    state: str = "waiting"
    step: int = 0
    train_loss: float | None = None
    eval_loss: float | None = None
    tokens_per_s: float | None = None
    started: tuple[float, int] | None = None
    """Time and step of the first report of this process."""

    @property
    def eta_s(self) -> float | None:
        if self.state != "training" or self.started is None:
            return None
        since, first = self.started
        if self.step <= first:
            return None
        return (time.time() - since) / (self.step - first) * (self.trial.config.steps - self.step)


class SweepDisplay:
    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._console = Console()
        self._rows: dict[int, _Row] = {}
        self._live: Live | None = None
        self._printed: dict[int, float] = {}
        self._refresh_rows()

    @contextmanager
    def shown(self) -> Iterator[None]:
        if not sys.stdout.isatty():
            yield
            return
        with Live(
            get_renderable=self._table, console=self._console, refresh_per_second=2
        ) as self._live:
            yield
        self._live = None

    def say(self, line: str | Table) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def observe(self, event: Notice) -> None:
        number = getattr(event, "trial", None)
        if isinstance(event, PackReady) or (number is not None and number not in self._rows):
            self._refresh_rows()
        if number is not None:
            self._update(self._rows[number], event)
        if self._live is None or isinstance(event, PackReady | PackLost | TrialStopped):
            self._print(event)

    def _refresh_rows(self) -> None:
        for trial in self._store.trials:
            self._rows.setdefault(trial.number, _Row(trial))
        for result in self._store.results:
            row = self._rows[result.number]
            row.state, row.step, row.eval_loss = result.state, result.steps, result.eval_loss

    @staticmethod
    def _update(row: _Row, event: Notice) -> None:
        match event:
            case TrialOpened():
                row.state, row.step = "training", event.step
            case Progress():
                row.state, row.step = "training", event.step
                row.train_loss, row.tokens_per_s = event.train_loss, event.tokens_per_s
                row.started = row.started or (event.time, event.step)
            case Evaluated():
                row.eval_loss = event.eval_loss
            case TrialDone():
                row.state, row.eval_loss = "finished", event.eval_loss
                row.tokens_per_s = event.tokens_per_s
            case TrialStopped():
                row.state = f"failed: {event.reason}"
            case _:
                pass

    def _table(self) -> Table:
        table = Table(title=self._store.folder.name)
        for name in (
            "trial",
            "bits",
            "rank",
            "step",
            "loss",
            "eval loss",
            "tokens/s",
            "state",
            "ETA",
        ):
            table.add_column(name, justify="left" if name == "state" else "right")
        for number, row in sorted(self._rows.items()):
            config = row.trial.config
            table.add_row(
                str(number),
                str(config.quant.mean_bits),
                str(config.adapter.rank),
                f"{row.step}/{config.steps}",
                _number(row.train_loss, ".3f"),
                _number(row.eval_loss, ".4f"),
                _number(row.tokens_per_s, ",.0f"),
                row.state,
                _duration(row.eta_s),
            )
        return table

    def _print(self, event: Notice) -> None:
        match event:
            case PackReady():
                self.say(
                    f"pack {event.pack}: base loaded in {event.load_s:.0f} s, "
                    f"{event.num_base_params / 1e6:,.0f} M weights in "
                    f"{event.base_bytes / 2**20:,.0f} MiB; untrained held-out loss "
                    f"{event.baseline_eval_loss:.4f}; step program {event.step_program}"
                    + (f" ({event.note})" if event.note else "")
                )
            case PackLost():
                self.say(f"pack {event.pack}: lost: {event.reason}: {event.message}")
            case Progress() if self._is_due(event):
                row = self._rows[event.trial]
                eta = f", ETA {_duration(row.eta_s)}" if row.eta_s is not None else ""
                self.say(
                    f"{_title(row.trial)}: step {event.step}/{row.trial.config.steps}, "
                    f"loss {event.train_loss:.3f}, {event.tokens_per_s:,.0f} tokens/s{eta}"
                )
            case Evaluated() if event.step:
                title = _title(self._rows[event.trial].trial)
                self.say(f"{title}: step {event.step}: held-out loss {event.eval_loss:.4f}")
            case TrialDone():
                title = _title(self._rows[event.trial].trial)
                self.say(f"{title}: finished, held-out loss {event.eval_loss:.4f}")
            case TrialStopped():
                title = _title(self._rows[event.trial].trial)
                self.say(f"{title}: failed: {event.reason}: {event.message}")
            case _:
                pass

    def _is_due(self, event: Progress) -> bool:
        if event.time - self._printed.get(event.trial, 0.0) < PLAIN_PROGRESS_EVERY_S:
            return False
        self._printed[event.trial] = event.time
        return True


def results_table(trials: list[TrialSpec], results: list[TrialResult]) -> Table:
    """The end of a sweep, best trial first."""
    specs = {trial.number: trial for trial in trials}
    table = Table()
    for name in ("trial", "bits", "rank", "eval loss", "gain", "tokens/s", "adapter", "state"):
        table.add_column(name, justify="left" if name == "state" else "right")
    for result in sorted(results, key=lambda r: (r.eval_loss is None, r.eval_loss or 0.0)):
        config = specs[result.number].config
        gain = (result.baseline_eval_loss or 0.0) - (result.eval_loss or 0.0)
        finished = result.state == "finished"
        table.add_row(
            str(result.number),
            str(config.quant.mean_bits),
            str(config.adapter.rank),
            _number(result.eval_loss, ".4f"),
            _number(gain if finished else None, ".4f"),
            _number(result.tokens_per_s if finished else None, ",.0f"),
            f"{result.adapter_bytes / 2**20:.1f} MiB" if finished else "",
            result.state if finished else f"failed: {result.reason}",
        )
    return table


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


def _title(trial: TrialSpec) -> str:
    config = trial.config
    return f"trial {trial.number} ({config.quant.mean_bits:g}-bit, rank {config.adapter.rank})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

"""How far a trial is: its row in the table of a sweep, and the lines of a log that say the same.

A driver prints the lines (display.py); who follows it from afar reads its table back from them
(followed.py). One list, FORMS, is used for both, so that what is printed can be read. A line that
another version wrote in other words is no harm: it is shown as it is.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

State = Literal["waiting", "training", "finished", "pruned", "failed"]
# What is worth a line of the screen, most of all first.
URGENCY: tuple[State, ...] = ("training", "failed", "waiting", "pruned", "finished")
# Of the table itself: title, borders, names of columns, caption; and one for the cursor.
TABLE_LINES = 8
# Padding of cells of a table that would not fit 80 characters with rich's own.
TIGHT = (0, 1, 0, 0)


@dataclass
class Row:
    number: int
    bits: float
    """Of a base weight, on average where layers differ."""
    rank: int
    steps: int
    """In all."""
    state: State = "waiting"
    step: int = 0
    train_loss: float | None = None
    eval_loss: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    reason: str = ""
    """Of a trial that failed: a word."""
    message: str = ""
    """Why it failed, or was pruned."""
    answered: int = 0
    questions: int = 0
    """Of its task; 0 until it is trained to its end, or where it has none."""
    also: str = ""
    """What else was searched, such as `lr 0.0001, alpha 16`."""

    @property
    def title(self) -> str:
        also = f", {self.also}" if self.also else ""
        return f"trial {self.number} ({self.bits:g}-bit, rank {self.rank}{also})"


@dataclass(frozen=True)
class _Field:
    pattern: str
    write: Callable[[Any], str]
    read: Callable[[str], Any]


def sweep_table(title: str, rows: Iterable[Row], height: int) -> Table:
    """Where a screen of this height has no room for all trials, those that train come first."""
    everything = list(rows)
    room = max(1, height - TABLE_LINES)
    shown = sorted(everything, key=lambda row: (URGENCY.index(row.state), row.number))[:room]
    counts = Counter(row.state for row in everything)
    total = ", ".join(f"{counts[state]} {state}" for state in URGENCY if counts[state])
    hidden = f"{len(everything)} trials: {total}" if len(everything) > room else None
    searched = any(row.also for row in everything)
    table = Table(title=title, caption=hidden, padding=TIGHT if searched else (0, 1))
    heads = ["trial", "bits", "rank", *(["also"] if searched else []), "step", "loss"]
    for name in (*heads, "eval\nloss", "tokens\nper s", "state", "ETA"):
        table.add_column(name, justify="left" if name in ("also", "state") else "right")
    for row in sorted(shown, key=lambda row: row.number):
        table.add_row(
            str(row.number),
            f"{row.bits:g}",
            str(row.rank),
            *([Text(row.also)] if searched else []),
            f"{row.step}/{row.steps}",
            number(row.train_loss, ".3f"),
            number(row.eval_loss, ".4f"),
            number(row.tokens_per_s, ",.0f"),
            _state(row),
            duration(row.eta_s) if row.state == "training" else "",
        )
    return table


def _state(row: Row) -> str:
    if row.state == "failed":
        return f"failed: {row.reason}"
    if row.state == "training" and row.questions and row.step == row.steps:
        return f"answers {row.answered}/{row.questions}"
    return row.state


OPENED = "training from step {step}/{steps}"
TRAINED = "step {step}/{steps}, loss {train_loss}, {tokens_per_s} tokens/s, ETA {eta_s}"
EVALUATED = "step {step}/{steps}, held-out loss {eval_loss}"
ANSWERED = "step {step}/{steps}, answered {answered}/{questions}"
FINISHED = "finished at step {step}/{steps}, held-out loss {eval_loss}, {tokens_per_s} tokens/s"
PRUNED = "pruned at step {step}/{steps}, held-out loss {eval_loss}: {message}"
FAILED = "failed at step {step}/{steps}: {reason}: {message}"
# Words -> the state that they tell of.
FORMS: dict[str, State] = {
    OPENED: "training",
    TRAINED: "training",
    EVALUATED: "training",
    ANSWERED: "training",
    FINISHED: "finished",
    PRUNED: "pruned",
    FAILED: "failed",
}
ENDS: dict[State, str] = {"finished": FINISHED, "pruned": PRUNED, "failed": FAILED}


def line(row: Row, form: str) -> str:
    """What `form`, one of FORMS, says of the trial."""
    values = {name: field.write(getattr(row, name)) for name, field in _FIELDS.items()}
    return f"{row.title}: {form.format(**values)}"


def read_line(text: str, rows: dict[int, Row]) -> Row | None:
    """The row that a line of a log tells of, brought up to date; None if it tells of none."""
    for form, pattern in _PATTERNS.items():
        if found := pattern.fullmatch(text):
            told = found.groupdict()
            key, bits, rank = int(told["number"]), float(told["bits"]), int(told["rank"])
            values = {name: _FIELDS[name].read(told[name]) for name in told.keys() & _FIELDS.keys()}
            row = rows.setdefault(
                key, Row(key, bits, rank, values["steps"], also=told["also"] or "")
            )
            row.state = FORMS[form]
            for name, value in values.items():
                setattr(row, name, value)
            return row
    return None


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _read_duration(text: str) -> float:
    seconds = 0
    for part in text.split(":"):
        seconds = seconds * 60 + int(part)
    return seconds


def _optional(write: Callable[[Any], str], read: Callable[[str], Any], pattern: str) -> _Field:
    """A value that may not be known yet is a dash."""
    return _Field(
        f"{pattern}|-",
        lambda value: "-" if value is None else write(value),
        lambda text: None if text == "-" else read(text),
    )


def _decimal(form: str) -> _Field:
    return _optional(
        lambda value: format(value, form),
        lambda text: float(text.replace(",", "")),
        r"-?[\d,.]+|nan|-?inf",
    )


_FIELDS: dict[str, _Field] = {
    "step": _Field(r"\d+", str, int),
    "steps": _Field(r"\d+", str, int),
    "answered": _Field(r"\d+", str, int),
    "questions": _Field(r"\d+", str, int),
    "train_loss": _decimal(".3f"),
    "eval_loss": _decimal(".4f"),
    "tokens_per_s": _decimal(",.0f"),
    "eta_s": _optional(duration, _read_duration, r"[\d:]+"),
    "reason": _Field(r"[^:]+", str, str),
    "message": _Field(r".*", str, str),
}
_HEAD = r"trial (?P<number>\d+) \((?P<bits>[\d.]+)-bit, rank (?P<rank>\d+)(?:, (?P<also>.+?))?\): "


def _pattern(form: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", form)  # words, a field's name, words, ...
    return re.compile(
        _HEAD
        + "".join(
            f"(?P<{part}>{_FIELDS[part].pattern})" if index % 2 else re.escape(part)
            for index, part in enumerate(parts)
        )
    )


_PATTERNS = {form: _pattern(form) for form in FORMS}

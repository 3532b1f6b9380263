"""Where a person follows a sweep that runs elsewhere: the live table of a sweep here, made of what
its driver prints there.

In: text of the driver's log. Out: the table under the other lines, in a terminal.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live

from jobs.progress import Row, read_line, sweep_table


class FollowedSweep:
    def __init__(self, title: str, console: Console) -> None:
        self._title = title
        self._console = console
        self._rows: dict[int, Row] = {}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The table goes at the end: the driver prints the sweep's results itself."""
        live = Live(
            get_renderable=self.table, console=self._console, refresh_per_second=2, transient=True
        )
        with live:
            yield

    def take(self, text: str) -> None:
        """Lines that tell of a trial go into the table, all others above it."""
        for line in text.split("\n"):
            row = read_line(line, self._rows)
            if row is None or row.state == "failed":
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def table(self) -> RenderableType:
        if not self._rows:
            return ""
        return sweep_table(self._title, self._rows.values(), self._console.height)

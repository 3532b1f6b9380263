"""Where a person is spoken to and asked, and how time passes there."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console


@dataclass
class Terminal:
    say: Callable[[str], None]
    ask: Callable[[str], str] | None
    """None: nobody is there to answer."""
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.time
    screen: Console | None = None
    """For a table that is drawn again and again; None: what is said goes to a file or a pipe."""


def terminal() -> Terminal:
    console = Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    ask = console.input if sys.stdin.isatty() else None
    return Terminal(say, ask, screen=console if console.is_terminal else None)

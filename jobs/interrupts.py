"""Ctrl-C and SIGTERM: the first asks the sweep to save and stop, the second ends it at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from orchestrator.sweep.controller import Controller


class Interrupts:
    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._controller: Controller | None = None
        self._asked = False

    def reach(self, controller: Controller) -> None:
        self._controller = controller

    def release(self) -> None:
        """Training is over: a signal ends the command at once."""
        self._controller = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        names = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(name, self._handle) for name in names]
        try:
            yield
        finally:
            for name, handler in zip(names, before, strict=True):
                signal.signal(name, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked or self._controller is None:
            raise KeyboardInterrupt
        self._asked = True
        self._say("saving the trials; once more ends at once")
        self._controller.request_stop()

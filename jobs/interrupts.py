"""Ctrl-C and SIGTERM: the first asks the sweep to save and stop, the second ends it at once.

SIGUSR1: the machine is about to be taken away (pre_stop.py). The sweep saves and stops, but the
process stays until it is killed: its end would be taken for the job's, and no other driver started.
"""

import _thread
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from orchestrator.sweep.controller import Controller

AGAIN_AFTER_S = 0.05


class Interrupts:
    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._controller: Controller | None = None
        self._asked = False
        self.is_evicted = False

    def reach(self, controller: Controller) -> None:
        self._controller = controller
        if self.is_evicted:
            controller.request_stop()

    def release(self) -> None:
        """Training is over: a signal ends the command at once."""
        self._controller = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        names = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        handlers = (self._handle, self._handle, self._evict)
        before = [signal.signal(*pair) for pair in zip(names, handlers, strict=True)]
        print_unraisable = sys.unraisablehook

        def unraisable(lost: "sys.UnraisableHookArgs") -> None:
            # The handler ran in a finalizer or a weak reference's callback, from which nothing is
            # raised: once more, when that is over.
            if lost.exc_type is KeyboardInterrupt:
                threading.Timer(AGAIN_AFTER_S, _thread.interrupt_main).start()
            else:
                print_unraisable(lost)

        sys.unraisablehook = unraisable
        try:
            yield
        finally:
            sys.unraisablehook = print_unraisable
            for name, handler in zip(names, before, strict=True):
                signal.signal(name, handler)

    def _evict(self, number: int, frame: FrameType | None) -> None:
        self.is_evicted = True
        if self._controller is not None:
            self._say("this machine is to be taken away: saving the trials")
            self._controller.request_stop()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked or self._controller is None:
            raise KeyboardInterrupt
        self._asked = True
        self._say("saving the trials; once more ends at once")
        self._controller.request_stop()


def ignore_eviction() -> None:
    """Until there is something to save; the signal would end the process otherwise."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def await_the_end() -> None:
    sys.stdout.flush()
    while True:
        signal.pause()

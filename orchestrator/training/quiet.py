"""Keep the libraries' progress bars, advice and start-up notices out of the user's terminal."""

import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, the libraries say nothing; what they raise comes through as ever."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    _QUIET.enter()
    try:
        yield
    finally:
        _QUIET.leave()


class _Quiet:
    """Of the whole process, from the first thread that wants it to the last one that does: were
    each to put back what it found, one that found another's silence would make it last for ever."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = ExitStack()

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            self._before.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.WARNING)
            self._before.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            self._before.enter_context(redirect_stderr(io.StringIO()))

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._before.close()


_QUIET = _Quiet()

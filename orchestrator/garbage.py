"""Pause Python's search for cycles, which goes over everything, where nothing makes any."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """For imports, a quarter of whose time the searches take, and for work on the 350,000 objects
    of what was imported. Of the whole process: of threads that are inside together, the first to
    come lets the searches go on when it leaves."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

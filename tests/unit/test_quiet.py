"""Libraries are silenced for as long as somebody wants it, and no longer."""

import logging
import sys

from orchestrator.training.quiet import quiet_libraries


def test_two_threads_in_turn_leave_everything_as_they_found_it() -> None:
    """The first to begin is the first to end, as with two threads that load at the same time."""
    before = (logging.root.manager.disable, sys.stderr)
    one, other = quiet_libraries(), quiet_libraries()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert not logging.getLogger("a library").isEnabledFor(logging.WARNING)
    other.__exit__(None, None, None)
    assert (logging.root.manager.disable, sys.stderr) == before


def test_what_is_silenced_within_silence_ends_with_the_outer_one() -> None:
    stderr = sys.stderr
    with quiet_libraries():
        with quiet_libraries():
            pass
        assert sys.stderr is not stderr
    assert sys.stderr is stderr

"""Ctrl-C once saves and stops, twice ends at once, wherever Python is when it comes."""

import signal
import time
from pathlib import Path

import pytest

from jobs.interrupts import Interrupts
from orchestrator.sweep.executor import InProcessExecutor
from orchestrator.sweep.simulated import SimulatedWorker
from tests.sweeps import make_controller, make_store, sweep_config

TIMEOUT_S = 60.0


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def interrupts(tmp_path: Path, said: list[str]) -> Interrupts:
    store = make_store(tmp_path / "run", sweep_config())
    found = Interrupts(said.append)
    found.reach(make_controller(store, InProcessExecutor(SimulatedWorker)))
    return found


def test_the_first_asks_to_save_and_the_second_ends_at_once(
    interrupts: Interrupts, said: list[str]
) -> None:
    with interrupts.caught():
        signal.raise_signal(signal.SIGINT)
        assert said == ["saving the trials; once more ends at once"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


class InterruptedAtItsEnd:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def interrupt_and_go_on() -> None:
    dropped = InterruptedAtItsEnd()
    del dropped
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_second_one_in_a_finalizer_is_neither_lost_nor_printed(
    interrupts: Interrupts, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python cannot raise from there: it would print a traceback and go on."""
    with interrupts.caught():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt_and_go_on()
    assert "Traceback" not in capsys.readouterr().err

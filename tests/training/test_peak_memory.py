"""The most that a worker held while a trial was in it, by a gauge whose readings are set here."""

from dataclasses import dataclass

import pytest

from orchestrator.training.memory import PeakMemory, memory_gauge, peak_memory_bytes

CONTEXT = 1000


@dataclass
class Readings:
    """A GPU's, in bytes."""

    now: int = 0
    pool: int = 0
    peak: int = 0

    def hold(self, most: int, after: int | None = None) -> None:
        self.peak = max(self.peak, most)
        self.now = most if after is None else after

    def tensors(self) -> int:
        found, self.peak = self.peak, self.now
        return found

    def beside(self) -> int:
        return CONTEXT

    def pools(self) -> int:
        return self.pool


@pytest.fixture
def gpu() -> Readings:
    return Readings()


def test_a_trial_does_not_inherit_the_peak_of_those_before_it(gpu: Readings) -> None:
    memory = PeakMemory(gpu)
    gpu.hold(900, after=100)  # the base is loaded
    memory.join(0)
    gpu.hold(500, after=100)
    assert memory.leave(0) == 500 + CONTEXT
    memory.join(0)  # the same slot
    gpu.hold(200, after=100)
    assert memory.leave(0) == 200 + CONTEXT
    assert memory.tensor_bytes == 900


def test_a_trials_peak_is_the_highest_of_the_rounds_in_which_it_took_part(gpu: Readings) -> None:
    memory = PeakMemory(gpu)
    memory.join(0)
    gpu.hold(200, after=100)
    memory.join(1)
    gpu.hold(700, after=100)  # both
    assert memory.leave(0) == 700 + CONTEXT
    memory.join(2)
    gpu.hold(300, after=100)
    assert memory.leave(2) == 300 + CONTEXT
    assert memory.leave(1) == 700 + CONTEXT


def test_a_recorded_programs_pool_is_counted_once(gpu: Readings) -> None:
    memory = PeakMemory(gpu)
    gpu.pool = 400
    memory.join(0)
    gpu.hold(200, after=100)
    with memory.recording():  # what will be in the pool are tensors until it is recorded
        gpu.pool = 300
        gpu.hold(450, after=100)
    gpu.hold(200, after=100)
    assert memory.leave(0) == 200 + 400 + CONTEXT
    memory.join(1)
    gpu.hold(200, after=100)
    assert memory.leave(1) == 200 + 300 + CONTEXT


def test_on_a_cpu_the_peak_is_that_of_the_process() -> None:
    memory = PeakMemory(memory_gauge("cpu"))
    memory.join(0)
    before = peak_memory_bytes("cpu")
    assert 0 < before <= memory.leave(0) <= peak_memory_bytes("cpu")

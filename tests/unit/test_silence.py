"""When a pack is taken for hung, by a clock that the tests turn."""

import pytest

from orchestrator.records import Event, PackPlaced, PackQueued, PackReady
from orchestrator.sweep.silence import (
    LOADING_TURNS,
    MOST_PER_ROUND_S,
    PATIENCE,
    Silence,
    Silences,
    why_hung,
)

HANG_AFTER_S = 100.0


class Clock:
    """Rounds of two seconds, and what the packs say in them."""

    def __init__(self, hang_after_s: float | None = HANG_AFTER_S) -> None:
        self.now = 5000.0
        self.silences = Silences(hang_after_s, self.now)

    def turn(self, seconds: float, round_s: float = 2.0) -> None:
        for _ in range(round(seconds / round_s)):
            self.now += round_s
            self.silences.pass_time(self.now)

    @property
    def hung(self) -> list[int]:
        return [number for number, _ in self.silences.hung()]

    def ready(self, pack: int, num_slots: int = 2, evaluation_s: float = 0.0) -> None:
        self.silences.start(pack, num_slots)
        event = PackReady(pack, 1, 1, 4.0, evaluation_s, evaluation_s=evaluation_s)
        self.silences.hear(pack, [event])


@pytest.mark.parametrize(
    ("silence", "most_s"),
    [
        (Silence(loading=False, lasted_s=0, longest_s=1), HANG_AFTER_S),
        (Silence(loading=False, lasted_s=0, longest_s=30), PATIENCE * 30),
        (Silence(loading=True, lasted_s=0, longest_s=0), LOADING_TURNS * HANG_AFTER_S),
    ],
)
def test_a_pack_hangs_once_it_is_silent_for_longer_than_a_healthy_one_may_be(
    silence: Silence, most_s: float
) -> None:
    def after(lasted_s: float) -> str:
        return why_hung(Silence(silence.loading, lasted_s, silence.longest_s), HANG_AFTER_S)

    assert after(most_s) == ""
    reason = after(most_s + 1)
    assert f"nothing for {most_s + 1:.0f} s, and {most_s:.0f} s is the most" in reason
    assert "(resources.hang_after_s=100): raise that" in reason
    assert ("while loading" if silence.loading else "while training") in reason


def test_only_the_pack_that_says_nothing_hangs() -> None:
    clock = Clock()
    clock.ready(0)
    clock.ready(1)
    for _ in range(30):
        clock.turn(4)
        clock.silences.hear(1, [])  # an empty answer is one
    assert clock.hung == [0]
    clock.silences.end(0)
    assert clock.hung == []


def test_an_evaluation_of_all_slots_is_no_hang() -> None:
    clock = Clock()
    clock.ready(0, num_slots=16, evaluation_s=10)
    clock.turn(16 * 10)
    assert clock.hung == []
    clock.turn(PATIENCE * 16 * 10)
    assert clock.hung == [0]


def test_what_was_a_long_silence_once_may_be_one_again() -> None:
    clock = Clock()
    clock.ready(0)
    clock.turn(90)  # a slow disk
    clock.silences.hear(0, [])
    clock.turn(PATIENCE * 90)
    assert clock.hung == []
    clock.turn(2)
    assert clock.hung == [0]


def test_the_time_of_loading_says_nothing_of_the_silences_after_it() -> None:
    clock = Clock()
    clock.silences.start(0, 2)
    clock.turn(LOADING_TURNS * HANG_AFTER_S)
    assert clock.hung == []
    clock.silences.hear(0, [PackReady(0, 1, 1, 4.0, 800.0, evaluation_s=1.0)])
    clock.turn(HANG_AFTER_S + 2)
    assert clock.hung == [0]


def test_a_pack_that_waits_for_its_turn_on_the_cluster_does_not_hang() -> None:
    clock = Clock()
    clock.silences.start(0, 2)
    waits: list[Event] = [PackQueued(0, "others hold it")]
    clock.silences.hear(0, waits)
    clock.turn(100 * HANG_AFTER_S)
    assert clock.hung == []
    clock.silences.hear(0, [PackPlaced(0)])
    clock.turn(LOADING_TURNS * HANG_AFTER_S)
    assert clock.hung == []
    clock.turn(2)
    assert clock.hung == [0]


def test_while_this_process_stands_still_no_pack_hangs() -> None:
    clock = Clock()
    clock.ready(0)
    clock.turn(10_000, round_s=10_000)  # Ctrl-Z, then fg
    assert clock.hung == []
    clock.turn(HANG_AFTER_S - MOST_PER_ROUND_S + 2)
    assert clock.hung == [0]


def test_without_a_deadline_no_pack_ever_hangs() -> None:
    clock = Clock(hang_after_s=None)
    clock.ready(0)
    clock.turn(100 * HANG_AFTER_S)
    assert clock.hung == []

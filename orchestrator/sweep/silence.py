"""Which packs have said nothing for so long that they must hang.

In: when packs are started and answer, and the time. Out: reasons to give packs up. A process that
hangs is alive to Ray, and its threads beat on: a pack's answers alone show that it gets on. No
clock of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.records import Event, PackPlaced, PackQueued, PackReady

# A base is fetched, quantised, compiled for and evaluated without a word, and one at a time is read
# on a machine (training/base_model.py): the last of eight GPUs waits for seven others.
LOADING_TURNS = 8
# Times the longest silence of a healthy pack that is known. That of an evaluation of all slots is:
# each takes as long as the base alone, which was evaluated while it was loaded.
PATIENCE = 10
# That one round of the controller counts at most. In a longer one this process stood still, perhaps
# with the workers (Ctrl-Z, a machine that was suspended), or trained another pack in itself.
MOST_PER_ROUND_S = 5.0


@dataclass(frozen=True)
class Silence:
    """Of one pack, since it was told to go on."""

    loading: bool
    lasted_s: float
    longest_s: float
    """That it was silent for and healthy, or may be in an evaluation; 0 while it loads."""


def why_hung(silence: Silence, hang_after_s: float) -> str:
    """Why the pack is to be given up; empty while it may be at work."""
    least_s = hang_after_s * (LOADING_TURNS if silence.loading else 1)
    most_s = max(least_s, PATIENCE * silence.longest_s)
    if silence.lasted_s <= most_s:
        return ""
    doing = "loading" if silence.loading else "training"
    return (
        f"it hangs: while {doing} it has reported nothing for {silence.lasted_s:.0f} s, and "
        f"{most_s:.0f} s is the most (resources.hang_after_s={hang_after_s:g}): raise that if the "
        "worker was only slow"
    )


@dataclass
class _Heard:
    num_slots: int
    at_s: float
    waits: bool = False
    """For its turn on the cluster."""
    loading: bool = True
    longest_s: float = 0.0


class Silences:
    def __init__(self, hang_after_s: float | None, now: float) -> None:
        """`hang_after_s`: as in ResourcesConfig. `now` and later times are monotonic seconds."""
        self._hang_after_s = hang_after_s
        self._now = now
        self._clock_s = 0.0
        """Seconds of rounds so far, each as far as it counts."""
        self._packs: dict[int, _Heard] = {}

    def pass_time(self, now: float) -> None:
        """Once a round, when the answers are in that had come by then."""
        self._clock_s += min(now - self._now, MOST_PER_ROUND_S)
        self._now = now

    def start(self, pack: int, num_slots: int) -> None:
        self._packs[pack] = _Heard(num_slots, self._clock_s)

    def end(self, pack: int) -> None:
        del self._packs[pack]

    def hear(self, pack: int, events: Sequence[Event]) -> None:
        """An answer, which may be empty, or news of the pack's place in the cluster's queue."""
        heard = self._packs[pack]
        lasted_s, heard.at_s = self._clock_s - heard.at_s, self._clock_s
        if not heard.loading:
            heard.longest_s = max(heard.longest_s, lasted_s)
        for event in events:
            match event:
                case PackQueued():
                    heard.waits = True
                case PackPlaced():
                    heard.waits = False
                case PackReady():
                    heard.waits = heard.loading = False
                    heard.longest_s = heard.num_slots * event.evaluation_s
                case _:
                    pass

    def hung(self) -> list[tuple[int, str]]:
        """Packs to be given up, each with the reason."""
        if self._hang_after_s is None:
            return []
        late_s = self._clock_s - self._hang_after_s
        return [
            (number, reason)
            for number, heard in self._packs.items()
            if heard.at_s < late_s and not heard.waits  # there may be a thousand that are not
            if (reason := why_hung(self._silence(heard), self._hang_after_s))
        ]

    def _silence(self, heard: _Heard) -> Silence:
        return Silence(heard.loading, self._clock_s - heard.at_s, heard.longest_s)

"""When each pack and slot was busy, with what, and what that cost.

In: the rows of packs.jsonl. Out: PackTime records. Pure; imports neither mlflow nor plotly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

S_PER_HOUR = 3600


@dataclass
class SlotTime:
    """One attempt at a trial in a slot."""

    trial: int
    attempt: int
    slot: int
    began: float
    ended: float


@dataclass
class PackTime:
    pack: int
    base: str
    num_slots: int
    world_size: int
    expected_bytes: int | None
    began: float
    """Its workers were asked for."""
    ready: float
    """The base was loaded."""
    ended: float
    node: str = ""
    peak_bytes: int | None = None
    """Of one worker, as measured."""
    slots: list[SlotTime] = field(default_factory=list)

    @property
    def worker_hours(self) -> float:
        return self.world_size * (self.ended - self.began) / S_PER_HOUR

    @property
    def used_fraction(self) -> float:
        """Part of its slots' time, loading included, in which a trial was in them."""
        held = self.num_slots * (self.ended - self.began)
        return sum(one.ended - one.began for one in self.slots) / held if held > 0 else 0.0

    def share_of(self, slot: SlotTime) -> float:
        """Worker hours that an attempt stands for, idle time and loading shared out."""
        used = sum(one.ended - one.began for one in self.slots)
        return self.worker_hours * (slot.ended - slot.began) / used if used > 0 else 0.0


def pack_times(events: Sequence[Mapping[str, Any]]) -> list[PackTime]:
    """In the order in which they were started. What has no end lasts until the last event.

    A resumed sweep numbers its packs anew: where a number starts again, the process before was
    killed, and what it had under way ended with its last event.
    """
    found: list[PackTime] = []
    present: dict[int, PackTime] = {}
    open_slots: dict[int, SlotTime] = {}
    last = max((event["time"] for event in events), default=0.0)
    before = last
    for event in events:
        at = event["time"]
        if event["what"] == "start":
            if event["pack"] in present:
                for stale in present.values():
                    _end(stale, min(stale.ended, before))
                present.clear()
            pack = PackTime(
                len(found),
                event["base"],
                event["num_slots"],
                event["world_size"],
                event.get("expected_bytes"),
                at,
                last,
                last,
            )
            present[event["pack"]] = pack
            found.append(pack)
        elif pack_now := present.get(event["pack"]):
            _apply(pack_now, event, open_slots, last)
        before = at
    return found


def _apply(
    pack: PackTime, event: Mapping[str, Any], open_slots: dict[int, SlotTime], last: float
) -> None:
    at = event["time"]
    match event["what"]:
        case "ready":
            pack.ready = at
        case "opened":
            slot = SlotTime(event["trial"], event["attempt"], event["slot"], at, last)
            open_slots[slot.trial] = slot
            pack.slots.append(slot)
            pack.node = event.get("node", "")
        case "closed":
            if slot_now := open_slots.pop(event["trial"], None):
                slot_now.ended = at
            if peak := event.get("peak_bytes"):
                pack.peak_bytes = max(peak, pack.peak_bytes or 0)
        case "ended":
            _end(pack, at)
        case _:
            pass


def _end(pack: PackTime, at: float) -> None:
    pack.ended = at
    pack.ready = min(pack.ready, at)
    for slot in pack.slots:
        slot.ended = min(slot.ended, at)

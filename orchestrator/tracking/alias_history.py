"""Who was champion, from when, and why: an append-only record on the registered model.

In: the model's tags. Out: events, and the champions before the present one. One tag per event,
`champion.0001` and so on, never changed, so that the history is where the aliases are and is seen
in the MLflow UI too. An event is written before its alias moves: what a crash left undone is told
by the next event, or by where the alias is.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

EVENT_KEY = re.compile(r"champion\.(\d+)")
Action = Literal["promote", "force", "rollback"]
MAX_REASON_CHARS = 1000  # MLflow's SQL stores keep 5,000 characters of a tag


@dataclass(frozen=True)
class AliasEvent:
    action: Action
    before: int | None
    """Version that was champion."""
    after: int
    time: float
    reason: str


def event_tag(number: int, event: AliasEvent) -> tuple[str, str]:
    content = asdict(event) | {"reason": event.reason[:MAX_REASON_CHARS]}
    return f"champion.{number:04d}", json.dumps(content)


def read_events(tags: Mapping[str, str]) -> list[tuple[int, AliasEvent]]:
    """Numbered, the oldest first."""
    found = [
        (int(match[1]), AliasEvent(**json.loads(value)))
        for key, value in tags.items()
        if (match := EVENT_KEY.fullmatch(key))
    ]
    return sorted(found, key=lambda numbered: numbered[0])


def carried_out(events: Sequence[AliasEvent], holder: int | None) -> list[AliasEvent]:
    """Those whose alias did move; `holder` is the present champion. After the others the alias was
    still where it had been."""
    then = [event.before for event in events[1:]] + [holder]
    return [event for event, found in zip(events, then, strict=False) if event.before != found]


def earlier_champions(events: Sequence[AliasEvent], holder: int | None) -> list[int]:
    """Versions to go back to, the latest last: what a rollback left is not among them."""
    stack: list[int] = []
    for event in carried_out(events, holder):
        if event.before is not None and (not stack or stack[-1] != event.before):
            stack.append(event.before)  # the alias was moved by other means
        if event.action == "rollback" and event.after in stack:
            del stack[stack.index(event.after) :]
        stack.append(event.after)
    if holder is not None and (not stack or stack[-1] != holder):
        stack.append(holder)
    return [version for version in stack[:-1] if version != holder]

"""How sentences for people count things. Pure."""

from collections.abc import Iterable


def counted(count: int, noun: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def ranges(numbers: Iterable[int], dash: str = "-") -> str:
    """`0-3, 7` of 0, 1, 2, 3 and 7; they must be in order."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}{dash}{part[-1]}" if part[1:] else f"{part[0]}" for part in parts)

"""Values for single layers by name: bit_width_pattern, rank_pattern, alpha_pattern.

In: a pattern and layer names. Out: the key that counts, or a pattern that says the same. Pure.
"""

import re
from collections.abc import Iterable, Mapping


def matched(pattern: Mapping[str, object], name: str) -> str | None:
    """The key that counts for a layer: PEFT's rule, whole or after a dot; of several the longest,
    for the order of keys does not outlive a JSON file."""
    found = [key for key in pattern if re.fullmatch(rf"(.*\.)?({key})", name)]
    return max(found, key=lambda key: (len(key), key), default=None)


def unmatched(pattern: Mapping[str, object], names: Iterable[str]) -> list[str]:
    """Keys that count for no layer: most likely misspelt."""
    used = {matched(pattern, name) for name in names}
    return [key for key in pattern if key not in used]


def as_pattern(widths: Mapping[str, int]) -> dict[str, int]:
    """A map of all layers, written short: those that differ in one number alone share a key."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    for name, bits in widths.items():
        parts = re.split(r"(?:(?<=\.)|^)(\d+)(?=\.)", name, maxsplit=1)
        before, number, after = parts if len(parts) == 3 else (name, "", "")
        groups.setdefault((before, after, bits), []).append(number)
    pattern = {}
    for (before, after, bits), numbers in groups.items():
        middle = numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
        pattern[before + middle + after] = bits
    return pattern

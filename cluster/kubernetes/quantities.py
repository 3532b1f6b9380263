"""Kubernetes quantities as numbers: `500m` is 0.5, `16Gi` is 2**34.

In: what stands in a manifest. Out: floats. Pure.
"""

import re
from typing import Any

Object = dict[str, Any]

SUFFIXES = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0}
SUFFIXES |= {name: 1000.0**power for power, name in enumerate(("k", "M", "G", "T", "P"), 1)}
SUFFIXES |= {f"{name}i": 1024.0**power for power, name in enumerate("KMGTP", 1)}


def quantity(value: str | int | float) -> float:
    """Raises ValueError if it is none."""
    found = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)([a-zA-Z]*)", str(value))
    if found is None or found[2] not in SUFFIXES:
        raise ValueError(f"{value} is no quantity")
    return float(found[1]) * SUFFIXES[found[2]]

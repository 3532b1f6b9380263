"""What `bit_width: auto` gave each layer, as a table of the report."""

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from orchestrator.tracking.page import table
from orchestrator.wording import ranges


def bit_maps(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """`chosen`: the run folder's bits.json. Empty where nothing was."""
    return "".join(
        f"<p>{escape(one['reason'])}</p>{_map(one['bit_width_pattern'])}" for one in chosen.values()
    )


def _map(bits_by_layer: Mapping[str, int]) -> str:
    """A line for each kind of layer: the blocks in which it has so many bits."""
    widths = sorted(set(bits_by_layer.values()))
    blocks: dict[str, dict[int, list[int]]] = {}
    for name, bits in bits_by_layer.items():
        found = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.+)", name)
        kind, block = (found[2], int(found[1])) if found else (name, 0)
        blocks.setdefault(kind, {}).setdefault(bits, []).append(block)
    lines = [
        f"<tr><td>{escape(kind)}</td>"
        + "".join(f"<td>{ranges(sorted(of.get(bits, ())), dash='–')}</td>" for bits in widths)
        + "</tr>"
        for kind, of in blocks.items()
    ]
    heads = ["layer of block", *(f"{bits} bits" for bits in widths)]
    return table(heads, lines, num_texts=len(heads))

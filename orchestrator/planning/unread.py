"""Fields of `quant` that are set and that nothing reads at the bits beside them.

In: a QuantConfig, and the values that a search space gives its fields. Out: messages. Pure.

A field is set when it has another value than its default: one that is written out changes nothing.
What is written under `trial` is for the trials that read it, so it is refused if no trial of the
space does; what the space itself varies is refused wherever it would only make the same trial twice
(a condition keeps it to where it is read).
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from orchestrator.config import QuantConfig
from orchestrator.search_config import SearchConfig

# What decides whether the others are read.
DECIDING = ("bit_width", "bit_width_pattern", "int8_type")

EVERYWHERE = "set what reads it"
IN_SPACE = "keep it to where it is read with search.conditions"


@dataclass(frozen=True)
class Reader:
    reads: Callable[[QuantConfig], bool]
    """Whether layers of such a base read the field."""
    where: str


def has_bits(quant: QuantConfig, *bits: int) -> bool:
    """Whether some layers may have so many bits."""
    return quant.bit_width in (*bits, "auto") or any(
        value in bits for value in quant.bit_width_pattern.values()
    )


def _in_blocks_of_8(quant: QuantConfig) -> bool:
    return has_bits(quant, 8) and not quant.llm_int8


READERS: dict[str, Reader] = {
    "double_quant": Reader(
        lambda quant: has_bits(quant, 4) or _in_blocks_of_8(quant),
        "by layers of 4 bits, and of 8 with quant.int8_type: blockwise",
    ),
    "block_size": Reader(
        lambda quant: has_bits(quant, 2, 3, 4) or _in_blocks_of_8(quant),
        "by layers of 2, 3 or 4 bits, and of 8 with quant.int8_type: blockwise",
    ),
    "int8_type": Reader(lambda quant: has_bits(quant, 8), "by layers of 8 bits"),
    "storage_dtype": Reader(lambda quant: has_bits(quant, 4), "by layers of 4 bits"),
    "average_bits": Reader(lambda quant: quant.bit_width == "auto", "with quant.bit_width: auto"),
    "budget_gib": Reader(lambda quant: quant.bit_width == "auto", "with quant.bit_width: auto"),
}


def unread(quant: QuantConfig, fields: Iterable[str]) -> list[str]:
    """Of the dotted fields of a trial that its search space varies: what is to be said of those
    that are set and that nothing reads there."""
    names = (field.removeprefix("quant.") for field in fields if field.startswith("quant."))
    return [
        _message(name, getattr(quant, name), quant, IN_SPACE)
        for name in names
        if name in READERS
        and getattr(quant, name) != _default(name)
        and not READERS[name].reads(quant)
    ]


def unread_in_space(quant: QuantConfig, search: SearchConfig) -> list[str]:
    """The same of fields that no trial of a space reads, whether they are written or searched."""
    lists = [_values(quant, search, name) for name in DECIDING]
    points = [
        quant.model_copy(update=dict(zip(DECIDING, point, strict=True)))
        for point in itertools.product(*lists)
    ]
    found = []
    for name, reader in READERS.items():
        values = [one for one in _values(quant, search, name) if one != _default(name)]
        if values and not any(reader.reads(point) for point in points):
            found.append(_message(name, values[0], points[0], EVERYWHERE))
    return found


def _values(quant: QuantConfig, search: SearchConfig, name: str) -> tuple[Any, ...]:
    return search.values_of(f"quant.{name}", getattr(quant, name))


def _default(name: str) -> Any:
    return QuantConfig.model_fields[name].default


def _message(name: str, value: Any, quant: QuantConfig, otherwise: str) -> str:
    written = str(value).lower() if isinstance(value, bool) else str(value)
    bits = f"quant.bit_width={quant.bit_width}"
    bits += f", quant.bit_width_pattern={quant.bit_width_pattern}" if quant.mixed else ""
    bits += f", quant.int8_type={quant.int8_type}" if quant.bit_width == 8 else ""
    return (
        f"quant.{name} is read only {READERS[name].where}, but got quant.{name}={written}, {bits}: "
        f"leave quant.{name} out, or {otherwise}"
    )

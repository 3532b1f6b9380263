"""What is known of GPUs by name: memory and rates, for plans that are made away from them.

Rates are those of the makers' data sheets (dense bf16; memory bandwidth). What a card reaches of
them was measured on an H200 alone: see speed.py.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from orchestrator.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    name: str
    sold_gb: int
    """Its memory as the maker names it."""
    memory_gib: float
    """As the driver counts it."""
    tflops: float
    bandwidth_tb_per_s: float

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)

    @property
    def chip(self) -> tuple[str, ...]:
        """Its name in words, without a size."""
        return tuple(word for word in self.name.split("-") if not _SIZE.fullmatch(word))


_SIZE = re.compile(r"(\d+)(?:GB?|GIB)")
# Of a card's name: how it is mounted or cooled, and its memory's type.
_FORM = re.compile(r"SXM\d?|PCIE|NVL|DGXS|FHHL|HBM\d[E]?")
_MAKERS = ("NVIDIA", "TESLA", "GEFORCE")

# Where a chip is sold with several sizes, the name without one is the size that Ray means by it.
CARDS = (
    Gpu("H200", 141, 139.8, 989, 4.8),
    Gpu("H100", 80, 79.6, 989, 3.35),
    Gpu("H100-NVL", 94, 93.1, 835, 3.9),
    Gpu("A100-80G", 80, 79.3, 312, 2.04),
    Gpu("A100", 40, 39.6, 312, 1.56),
    Gpu("L40S", 48, 44.5, 362, 0.864),
    Gpu("A10G", 24, 22.5, 70, 0.6),
    Gpu("L4", 24, 22.5, 121, 0.3),
    Gpu("V100", 32, 31.7, 125, 0.9),
    Gpu("V100-16G", 16, 15.8, 125, 0.9),
    Gpu("T4", 16, 14.7, 65, 0.32),
    Gpu("RTX-4090", 24, 23.6, 165, 1.01),
)
GPUS = {gpu.name: gpu for gpu in CARDS}
MEASURED = "H200"
# Where the name says nothing.
UNKNOWN_SPEED = 1.0


def relative_speed(name: str) -> float:
    """By the rate of its products, as most of a step is that; the H200 is 1."""
    found = find_gpu(name)
    return found.tflops / GPUS[MEASURED].tflops if found else UNKNOWN_SPEED


@lru_cache(maxsize=256)
def find_gpu(name: str) -> Gpu | None:
    """By what a user, Ray or the driver calls it: `H100`, `A100-80GB`, `NVIDIA A100-SXM4-80GB`.
    None for a card, a size or a part of one (MIG) that is not known."""
    words = [word for word in re.split(r"[\s_-]+", name.upper().strip()) if word not in _MAKERS]
    # The longest name first, or an H100 NVL would be an H100.
    for card in sorted(CARDS, key=lambda card: -len(card.chip)):
        chip = len(card.chip)
        if tuple(words[:chip]) != card.chip:
            continue
        rest = [word for word in words[chip:] if not _FORM.fullmatch(word)]
        if not rest and card.name == "-".join(card.chip):
            return card
        if len(rest) == 1 and re.fullmatch(rf"{card.sold_gb}(GB?|GIB)?", rest[0]):
            return card
    return None


def parse_gpus(written: str) -> list[tuple[int, str, Gpu]]:
    """`8xH100-80GB,4xL40S`: number, name and what is known of it.

    Raises:
        ConfigError: it is not written so, or a name is not known.
    """
    found = []
    for part in written.split(","):
        match = re.fullmatch(r"\s*(?:(\d+)\s*[xX]\s*)?([\w -]+?)\s*", part)
        gpu = find_gpu(match[2]) if match else None
        if match is None or gpu is None or match[1] == "0":
            raise ConfigError(
                f"--gpus {written}: {part.strip()!r} is not COUNTxNAME with a known name: "
                f"write such as 8xH100-80GB, or 4xA100-80GB,8xL40S; known: {', '.join(GPUS)}"
            )
        found.append((int(match[1] or 1), match[2], gpu))
    return found

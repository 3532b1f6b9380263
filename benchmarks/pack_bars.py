"""What rows of `benchmarks.packs` amount to: ratios, shares of the card's rate, and the bars.

Pure: rows in, rows and bars out.
"""

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.flops import flops_per_token
from benchmarks.models import SHAPES
from benchmarks.recording import Bar, Row

# (shape, tokens per adapter, adapters): goal against stock, goal against the own best single.
GOALS = {("0.5b", 1024, 16): (40, 2), ("8b", 256, 16): (35, 2), ("8b", 1024, 8): (7, 1.2)}


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Each with its ratios to the rows of the same shape, bits, tokens and optimizer, if any."""
    cards = [row["tflops"] for row in rows if row["who"] == "matmul"]
    return [
        row if row["who"] == "matmul" else row | _ratios(row, rows, max(cards, default=None))
        for row in rows
    ]


def bars(rows: Sequence[Row]) -> dict[str, Bar]:
    """Those for which something was measured, with NF4 and the default optimizer."""
    found = {}
    for (shape, tokens, adapters), goals in GOALS.items():
        of = partial(like, shape, 4, tokens, "adamw")
        pack = best(rows, of("pack", adapters))
        stock, single = best(rows, of("stock", 1)), best(rows, of("pack", 1))
        for other, name, goal in zip((stock, single), RIVALS, goals, strict=True):
            if pack and other:
                title = f"{shape.upper()} at {tokens:,}, K={adapters}, against {name}"
                found[title] = Bar(round(pack / other, 2), goal)
    return found


RIVALS = ("stock", "own best single")


def best(rows: Sequence[Row], wanted: Callable[[Row], bool]) -> float | None:
    return max((row["tokens_per_s"] for row in rows if wanted(row)), default=None)


def _ratios(row: Row, rows: Sequence[Row], card_tflops: float | None) -> Row:
    shape, bits, tokens = row["shape"], row["bit_width"], row["tokens_per_adapter"]
    rate = row["tokens_per_s"]
    tflops = rate * flops_per_token(SHAPES[shape], tokens) / 1e12
    ratios: Row = {"model_tflops": round(tflops, 2)}
    if card_tflops:
        ratios["matmul_share_fraction"] = round(tflops / card_tflops, 4)
    for name, who in (("ratio_to_stock", "stock"), ("ratio_to_own_best_single", "pack")):
        if other := best(rows, like(shape, bits, tokens, row["optimizer"], who, 1)):
            ratios[name] = round(rate / other, 2)
    return ratios


def like(
    shape: str, bits: int, tokens: int, optimizer: str, who: str, adapters: int
) -> Callable[[Row], bool]:
    wanted = {
        "shape": shape,
        "bit_width": bits,
        "tokens_per_adapter": tokens,
        "optimizer": optimizer,
        "who": who,
        "adapters": adapters,
    }
    return lambda row: wanted.items() <= row.items()

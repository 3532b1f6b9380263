"""Held-out loss against what a trial costs: memory, size of its adapter, speed.

In: SummaryRow records. Out: plotly figures. Imports plotly inside functions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.tracking.plot_style import COLOURS, GREY, LOSS, WINNER_COLOUR, styled
from orchestrator.tracking.summary import SummaryRow

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MARKER_PX = (10.0, 30.0)


@dataclass(frozen=True)
class Measure:
    title: str
    value: Callable[[SummaryRow], float]
    more_is_better: bool = False


MEASURES = {
    "model_memory": Measure(
        "base, adapter and optimizer states (GiB)", lambda row: row["model_memory_gib"]
    ),
    "peak_memory": Measure("peak memory of the worker (GiB)", lambda row: row["peak_memory_gib"]),
    "adapter_size": Measure("adapter (MiB)", lambda row: row["adapter_mib"]),
    "speed": Measure("tokens per second", lambda row: row["tokens_per_s"], more_is_better=True),
}


def quality_against(rows: Sequence[SummaryRow], measure: Measure) -> "Figure":
    """The line joins the trials that no other beats in both."""
    import plotly.graph_objects as go

    known = [row for row in rows if row["eval_loss"] is not None and measure.value(row) > 0]
    figure = go.Figure()
    front = pareto_front(known, measure)
    if len(front) > 1:
        figure.add_scatter(
            x=[measure.value(row) for row in front],
            y=[row["eval_loss"] for row in front],
            mode="lines",
            line={"color": GREY, "dash": "dot", "shape": "vh" if measure.more_is_better else "hv"},
            name="best trade-offs",
            hoverinfo="skip",
        )
    largest = max((row["adapter_mib"] for row in known), default=0.0) or 1.0
    for place, width in enumerate(sorted({row["bit_width"] for row in known})):
        some = [row for row in known if row["bit_width"] == width]
        figure.add_scatter(
            x=[measure.value(row) for row in some],
            y=[row["eval_loss"] for row in some],
            mode="markers",
            name=f"{width}-bit",
            marker={
                "color": COLOURS[place % len(COLOURS)],
                "size": [_marker_px(row["adapter_mib"] / largest) for row in some],
                "line": {"width": 0},
            },
            customdata=[[row["name"], row["adapter_mib"]] for row in some],
            hovertemplate="%{customdata[0]}<br>held-out loss %{y:.4f}<br>"
            + measure.title
            + " %{x:.4g}<br>adapter %{customdata[1]:.1f} MiB<extra></extra>",
        )
    for row in known:
        if row["winner"]:
            figure.add_scatter(
                x=[measure.value(row)],
                y=[row["eval_loss"]],
                mode="markers",
                marker={"symbol": "star", "size": 12, "color": WINNER_COLOUR},
                name="winner",
                hoverinfo="skip",
            )
    figure.update_xaxes(title=measure.title)
    figure.update_yaxes(title=LOSS)
    return styled(figure, legend_below=True)


def pareto_front(rows: Sequence[SummaryRow], measure: Measure) -> list[SummaryRow]:
    """From left to right, those with less loss than all that are as good in the measure."""
    sign = -1 if measure.more_is_better else 1
    front: list[SummaryRow] = []
    least = math.inf
    for row in sorted(rows, key=lambda row: (sign * measure.value(row), row["eval_loss"] or 0.0)):
        loss = row["eval_loss"]
        if loss is not None and loss < least:
            front.append(row)
            least = loss
    return front[::sign]


def _marker_px(fraction: float) -> float:
    """Area goes with the adapter's size."""
    low, high = MARKER_PX
    return low + (high - low) * math.sqrt(fraction)

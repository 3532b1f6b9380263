"""Parallel coordinates: every trial as a line through its searched fields to its loss.

In: SummaryRow records. Out: a plotly figure, or None. Imports plotly inside functions.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.tracking.plot_style import LOSS, SCALE, styled
from orchestrator.tracking.summary import SummaryRow
from orchestrator.tracking.translation import brief

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def parallel_fields(rows: Sequence[SummaryRow]) -> "Figure | None":
    """One axis per searched field, from three on; None when there are fewer, or nothing to show."""
    import plotly.graph_objects as go

    known = [row for row in rows if row["eval_loss"] is not None]
    if not known or len(known[0]["params"]) < 3:
        return None
    losses = [row["eval_loss"] for row in known]
    axes = [_axis(name, [row["params"][name] for row in known]) for name in known[0]["params"]]
    figure = go.Figure(
        go.Parcoords(
            dimensions=[*axes, {"label": "held-out loss", "values": losses}],
            line={
                "color": losses,
                "colorscale": SCALE,
                "reversescale": True,
                "showscale": len(known) > 1,
                "colorbar": {"title": {"text": LOSS, "side": "right"}, "thickness": 14},
            },
        )
    )
    figure = styled(figure, height=380)
    return figure.update_layout(margin={"l": 60, "r": 40, "t": 60, "b": 30})


def _axis(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Numbers that span more than a decade get a logarithmic axis, words and few values ticks."""
    distinct = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in distinct)
    if not numeric:
        places = [distinct.index(value) for value in values]
        ticks = list(range(len(distinct)))
        return _labelled(name, places, ticks, distinct)
    if distinct[0] > 0 and distinct[-1] / distinct[0] >= 10:
        shown = distinct if len(distinct) <= 8 else [distinct[0], distinct[-1]]
        return _labelled(
            name, [math.log10(v) for v in values], [math.log10(v) for v in shown], shown
        )
    if len(distinct) <= 8:
        return _labelled(name, values, distinct, distinct)
    return {"label": name, "values": list(values)}


def _labelled(
    name: str, values: Sequence[float], ticks: Sequence[float], texts: Sequence[Any]
) -> dict[str, Any]:
    return {
        "label": name,
        "values": list(values),
        "tickvals": list(ticks),
        "ticktext": [brief(text) for text in texts],
    }

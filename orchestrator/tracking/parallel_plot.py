"""Parallel coordinates: every trial as a line through its searched fields to its loss.

In: SummaryRow records. Out: a plotly figure, or None. Imports plotly inside functions.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.tracking.plot_style import LOSS, SCALE, styled
from orchestrator.tracking.summary import MISSING, SummaryRow, searched_fields
from orchestrator.tracking.translation import brief

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MAX_TICKS = 8


def parallel_fields(rows: Sequence[SummaryRow]) -> "Figure | None":
    """One axis per searched field, from three on; None when there are fewer, or nothing to show."""
    import plotly.graph_objects as go

    known = [row for row in rows if row["eval_loss"] is not None]
    names = searched_fields(known)
    if len(names) < 3:
        return None
    losses = [row["eval_loss"] for row in known]
    axes = [_axis(name, [row["params"].get(name) for row in known]) for name in names]
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
    """`values`: one for each trial, None where a condition leaves the field out.

    Numbers that span more than a decade get a logarithmic axis, words and few values ticks, and
    what is left out a tick of its own below all others.
    """
    distinct = sorted(
        {value for value in values if value is not None},
        key=lambda value: (isinstance(value, str), value),
    )
    place, shown = _scale(distinct)
    places = [None if value is None else place(value) for value in values]
    ticks, texts = [place(value) for value in shown], [brief(value) for value in shown]
    if None in places:
        low, high = place(distinct[0]), place(distinct[-1])
        below = low - ((high - low) / 4 or 1.0)
        places = [below if at is None else at for at in places]
        ticks, texts = [below, *ticks], [MISSING, *texts]
    elif len(distinct) > len(shown) and place is _itself:
        return {"label": name, "values": places}  # plotly's own ticks
    return {"label": name, "values": places, "tickvals": ticks, "ticktext": texts}


def _scale(distinct: Sequence[Any]) -> tuple[Callable[[Any], float], Sequence[Any]]:
    """Where a value stands on its axis, and the values that have a tick."""
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in distinct):
        return distinct.index, distinct
    shown = distinct if len(distinct) <= MAX_TICKS else [distinct[0], distinct[-1]]
    logarithmic = distinct[0] > 0 and distinct[-1] / distinct[0] >= 10
    return (math.log10 if logarithmic else _itself), shown


def _itself(value: float) -> float:
    return value

"""The report's figures.

In: SummaryRow records and curves. Out: plotly figures. Trials without a finite loss are marked or
left out; none or one trial is enough. Imports plotly inside functions.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.tracking.plot_style import COLOURS, GREY, LOSS, SCALE, WINNER_COLOUR, styled
from orchestrator.tracking.summary import SummaryRow, searched_fields

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Curves = Mapping[int, Sequence[Mapping[str, Any]]]
"""Trial number -> the rows of its curve."""

MAX_COLOURED = len(COLOURS)
SMOOTHING = 0.8  # weight of the past in the smoothed training loss


def rank_by_bit_width(rows: Sequence[SummaryRow]) -> "Figure":
    """Heat map of the best loss in each cell; a bar per trial when not both are searched."""
    import plotly.graph_objects as go

    if not {"rank", "bit_width"} <= set(searched_fields(rows)):
        return loss_by_trial(rows)
    ranks = sorted({row["rank"] for row in rows})
    widths = sorted({row["bit_width"] for row in rows}, reverse=True)
    cells = [[_cell(rows, width, rank) for rank in ranks] for width in widths]
    figure = go.Figure(
        go.Heatmap(
            x=[str(rank) for rank in ranks],
            y=[f"{width}-bit" for width in widths],
            z=[[loss for loss, _ in line] for line in cells],
            text=[[_loss_or_state(loss, row) for loss, row in line] for line in cells],
            customdata=[[row["name"] if row else "no trial" for _, row in line] for line in cells],
            texttemplate="%{text}",
            hovertemplate="%{customdata}<br>%{text}<extra></extra>",
            colorscale=SCALE,
            reversescale=True,
            colorbar={"title": {"text": LOSS, "side": "right"}, "thickness": 14},
            xgap=3,
            ygap=3,
        )
    )
    figure.update_xaxes(title="rank of the adapter", type="category")
    figure.update_yaxes(title="bits per base weight", type="category")
    return styled(figure)


def loss_by_trial(rows: Sequence[SummaryRow]) -> "Figure":
    """A bar per trial with a loss, the best on top, and the untrained base as a line."""
    import plotly.graph_objects as go

    known = [row for row in rows if row["eval_loss"] is not None][::-1]
    figure = go.Figure(
        go.Bar(
            x=[row["eval_loss"] for row in known],
            y=[row["name"] for row in known],
            orientation="h",
            marker={"color": [WINNER_COLOUR if row["winner"] else COLOURS[0] for row in known]},
            text=[f"{row['eval_loss']:.4f}" for row in known],
            hovertemplate="%{y}<br>held-out loss %{x:.4f}<extra></extra>",
        )
    )
    baselines = [row["baseline_eval_loss"] for row in known if row["baseline_eval_loss"]]
    if baselines:
        figure.add_vline(
            x=baselines[-1], line={"color": GREY, "dash": "dot"}, annotation_text="untrained base"
        )
    figure.update_xaxes(title=LOSS)
    return styled(figure, height=max(240, 60 + 32 * len(known)))


def learning_curves(rows: Sequence[SummaryRow], curves: Curves) -> "Figure":
    """Smoothed training loss and held-out loss by step, the best trials in colour."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        cols=2,
        horizontal_spacing=0.1,
        subplot_titles=("training loss, smoothed", "held-out loss"),
    )
    for place, row in reversed(list(enumerate(rows))):  # the best are drawn last, on top
        points = curves.get(row["trial"], ())
        line = {"color": COLOURS[place], "width": 2} if place < MAX_COLOURED else {"color": GREY}
        style = {
            "line": line,
            "name": row["name"],
            "legendgroup": row["name"],
            "showlegend": place < MAX_COLOURED,
            "opacity": 1 if place < MAX_COLOURED else 0.4,
        }
        train = [(p["step"], p["train_loss"]) for p in points if p["kind"] == "progress"]
        evals = [(p["step"], p["eval_loss"]) for p in points if p["kind"] == "evaluated"]
        figure.add_trace(_curve(_smoothed(train), "lines", style), row=1, col=1)
        style["showlegend"] = False
        figure.add_trace(_curve(evals, "lines+markers", style), row=1, col=2)
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="loss (nats per token)", col=1)
    figure.update_layout(legend={"traceorder": "reversed"})
    return styled(figure, height=440, legend_below=True)


def _cell(
    rows: Sequence[SummaryRow], bit_width: float, rank: int
) -> tuple[float | None, SummaryRow | None]:
    """Least loss of the trials with this pair, and the trial; rows come best first."""
    here = [row for row in rows if (row["bit_width"], row["rank"]) == (bit_width, rank)]
    best = min(
        here,
        key=lambda row: math.inf if row["eval_loss"] is None else row["eval_loss"],
        default=None,
    )
    return (best["eval_loss"] if best else None), best


def _loss_or_state(loss: float | None, row: SummaryRow | None) -> str:
    if loss is not None:
        return f"{loss:.4f}"
    return row["state"] if row else ""


def _curve(points: Sequence[tuple[int, float]], mode: str, style: Mapping[str, Any]) -> Any:
    import plotly.graph_objects as go

    return go.Scatter(
        x=[step for step, _ in points],
        y=[value if math.isfinite(value) else None for _, value in points],
        mode=mode,
        hovertemplate=f"{style['name']}<br>step %{{x}}: %{{y:.4f}}<extra></extra>",
        **style,
    )


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential mean, without the start's bias to zero; what is not finite ends it."""
    smooth, mean, weight = [], 0.0, 0.0
    for step, value in points:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append((step, mean / weight))
    return smooth

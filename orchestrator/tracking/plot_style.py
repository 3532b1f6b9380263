"""Colours and layout that the report's figures share. Imports plotly for types only."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too; yellow and black left out, for
# they vanish on a light or a dark page.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
GREY = "#8c959f"
WINNER_COLOUR = COLOURS[-1]
SCALE = "Cividis"  # made for colour-blind readers; reversed: dark is high loss, bright is low
LOSS = "held-out loss (nats per token)"


def styled(figure: "Figure", height: int = 360, legend_below: bool = False) -> "Figure":
    """Transparent, so that the page's own light or dark colours show; see page.py."""
    figure.update_layout(
        template="none",
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": GREY},
        margin={"l": 70, "r": 30, "t": 40, "b": 60},
        hoverlabel={"align": "left"},
    )
    if legend_below:
        below = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0}
        figure.update_layout(legend=below, margin={"b": 110})
    figure.update_xaxes(gridcolor="rgba(128,128,128,0.2)", zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor="rgba(128,128,128,0.2)", zeroline=False, automargin=True)
    return figure

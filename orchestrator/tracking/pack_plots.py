"""What the packs did: a Gantt chart with their use, and memory as planned and as measured.

In: PackTime records. Out: plotly figures, or None where there is nothing. Imports plotly inside
functions.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.tracking.plot_style import COLOURS, GREY, styled
from orchestrator.tracking.timeline import PackTime
from orchestrator.tracking.translation import GIB

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ROW_PX = 26
MINUTE_S = 60


def pack_gantt(packs: Sequence[PackTime]) -> "Figure | None":
    """A row per slot. Grey: the base is loaded."""
    import plotly.graph_objects as go

    if not packs:
        return None
    origin = min(pack.began for pack in packs)
    figure = go.Figure()
    rows = [_label(pack, slot) for pack in packs for slot in range(pack.num_slots)]
    loads = [(_label(pack, 0), pack.began, pack.ready, f"pack {pack.pack} loads") for pack in packs]
    _bars(figure, "loading", GREY, loads, origin)
    trials = sorted({one.trial for pack in packs for one in pack.slots})
    for place, trial in enumerate(trials):
        bars = [
            (
                _label(pack, one.slot),
                one.began,
                one.ended,
                f"trial {one.trial}, attempt {one.attempt}",
            )
            for pack in packs
            for one in pack.slots
            if one.trial == trial
        ]
        _bars(figure, f"trial {trial}", COLOURS[place % len(COLOURS)], bars, origin)
    figure.update_layout(barmode="overlay", showlegend=False)
    figure.update_xaxes(title="minutes since the first pack was started", rangemode="tozero")
    figure.update_yaxes(categoryorder="array", categoryarray=rows[::-1])
    return styled(figure, height=120 + ROW_PX * len(rows))


def memory_by_pack(packs: Sequence[PackTime]) -> "Figure | None":
    """Peak memory of one worker of each pack; None where nothing was estimated or measured."""
    import plotly.graph_objects as go

    known = [pack for pack in packs if pack.expected_bytes or pack.peak_bytes]
    if not known:
        return None
    names = [f"pack {pack.pack}<br>{pack.base}" for pack in known]
    figure = go.Figure()
    for title, colour, values in (
        ("planned", COLOURS[4], [pack.expected_bytes for pack in known]),
        ("measured", COLOURS[0], [pack.peak_bytes for pack in known]),
    ):
        figure.add_bar(
            x=names,
            y=[None if value is None else value / GIB for value in values],
            name=title,
            marker={"color": colour},
            hovertemplate=f"%{{x}}<br>{title} %{{y:.2f}} GiB<extra></extra>",
        )
    figure.update_yaxes(title="peak memory of a worker (GiB)", rangemode="tozero")
    return styled(figure, legend_below=True)


def _label(pack: PackTime, slot: int) -> str:
    return f"pack {pack.pack} · {pack.base} · slot {slot} ({pack.used_fraction:.0%} used)"


def _bars(
    figure: "Figure",
    name: str,
    colour: str,
    bars: Sequence[tuple[str, float, float, str]],
    origin: float,
) -> None:
    figure.add_bar(
        orientation="h",
        name=name,
        y=[row for row, _, _, _ in bars],
        base=[(began - origin) / MINUTE_S for _, began, _, _ in bars],
        x=[(ended - began) / MINUTE_S for _, began, ended, _ in bars],
        marker={"color": colour},
        text=[text if name != "loading" else "" for _, _, _, text in bars],
        textposition="inside",
        insidetextanchor="start",
        hovertext=[f"{text}: {ended - began:,.0f} s" for _, began, ended, text in bars],
        hoverinfo="text",
    )

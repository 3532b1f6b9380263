"""All figures of a sweep, for the report, and as PNG files for slides and MLflow.

In: a RunStore. Out: figures in the order of the report; or files in its folder plots/. Imports
plotly and kaleido inside functions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import ReportError
from orchestrator.files import write_bytes
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.front import front_figure
from orchestrator.tracking.pack_plots import memory_by_pack, pack_gantt
from orchestrator.tracking.parallel_plot import parallel_fields
from orchestrator.tracking.plots import learning_curves, rank_by_bit_width
from orchestrator.tracking.summary import SummaryRow, summary_rows
from orchestrator.tracking.timeline import PackTime, pack_times
from orchestrator.tracking.trade_off_plot import MEASURES, quality_against

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PLOTS = "plots"
NARROW_PX, WIDE_PX = 640, 1280
INK, PAPER = "#1f2328", "#ffffff"


@dataclass(frozen=True)
class ReportFigure:
    name: str
    title: str
    figure: "Figure"
    wide: bool = False


def report_figures(
    store: RunStore, rows: Sequence[SummaryRow], packs: Sequence[PackTime]
) -> Iterator[ReportFigure]:
    """Those for which there is something to show."""
    curves = {row["trial"]: store.points(row["trial"]) for row in rows}
    yield ReportFigure("rank-by-bit-width", "Held-out loss", rank_by_bit_width(rows))
    titles = {
        "model_memory": "Quality against memory of the model",
        "peak_memory": "Quality against peak memory",
        "adapter_size": "Quality against size of the adapter",
        "speed": "Quality against speed",
    }
    for name, title in titles.items():
        figure = quality_against(rows, MEASURES[name])
        yield ReportFigure(f"quality-against-{name.replace('_', '-')}", title, figure)
    if (front := front_figure(store)) is not None:
        yield ReportFigure("pareto-front", "Pareto front", front)
    if (memory := memory_by_pack(packs)) is not None:
        yield ReportFigure("memory", "Memory, planned and measured", memory)
    yield ReportFigure("learning-curves", "Learning curves", learning_curves(rows, curves), True)
    if (parallel := parallel_fields(rows)) is not None:
        yield ReportFigure("searched-fields", "Searched fields", parallel, True)
    if (gantt := pack_gantt(packs)) is not None:
        yield ReportFigure("packs", "Packs and slots", gantt, True)


def write_pngs(store: RunStore) -> list[Path]:
    """The report's figures as files.

    Raises:
        ReportError: kaleido, or the browser that it draws with, is missing.
    """
    rows = summary_rows(store)
    try:
        import kaleido  # noqa: F401
        from choreographer.errors import ChromeNotFoundError
    except ImportError as error:
        raise ReportError(
            "--png needs the package kaleido: pip install -e '.[png]' in the project's folder"
        ) from error
    written = []
    for one in report_figures(store, rows, pack_times(store.pack_events)):
        one.figure.update_layout(paper_bgcolor=PAPER, font_color=INK, title=one.title)
        width = WIDE_PX if one.wide else NARROW_PX
        try:
            content = one.figure.to_image(format="png", width=width, scale=2)
        except (ChromeNotFoundError, RuntimeError) as error:
            raise ReportError(
                f"--png needs Chrome or Chromium to draw with: {str(error).splitlines()[0]}: "
                "install one, or set BROWSER_PATH to it"
            ) from error
        path = store.folder / PLOTS / f"{one.name}.png"
        write_bytes(path, content)
        written.append(path)
    return written

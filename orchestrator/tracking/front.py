"""The Pareto front of a sweep with several objectives: its table and its plot.

In: a RunStore. Out: HTML, a plotly figure. Imports plotly inside functions.
"""

from html import escape
from typing import TYPE_CHECKING

from orchestrator.records import TrialResult
from orchestrator.search.objectives import OBJECTIVES, candidates, pareto_front, violations
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.page import table
from orchestrator.tracking.plot_style import COLOURS, GREY, styled
from orchestrator.tracking.translation import trial_name

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def front_table(store: RunStore) -> str:
    """The trials that no other beats in all objectives, the best in the first one first; then those
    that break a constraint. Empty where one objective and no constraint are set."""
    search = store.sweep.config.search
    results = store.results
    names = {trial.number: trial_name(trial.number, trial.params) for trial in store.trials}
    broken = [(r, found) for r in results if (found := violations(search.constraints, r))]
    if len(search.objectives) < 2:
        return _broken(broken, names)
    objectives = [OBJECTIVES[name] for name in search.objectives]
    front = sorted(pareto_front(search, results), key=objectives[0].cost)
    lines = []
    for result in front:
        values = (f'<td class="n">{one.value(result):,.6g}</td>' for one in objectives)
        lines.append(f"<tr><td>{escape(names[result.number])}</td>{''.join(values)}</tr>")
    heads = ["trial", *(one.title for one in objectives)]
    return table(heads, lines, 1) + _broken(broken, names)


def front_figure(store: RunStore) -> "Figure | None":
    """Over the first two objectives; a third one may be why a trial inside is on the front."""
    import plotly.graph_objects as go

    search = store.sweep.config.search
    if len(search.objectives) < 2:
        return None
    first, second = (OBJECTIVES[name] for name in search.objectives[:2])
    names = {trial.number: trial_name(trial.number, trial.params) for trial in store.trials}
    front = {result.number for result in pareto_front(search, store.results)}
    known = candidates(search, store.results)
    figure = go.Figure()
    for title, colour, inside in (("on the front", COLOURS[0], True), ("beaten", GREY, False)):
        some = [result for result in known if (result.number in front) == inside]
        figure.add_scatter(
            x=[second.value(result) for result in some],
            y=[first.value(result) for result in some],
            mode="markers",
            name=title,
            marker={"color": colour, "size": 12},
            customdata=[names[result.number] for result in some],
            hovertemplate="%{customdata}<br>%{y:.6g}, %{x:.6g}<extra></extra>",
        )
    figure.update_layout(xaxis_title=second.title, yaxis_title=first.title)
    return styled(figure)


def _broken(broken: list[tuple[TrialResult, list[str]]], names: dict[int, str]) -> str:
    if not broken:
        return ""
    lines = [
        f"<tr><td>{escape(names[result.number])}</td><td>{escape('; '.join(found))}</td></tr>"
        for result, found in broken
    ]
    return "<h3>Outside the constraints</h3>" + table(["trial", "constraint"], lines, 2)

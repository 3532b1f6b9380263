"""The report's page: its style and the pieces of HTML that it is made of.

In: plain values, escaped here. Out: HTML. Pure.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from orchestrator.tracking.translation import brief

NOTHING = '<p class="soft">Nothing yet.</p>'

STYLE = """
:root { color-scheme: light dark; --page: #f6f8fa; --card: #fff; --ink: #1f2328; --soft: #59636e;
  --line: #d1d9e0; --accent: #0072b2; --good: #00755a; --bad: #b4470b; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --ink: #e6edf3;
  --soft: #9198a1; --line: #30363d; --accent: #56b4e9; --good: #3ec99b; --bad: #f0883e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 0 0 12px; }
h3 { font-size: 15px; margin: 0 0 4px; }
p { margin: 4px 0 0; } .soft { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 22px; margin-top: 20px; }
.cards { display: flex; flex-wrap: wrap; gap: 14px; margin: 18px 0 12px; }
.card { flex: 1 1 170px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 12px 16px; }
.card:first-child { flex-grow: 2; border-color: var(--accent); }
.card b { display: block; font-size: 20px; line-height: 1.35; overflow-wrap: anywhere; }
.card span { color: var(--soft); font-size: 13px; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; }
.plots .wide { grid-column: 1 / -1; } .plots > div { min-width: 0; }
@media (max-width: 900px) { .plots { grid-template-columns: 1fr; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
table.facts { width: auto; } table.facts td:first-child { color: var(--soft); min-width: 220px; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: 13px; white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; } tr:last-child td { border-bottom: 0; }
tr.winner td { font-weight: 600; } tr.winner td:first-child { color: var(--accent); }
.failed { color: var(--bad); } .finished { color: var(--good); } .pruned { color: var(--soft); }
pre { margin: 0; overflow-x: auto; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, monospace; }
details summary { cursor: pointer; font-size: 18px; font-weight: 600; }
details[open] summary { margin-bottom: 12px; }
.js-plotly-plot [class*="tick"] text, .js-plotly-plot [class^="g-"] text,
.js-plotly-plot text.legendtext, .js-plotly-plot .annotation-text, .js-plotly-plot .colorbar text,
.js-plotly-plot .axis-title, .js-plotly-plot .axis .tick text { fill: var(--ink) !important;
  text-shadow: none !important; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def table(heads: Sequence[str], lines: Sequence[str], num_texts: int) -> str:
    """`num_texts`: columns of text, on the left; the others are numbers."""
    if not lines:
        return NOTHING
    cells = "".join(
        f"<th{'' if place < num_texts else ' class=n'}>{escape(head)}</th>"
        for place, head in enumerate(heads)
    )
    head = f"<thead><tr>{cells}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


def card(value: str, label: str) -> str:
    return f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def facts(record: Mapping[str, Any]) -> str:
    """A record's plain values as a table."""
    lines = [
        f"<tr><td>{escape(name.replace('_', ' '))}</td><td>{escape(_fact(value))}</td></tr>"
        for name, value in record.items()
        if isinstance(value, str | int | float | None)
    ]
    if not lines:
        return NOTHING
    return f'<div class="scroll"><table class="facts"><tbody>{"".join(lines)}</tbody></table></div>'


def _fact(value: Any) -> str:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_count else brief(value)

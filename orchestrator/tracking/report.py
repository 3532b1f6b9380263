"""report.html: the whole sweep on one page that opens without a network.

In: a RunStore, of a finished sweep or not. Out: one file in the run folder. Everything that came
from a user is escaped. Imports plotly inside functions.
"""

import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from orchestrator.files import write_text
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.bit_map import bit_maps
from orchestrator.tracking.figures import report_figures
from orchestrator.tracking.front import front_table
from orchestrator.tracking.page import card, facts, page, section, table
from orchestrator.tracking.summary import SummaryRow, param_text, searched_fields, summary_rows
from orchestrator.tracking.timeline import PackTime, pack_times
from orchestrator.tracking.translation import perplexity
from orchestrator.wording import counted
from orchestrator.yaml_core import dump_yaml

MAX_DECISIONS = 40


def write_report(store: RunStore, cost_per_hour: float | None = None) -> Path:
    """`cost_per_hour`: of one worker, in any currency; None: resources.cost_per_hour."""
    path = store.folder / "report.html"
    write_text(path, render_report(store, cost_per_hour))
    return path


def render_report(store: RunStore, cost_per_hour: float | None = None) -> str:
    rows = summary_rows(store)
    sweep = store.sweep
    packs = pack_times(store.pack_events)
    price = sweep.config.resources.cost_per_hour if cost_per_hour is None else cost_per_hour
    parts = [
        _headline(store, rows),
        section("Trials", _trials(rows)),
        section("Pareto front", front) if (front := front_table(store)) else "",
        section("Plots", _plots(store, rows, packs)) if rows else "",
        section("Bits", maps) if (maps := bit_maps(store.read("bits") or {})) else "",
        section("Gate", _gate(store)),
        section("Cost", _cost(rows, packs, price)),
        section("Decisions", _decisions(store.decisions)),
        section("Data", _data(store)),
        section("Base model", facts(store.read("base_model") or {})),
        _configuration(sweep.config.model_dump(mode="json")),
    ]
    return page(sweep.run_id, parts)


def _headline(store: RunStore, rows: Sequence[SummaryRow]) -> str:
    sweep = store.sweep
    counts = ", ".join(
        f"{sum(row['state'] == state for row in rows)} {state}"
        for state in ("finished", "pruned", "failed", "running", "waiting")
        if any(row["state"] == state for row in rows)
    )
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(sweep.created))
    winner = store.read("winner")
    reason = winner["reason"] if winner else "There is no winner yet."
    return (
        f"<h1>{escape(sweep.config.name)}</h1>"
        f'<p class="soft">{escape(sweep.config.base_model.source)} · {counted(len(rows), "trial")}'
        f"{f' ({counts})' if counts else ''} · {escape(sweep.device)} · began {began} · "
        f"{escape(sweep.run_id)}</p>"
        f'<div class="cards">{"".join(_cards(store, rows))}</div><p>{escape(reason)}</p>'
    )


def _cards(store: RunStore, rows: Sequence[SummaryRow]) -> list[str]:
    best = next((row for row in rows if row["winner"]), None)
    if best is None:
        return []
    loss, base = best["eval_loss"], best["baseline_eval_loss"]
    before = f"untrained base {_number(base)}"
    if loss is not None and base is not None:
        before += f" · perplexity {perplexity(base):.2f} → {perplexity(loss):.2f}"
    cards = [
        card(best["name"], "winner"),
        card(_number(loss), before),
        card(f"{best['adapter_mib']:.1f} MiB", "adapter"),
        card(f"{best['model_memory_gib']:.2f} GiB", "base, adapter and optimizer states"),
    ]
    if registration := store.read("registration"):
        alias = "champion" if registration["champion"] else "candidate"
        name = f"{registration['model_name']} v{registration['version']}"
        cards.append(card(name, f"registered as @{alias}: {registration['reason']}"))
    return cards


def _trials(rows: Sequence[SummaryRow]) -> str:
    fields = searched_fields(rows)
    scored = any(row["task_score"] is not None for row in rows)
    heads = ["trial", *fields, "state", "held-out loss", "vs. base"]
    heads += ["right answers"] if scored else []
    heads += ["memory GiB", "adapter MiB", "tokens/s", "train s", "steps"]
    num_texts = len(fields) + 2
    lines = []
    for row in rows:
        over = row["state"] == "finished"
        texts = [str(row["trial"]), *(param_text(row, field) for field in fields)]
        numbers = [
            _number(row["eval_loss"]),
            _number(row["eval_loss_gain"] and -row["eval_loss_gain"], "+.4f"),
            *([_number(row["task_score"], ".1%")] if scored else []),
            _number(row["model_memory_gib"] if over else None, ".2f"),
            _number(row["adapter_mib"] if over else None, ".1f"),
            _number(row["tokens_per_s"] if over else None, ",.0f"),
            _number(row["train_s"] if over else None, ",.0f"),
            str(row["steps"]),
        ]
        cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
        cells += f'<td class="{row["state"]}" title="{escape(row["reason"])}">{row["state"]}'
        cells += f'<br><span class="soft">{escape(row["reason"])}</span></td>'
        cells += "".join(f'<td class="n">{escape(text)}</td>' for text in numbers)
        lines.append(f'<tr class="{"winner" if row["winner"] else ""}">{cells}</tr>')
    return table(heads, lines, num_texts)


def _plots(store: RunStore, rows: Sequence[SummaryRow], packs: Sequence[PackTime]) -> str:
    parts: list[str] = []
    for one in report_figures(store, rows, packs):
        html = one.figure.to_html(
            full_html=False,
            include_plotlyjs=not parts,  # once, inside the page, so that it opens offline
            config={"displayModeBar": False, "responsive": True},
        )
        width = "wide" if one.wide else ""
        parts.append(f'<div class="{width}"><h3>{escape(one.title)}</h3>{html}</div>')
    return f'<div class="plots">{"".join(parts)}</div>'


def _gate(store: RunStore) -> str:
    """Why the winner became champion, or did not, with the numbers that decided it."""
    registration = store.read("registration")
    if registration is None:
        return '<p class="soft">The winner is not registered.</p>'
    verdict = "is the champion" if registration["champion"] else "is a candidate"
    name = f"{registration['model_name']} version {registration['version']}"
    numbers = {key: value for key, value in registration.get("gate", {}).items() if key != "reason"}
    return (
        f"<p><b>{escape(name)} {verdict}</b>: {escape(registration['reason'])}</p>{facts(numbers)}"
    )


def _cost(rows: Sequence[SummaryRow], packs: Sequence[PackTime], price: float | None) -> str:
    """What each trial stands for of the workers' time, loading and idle slots shared out."""
    names = {row["trial"]: row["name"] for row in rows}
    hours: dict[int, float] = {}
    for pack in packs:
        for slot in pack.slots:
            hours[slot.trial] = hours.get(slot.trial, 0.0) + pack.share_of(slot)
    total = sum(pack.worker_hours for pack in packs)
    entries = [(names.get(trial, str(trial)), hours[trial]) for trial in sorted(hours)]
    unused = total - sum(hours.values())
    entries += [("packs that trained nothing", unused)] if unused > 1e-6 else []
    entries.append(("all", total))
    lines = []
    for name, value in entries:
        cells = f'<td>{escape(name)}</td><td class="n">{value:.3f}</td>'
        cells += f'<td class="n">{value * price:,.2f}</td>' if price is not None else ""
        lines.append(f"<tr>{cells}</tr>")
    heads = ["trial", "worker hours"]
    if price is not None:
        heads.append(f"cost at {price:g} an hour")
    return table(heads, lines if packs else [], 1)


def _decisions(decisions: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"<tr><td>{time.strftime('%H:%M:%S', time.localtime(decision['time']))}</td>"
        f"<td>{escape(str(decision['action']))}</td><td>{escape(str(decision['subject']))}</td>"
        f"<td>{escape(str(decision['reason']))}</td></tr>"
        for decision in decisions[-MAX_DECISIONS:]
    ]
    hidden = len(decisions) - MAX_DECISIONS
    note = f'<p class="soft">{hidden} earlier ones are in decisions.jsonl</p>' if hidden > 0 else ""
    return table(["time", "action", "subject", "reason"], lines, 4) + note


def _data(store: RunStore) -> str:
    record: dict[str, Any] = store.read("data") or {}
    named: dict[str, Any] = {}
    for part, value in record.items():
        if isinstance(value, dict):
            named |= {f"{part} {name.removeprefix('num_')}": count for name, count in value.items()}
        else:
            named[part] = value
    return facts(named)


def _configuration(config: Mapping[str, Any]) -> str:
    text = dump_yaml(dict(config))
    return (
        f"<section><details><summary>Configuration</summary><pre>{escape(text)}</pre>"
        "</details></section>"
    )


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)

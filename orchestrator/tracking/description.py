"""The sweep in Markdown, as MLflow shows it at the top of the sweep's run.

In: a RunStore. Out: text. Imports no mlflow.
"""

from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.figures import PLOTS
from orchestrator.tracking.summary import SummaryRow, param_text, searched_fields, summary_rows
from orchestrator.tracking.translation import MAX_TAG_CHARS
from orchestrator.wording import counted

MAX_ROWS = 20
MAX_BARS = 10
MAX_BAR_CHARS = 30


def describe_sweep(store: RunStore, run_id: str) -> str:
    """`run_id`: of the sweep's run in MLflow, whose artifacts the plots are."""
    rows = summary_rows(store)
    parts = [_headline(store, rows), _winner(store, rows), _table(rows), _plots(rows)]
    parts += [_images(store, run_id), _commands(store)]
    return "\n\n".join(part for part in parts if part)[:MAX_TAG_CHARS]


def number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _headline(store: RunStore, rows: list[SummaryRow]) -> str:
    config = store.sweep.config
    space = ", ".join(f"`{field}`" for field in config.search.space) or "nothing"
    states = ("finished", "pruned", "failed")
    count = {state: sum(row["state"] == state for row in rows) for state in states}
    pruned = f"{count['pruned']} pruned, " if count["pruned"] else ""
    return (
        f"## {config.name}\n\nQLoRA adapters for **{_cell(config.base_model.source)}** on "
        f"**{_cell(config.data.train_name)}**: {counted(len(rows), 'trial')} over {space} "
        f"({count['finished']} finished, {pruned}{count['failed']} failed)."
    )


def _winner(store: RunStore, rows: list[SummaryRow]) -> str:
    winner = store.read("winner")
    if winner is None:
        return "No winner yet."
    name = next(row["name"] for row in rows if row["winner"])
    text = f"**Winner: {_cell(name)}.** {_cell(winner['reason'])}."
    if registration := store.read("registration"):
        text += (
            f"\n\nRegistered as `{registration['model_name']}` version {registration['version']}. "
            f"{_cell(registration['reason'])}."
        )
    return text


def _table(rows: list[SummaryRow]) -> str:
    if not rows:
        return ""
    fields = searched_fields(rows)
    scored = any(row["task_score"] is not None for row in rows)
    heads = ["trial", *fields, "eval loss", "gain", *(["right answers"] if scored else [])]
    heads += ["model GiB", "adapter MiB", "state"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows[:MAX_ROWS]:
        params = [_cell(param_text(row, field)) for field in fields]
        known = row["state"] == "finished"
        lines.append(
            [
                str(row["trial"]) + (" 🏆" if row["winner"] else ""),
                *params,
                number(row["eval_loss"]),
                number(row["eval_loss_gain"]),
                *([_percent(row["task_score"])] if scored else []),
                number(row["model_memory_gib"] if known else None, 2),
                number(row["adapter_mib"] if known else None, 1),
                _cell(row["state"]),
            ]
        )
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    hidden = len(rows) - MAX_ROWS
    return text + (f"\n\n… and {hidden} more trials." if hidden > 0 else "")


def _plots(rows: list[SummaryRow]) -> str:
    """Bars of letters, for an image needs a browser to be drawn: longer is better."""
    known = [(row, row["eval_loss"]) for row in rows if row["eval_loss"] is not None][:MAX_BARS]
    if len(known) < 2:
        return ""
    losses = [loss for _, loss in known]
    best, worst = min(losses), max(losses)
    lines = []
    for row, loss in known:
        filled = 1 + round((MAX_BAR_CHARS - 1) * (worst - loss) / ((worst - best) or 1.0))
        lines.append(f"{number(loss)}  {'█' * filled:<{MAX_BAR_CHARS}}  {row['name']}")
    return "Held-out loss:\n\n```\n" + "\n".join(lines) + "\n```"


def _images(store: RunStore, run_id: str) -> str:
    """Plots that `orchestrator report --png` wrote; MLflow serves them as the run's artifacts."""
    return "\n\n".join(
        f"![{path.stem}](get-artifact?path={PLOTS}/{path.name}&run_uuid={run_id})"
        for path in sorted((store.folder / PLOTS).glob("*.png"))
    )


def _commands(store: RunStore) -> str:
    registration = store.read("registration")
    if registration is None:
        return f"Next:\n\n```\norchestrator resume {store.folder}\n```"
    alias = "champion" if registration["champion"] else "candidate"
    uri = f"models:/{registration['model_name']}@{alias}"
    return (
        "Next:\n\n"
        f'```\norchestrator generate --model "{uri}" --prompt "..."\n```\n\n'
        f'```python\nmlflow.pyfunc.load_model("{uri}").predict(["..."])\n```'
    )


def _cell(text: str) -> str:
    """Markdown has no cell with a bar or a line break in it."""
    return str(text).replace("|", "\\|").replace("\n", " ")

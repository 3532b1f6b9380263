"""`orchestrator evaluate`: an adapter measured on a file of examples, or on tasks of lm-eval.

In: the adapter and what to measure it on. Out: a table on stdout, and a JSON file if asked for.
"""

import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from jobs.adapters import open_adapter, rows_to_measure
from orchestrator.config import TaskConfig
from orchestrator.data.prepare import prepare_examples
from orchestrator.data_config import DataConfig
from orchestrator.errors import BaseModelError, ConfigError
from orchestrator.expressions import check_answer_pattern
from orchestrator.files import cache_dir, read_json, write_json
from orchestrator.tracking.bootstrap import paired_interval
from orchestrator.tracking.example_losses import ExampleLosses
from orchestrator.training.quiet import quiet_libraries

CONFIDENCE = 0.95
RESAMPLES = 10_000
PROGRESS_EVERY_S = 15.0
Report = dict[str, Any]


def evaluate_model(
    model: str,
    data: str | None,
    overrides: list[str],
    answers: TaskConfig | None,
    tasks: list[str],
    limit: int | None,
    out: Path | None,
    uri: str,
) -> int:
    """`answers`: how they are generated and compared; None: no exact match."""
    if not data and not tasks:
        raise ConfigError("evaluate needs --data, or --task, or both")
    if answers and not data:
        raise ConfigError("--exact-match needs --data: a file with the answers")
    if limit is not None and not tasks:
        raise ConfigError("--limit needs --task, whose examples it limits: of --data all are used")
    if tasks:
        from orchestrator.training.benchmark_tasks import check_installed

        check_installed()
    progress = _progress(sys.stderr)  # the libraries' silence is of standard error
    with tempfile.TemporaryDirectory() as temporary, quiet_libraries():
        folder = open_adapter(model, uri, Path(temporary))
        config = rows_to_measure(folder, data, overrides) if data else None
        if config and answers:
            from orchestrator.training.exact_match import check_has_answers

            check_has_answers(config)
        report: Report = {"model": model, "data": data}
        if config:
            report |= _losses(folder, config)
        if answers or tasks:
            report |= _generated(folder, config, answers, tasks, limit, progress)
    Console().print(_table(report))
    if out is not None:
        write_json(out, report)
    return 0


def answers_wanted(
    exact_match: bool, max_new_tokens: int, batch_size: int, pattern: str | None
) -> TaskConfig | None:
    """As the command line says it; None: none."""
    if not exact_match:
        if pattern is not None:
            raise ConfigError("--answer-pattern needs --exact-match, whose answers it is for")
        return None
    try:
        check_answer_pattern(pattern or "")
    except ValueError as error:
        raise ConfigError(f"--answer-pattern: {error}") from error
    return TaskConfig(max_new_tokens=max_new_tokens, batch_size=batch_size, answer_pattern=pattern)


def _losses(folder: Path, config: DataConfig) -> Report:
    from orchestrator.tracking.adapter_model import base_source
    from orchestrator.training.adapter_evaluation import evaluate_adapter

    try:
        base = base_source(read_json(folder / "orchestrator.json")["base_model"])
    except (OSError, ValueError) as error:
        raise BaseModelError(str(error)) from error
    manifest = prepare_examples(config, Path(base), cache_dir())
    adapter, alone = evaluate_adapter(folder, manifest)
    ours, theirs = ExampleLosses.from_json(adapter), ExampleLosses.from_json(alone)
    interval = paired_interval((ours.nll - theirs.nll)[:, None], ours.labels, CONFIDENCE, RESAMPLES)
    return {
        "examples": len(adapter["examples"]),
        "bad_rows": manifest.totals.bad_rows,
        "labels": int(ours.labels.sum()),
        "loss": adapter["eval_loss"],
        "perplexity": math.exp(adapter["eval_loss"]),
        "base_loss": alone["eval_loss"],
        "base_perplexity": math.exp(alone["eval_loss"]),
        "difference": [interval.low, interval.high],
        "by_example": adapter,
    }


def _generated(
    folder: Path,
    config: DataConfig | None,
    answers: TaskConfig | None,
    tasks: list[str],
    limit: int | None,
    progress: Callable[[int, int], None],
) -> Report:
    from orchestrator.tracking.adapter_model import load
    from orchestrator.training.benchmark_tasks import run_tasks
    from orchestrator.training.exact_match import answers_of_rows

    try:
        model, tokenizer = load(folder)
    except (OSError, ValueError) as error:
        raise BaseModelError(str(error)) from error
    report: Report = {}
    if config and answers:
        found, bad_rows = answers_of_rows(model, tokenizer, config, answers, progress)
        report["exact_match"] = sum(answer.exact for answer in found) / len(found)
        report["exact_match_bad_rows"] = bad_rows
        report["answers"] = [vars(answer) for answer in found]
    if tasks:
        report["tasks"] = run_tasks(model, tokenizer, tasks, limit)
    return report


def _progress(out: TextIO) -> Callable[[int, int], None]:
    """Answers take seconds each on a CPU; standard output is for the result."""
    said = -math.inf

    def observe(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= PROGRESS_EVERY_S:
            said = time.monotonic()
            print(f"generating answers: {done} of {total} done", file=out)

    return observe


def _table(report: Report) -> Table:
    table = Table("metric", "adapter", "base alone", title=report["model"])
    if "loss" in report:
        low, high = report["difference"]
        table.add_row("examples", f"{report['examples']:,}", "")
        if report["bad_rows"]:
            table.add_row("bad rows skipped", f"{report['bad_rows']:,}", "")
        table.add_row("tokens with loss", f"{report['labels']:,}", "")
        table.add_row("loss", f"{report['loss']:.4f}", f"{report['base_loss']:.4f}")
        table.add_row(
            "perplexity", f"{report['perplexity']:.3f}", f"{report['base_perplexity']:.3f}"
        )
        table.add_row(f"difference, {CONFIDENCE:.0%} interval", f"[{low:+.4f}, {high:+.4f}]", "")
    if "exact_match" in report:
        table.add_row("exact match", f"{report['exact_match']:.1%}", "")
        if report["exact_match_bad_rows"]:
            skipped = report["exact_match_bad_rows"]
            table.add_row("exact match, bad rows skipped", f"{skipped:,}", "")
    for task, metrics in report.get("tasks", {}).items():
        for name, value in metrics.items():
            if isinstance(value, float):
                table.add_row(f"{task} {name.removesuffix(',none')}", f"{value:.4f}", "")
    return table

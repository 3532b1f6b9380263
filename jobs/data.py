"""`orchestrator data prepare | inspect | stats`: make a configuration's shards, and look at them.

In: paths and options. Out: an exit code. inspect and stats prepare what is not there yet.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.inputs import check_sources
from jobs.settled import settled
from orchestrator.config import SweepConfig
from orchestrator.data.formats import Tokenizer
from orchestrator.data.inspection import Figures, ShownBlock, read_figures, show_block
from orchestrator.data.manifest import Manifest, Role, fetch_manifest
from orchestrator.data.prepare import (
    PreparedData,
    build_recipe,
    find_prepared,
    place_of,
    prepare,
    run_in_process,
)
from orchestrator.data.reader import BlockReader
from orchestrator.data.shards import bad_rows
from orchestrator.data.sources import is_small
from orchestrator.data.tokenizing import load_tokenizer
from orchestrator.errors import ConfigError
from orchestrator.files import cache_dir, write_text
from orchestrator.loading import load_config
from orchestrator.training.model_source import tokenizer_folder

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LEARNED, GIVEN, BORDER = "bold green", "dim", "cyan"
TERMINAL_BINS, PLOT_BINS = 12, 60
BAR_CHARACTERS = 40
MAX_BAD_ROWS = 20


def prepare_data(path: Path, overrides: list[str], ray_address: str | None) -> int:
    data = _prepared(_config(path, overrides), ray_address)
    console = Console(soft_wrap=True, highlight=False)
    _print_bad_rows(console, data)
    for manifest in (data.train, data.held_out):
        console.print(f"{manifest.role}: manifest {manifest.digest}", markup=False)
    return 0


def inspect_data(
    path: Path,
    overrides: list[str],
    ray_address: str | None,
    held_out: bool,
    first: int,
    count: int,
) -> int:
    role: Role = "held_out" if held_out else "train"
    config = _config(path, overrides)
    data = _prepared(config, ray_address)
    reader = BlockReader(fetch_manifest(data.place, role))
    if first >= reader.num_blocks:
        raise ConfigError(
            f"--block must be below {reader.num_blocks}, the number of {role} blocks, "
            f"but got {first}: give a lower one"
        )
    tokenizer = load_tokenizer(str(tokenizer_folder(config.base_model)))
    console = Console(soft_wrap=True, highlight=False)
    for number in range(first, min(first + count, reader.num_blocks)):
        in_colour = console.is_terminal and not console.no_color
        console.print(_block_text(show_block(reader, number), tokenizer, in_colour))
    return 0


def show_stats(path: Path, overrides: list[str], ray_address: str | None, plot: Path | None) -> int:
    data = _prepared(_config(path, overrides), ray_address)
    console = Console(highlight=False)
    console.print(_totals_table(data))
    roles: tuple[Role, ...] = ("train", "held_out")
    figures = {role: read_figures(fetch_manifest(data.place, role)) for role in roles}
    for role in roles:
        console.print(_histogram_table(role, figures[role]))
    _print_bad_rows(console, data)
    if plot is not None:
        html = _length_plot(figures).to_html(include_plotlyjs=True, full_html=True)
        write_text(plot, html)
        console.print(f"plot: {plot}", markup=False)
    return 0


def _config(path: Path, overrides: list[str]) -> SweepConfig:
    config = settled(load_config(path, overrides))
    check_sources(config.data)
    return config


def _prepared(config: SweepConfig, ray_address: str | None) -> PreparedData:
    folder = tokenizer_folder(config.base_model)
    place = place_of(config.data, build_recipe(config.data, folder), cache_dir())
    if found := find_prepared(place):
        print(f"data: {place}")
        return found
    from cluster.ray_runtime import ray_cluster, running_cluster

    if running_cluster(ray_address) is None and is_small(config.data):
        return prepare(config.data, folder, cache_dir(), run_in_process, print)
    from cluster.sharding import RayTasks

    with ray_cluster(ray_address) as nodes, RayTasks(int(sum(n.num_cpus for n in nodes))) as pool:
        return prepare(config.data, folder, cache_dir(), pool, print)


def _block_text(block: ShownBlock, tokenizer: Tokenizer, in_colour: bool) -> Text:
    """Documents one below the other; what the model learns to write stands out."""
    text = Text()
    text.append(f"block {block.number}: {len(block.documents)} documents\n", style="bold")
    for number, document in enumerate(block.documents, start=1):
        head = f"── document {number}: {document.num_tokens} tokens, key {document.key[:12]} ──\n"
        text.append(head, style=BORDER)
        for run in document.runs:
            words = tokenizer.decode(run.token_ids)
            if run.is_learned and not in_colour:
                words = f"⟦{words}⟧"
            text.append(words, style=LEARNED if run.is_learned else GIVEN)
        text.append("\n")
    return text.append(f"── {block.num_padding} positions of padding ──", style=BORDER)


def _totals_table(data: PreparedData) -> Table:
    table = Table(title=f"data in {data.place}")
    table.add_column("")
    rows: dict[str, list[str]] = {}
    for manifest in (data.train, data.held_out):
        table.add_column(manifest.role, justify="right")
        for name, value in _totals(manifest).items():
            rows.setdefault(name, []).append(value)
    for name, values in rows.items():
        table.add_row(name, *values)
    repeats = data.train.repeats
    table.add_row("equal to an earlier example", f"{repeats.duplicates:,}", "")
    table.add_row("equal to a held-out example", f"{repeats.contaminated:,}", "")
    return table


def _totals(manifest: Manifest) -> dict[str, str]:
    totals = manifest.totals
    counts = {
        "rows": totals.rows,
        "documents": totals.num_documents,
        "tokens": totals.num_tokens,
        "tokens with loss": totals.num_loss_tokens,
        "blocks": totals.num_blocks,
        "shards": len(manifest.shards),
        "truncated": totals.truncated,
        "split": totals.split,
        "dropped": totals.dropped,
        "without loss": totals.without_loss,
        "bad rows skipped": totals.bad_rows,
    }
    shown = {name: f"{count:,}" for name, count in counts.items()}
    return shown | {"positions filled": f"{manifest.packing_efficiency:.2%}"}


def _histogram_table(role: Role, figures: Figures) -> Table:
    quantiles = ", ".join(f"{name} {value:,}" for name, value in figures.quantiles.items())
    table = Table(title=f"{role}: tokens per document ({quantiles})")
    table.add_column("tokens", justify="right")
    table.add_column("documents", justify="right")
    table.add_column("")
    bins = figures.histogram(TERMINAL_BINS)
    most = max(count for _, _, count in bins)
    for low, high, count in bins:
        bar = "█" * round(BAR_CHARACTERS * count / most)
        table.add_row(f"{low:,}–{high:,}", f"{count:,}", bar)
    return table


def _length_plot(figures: dict[Role, Figures]) -> "Figure":
    from plotly.graph_objects import Figure, Histogram

    from orchestrator.tracking.plot_style import COLOURS, styled

    figure = Figure()
    for (role, found), colour in zip(figures.items(), COLOURS, strict=False):
        figure.add_trace(
            Histogram(
                x=found.document_lengths,
                nbinsx=PLOT_BINS,
                histnorm="percent",
                name=role,
                opacity=0.6,
                marker_color=colour,
            )
        )
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title="tokens in a document")
    figure.update_yaxes(title="% of documents")
    return styled(figure, height=480)


def _print_bad_rows(console: Console, data: PreparedData) -> None:
    found = [
        row
        for manifest in (data.train, data.held_out)
        for shard in manifest.shards
        if shard.bad_rows
        for row in bad_rows(data.place, shard)
    ]
    for row in found[:MAX_BAD_ROWS]:
        console.print(f"skipped {row['place']}: {row['problem']}", markup=False)
    if len(found) > MAX_BAD_ROWS:
        more = len(found) - MAX_BAD_ROWS
        console.print(f"and {more:,} more in the shards' records in {data.place}", markup=False)

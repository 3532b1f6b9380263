"""The command line: `orchestrator VERB`. Parses, calls one function, turns errors into exit codes.

Exit codes: 0 done, 1 the work failed, 2 the input is wrong, 130 interrupted; of a sweep on a
cluster also 3 cancelled or paused, 4 never started, 5 no contact. Imports nothing heavy: `--help`
answers in well under half a second.
"""

import atexit
import gc
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from jobs.cluster_cli import jobs_app, submit
from jobs.options import AdapterOption, ReadingOption, RunsDir, TrackingUri, chosen_store
from jobs.registry_cli import registry_app
from orchestrator.errors import (
    BaseModelError,
    ConfigError,
    ContactLost,
    DataError,
    NeverStarted,
    OrchestratorError,
    RunFolderError,
    StrategyError,
    is_disk_full,
)

EXIT_CODES: dict[type[OrchestratorError], int] = {
    ConfigError: 2,
    DataError: 2,
    BaseModelError: 2,
    StrategyError: 2,
    RunFolderError: 2,
    NeverStarted: 4,
    ContactLost: 5,
}


class Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # typer ends without a word
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="orchestrator",
    cls=Commands,
    help="QLoRA sweeps: one YAML file in, a registered champion adapter out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Shards of a dataset: make them, look at them.", no_args_is_help=True)

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The sweep's YAML file; - is standard input.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as trial.steps=50."),
]
NewestRun = Annotated[
    Path | None, typer.Argument(metavar="RUN_DIR", help="Default: the newest run.")
]
RunDirOption = Annotated[
    Path | None, typer.Option(help="The run folder to make; default: runs/NAME-DATE.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="A running Ray cluster; `auto` finds one. Default: start a local Ray."),
]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"orchestrator {metadata.version('qlora-orchestrator')}")
        raise typer.Exit()


@app.callback()
def before_any_verb(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def sweep(
    config: ConfigPath,
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    ray_address: RayAddress = None,
    dry_run: Annotated[bool, typer.Option(help="Show what would run; start nothing.")] = False,
    or_resume: Annotated[
        bool, typer.Option(help="Go on with the sweep if the run folder holds it.")
    ] = False,
    await_workers: Annotated[
        int, typer.Option(min=0, metavar="SECONDS", help="For a cluster to grow to all workers.")
    ] = 0,
    log_file: Annotated[Path | None, typer.Option(help="Keep what is printed there, too.")] = None,
) -> int:
    """Run all trials on Ray, register the winner."""
    if log_file is not None:
        from jobs.driver_log import keep_log

        keep_log(log_file)
    if dry_run:
        from jobs.dry_run import show_plan
        from orchestrator.planning.machine import this_machine

        return show_plan(config, overrides or [], run_dir, ray_address, this_machine())
    from jobs.sweep import Start, start_sweep

    start = Start(run_dir, ray_address, or_resume, await_workers)
    return start_sweep(config, overrides or [], start)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[
        str | None,
        typer.Option(help="Such as 8xH100-80GB or 4xH200,8xL40S; default: those here."),
    ] = None,
) -> int:
    """Show a sweep's packs, memory, schedule, hours and price. Starts nothing."""
    from jobs.plan import show
    from orchestrator.planning.machine import this_machine

    return show(config, overrides or [], gpus, this_machine())


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run folder of a sweep.")],
    ray_address: RayAddress = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Change resources, tracking or registry, or widen search.space.",
        ),
    ] = None,
    add_trials: Annotated[
        int | None,
        typer.Option(min=1, help="Train so many more, also of a sweep that is complete."),
    ] = None,
) -> int:
    """Go on with a sweep after a crash or Ctrl-C, or extend it. Nothing is trained again."""
    from jobs.sweep import resume_sweep

    return resume_sweep(run_dir, ray_address, overrides or [], add_trials)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    register: Annotated[bool, typer.Option(help="Register the adapter.")] = False,
) -> int:
    """Train the file's one concrete trial in this process. Its search space is not used."""
    from jobs.sweep import train_one

    return train_one(config, overrides or [], run_dir, register)


@app.command()
def generate(
    model: AdapterOption,
    prompt: Annotated[str | None, typer.Option(help="What to answer or continue.")] = None,
    chat: Annotated[bool, typer.Option(help="Talk with it, line by line.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    tracking_uri: TrackingUri = None,
    runs_dir: RunsDir = Path("runs"),
) -> int:
    """Answer a prompt with an adapter on its base, or talk with it."""
    from jobs import generate as job

    if chat == (prompt is not None):
        raise ConfigError("generate needs --prompt or --chat, and not both")
    uri = chosen_store(tracking_uri, runs_dir)
    if prompt is None:
        return job.chat(model, max_new_tokens, temperature, uri)
    return job.generate_text(prompt, model, max_new_tokens, temperature, uri)


@app.command()
def evaluate(
    model: AdapterOption,
    data: Annotated[
        str | None, typer.Option(help="Examples, given like data.train; all rows are used.")
    ] = None,
    overrides: ReadingOption = None,
    exact_match: Annotated[
        bool, typer.Option(help="Generate each answer, and compare it with the example's.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="For --exact-match.")] = 64,
    batch_size: Annotated[
        int, typer.Option(min=1, help="For --exact-match: so many answers are generated together.")
    ] = 16,
    answer_pattern: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="For --exact-match: compare its first match, or that one's group: '#### (.+)'.",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="TASK", help="A task of the lm-eval package."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use at most so many examples of a task.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for all of it.")] = None,
    tracking_uri: TrackingUri = None,
    runs_dir: RunsDir = Path("runs"),
) -> int:
    """Measure loss, perplexity and right answers of an adapter. Or its score in lm-eval."""
    from jobs.evaluate import answers_wanted, evaluate_model

    uri = chosen_store(tracking_uri, runs_dir)
    answers = answers_wanted(exact_match, max_new_tokens, batch_size, answer_pattern)
    return evaluate_model(model, data, overrides or [], answers, tasks or [], limit, out, uri)


@app.command()
def export(
    model: AdapterOption,
    to: Annotated[Path, typer.Option("--out", help="The model folder to write.")],
    form: Annotated[
        str, typer.Option(help="merged: 16-bit weights; nf4 or int8: these quantised again.")
    ] = "merged",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    data: Annotated[
        str | None,
        typer.Option(help="Examples to compare on; default: those that its sweep held out."),
    ] = None,
    overrides: ReadingOption = None,
    max_loss_increase: Annotated[
        float, typer.Option(help="Nats of held-out loss that it may lose; more is refused.")
    ] = 0.02,
    min_agreement: Annotated[
        float, typer.Option(help="Fraction of places where it must say the same token.")
    ] = 0.9,
    tracking_uri: TrackingUri = None,
    runs_dir: RunsDir = Path("runs"),
) -> int:
    """Merge an adapter into its base, for transformers or vLLM. Refused if that loses much."""
    from jobs.export import export_model

    uri = chosen_store(tracking_uri, runs_dir)
    changes = overrides or []
    return export_model(
        model, to, form, dtype, data, changes, max_loss_increase, min_agreement, uri
    )


@app.command()
def report(
    run_dir: NewestRun = None,
    runs_dir: RunsDir = Path("runs"),
    png: Annotated[bool, typer.Option(help="Write its plots as PNG files too.")] = False,
    cost_per_hour: Annotated[
        float | None,
        typer.Option(min=0.0, help="Price of a worker's hour; default: resources.cost_per_hour."),
    ] = None,
) -> int:
    """Write the HTML report of a run anew, and say where it is."""
    from jobs.views import rewrite_report

    return rewrite_report(run_dir, runs_dir, png, cost_per_hour)


@app.command()
def sync(
    run_dir: NewestRun = None,
    runs_dir: RunsDir = Path("runs"),
    tracking_uri: Annotated[
        str | None, typer.Option(help="Any MLflow server; default: the one of the run.")
    ] = None,
) -> int:
    """Bring MLflow up to date with a run folder. A server that knows nothing of it gets all."""
    from jobs.views import sync_run

    return sync_run(run_dir, runs_dir, tracking_uri)


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Of this machine.")] = 5000,
    runs_dir: RunsDir = Path("runs"),
    tracking_uri: TrackingUri = None,
) -> int:
    """Open the MLflow UI on the local store."""
    from jobs.views import serve_ui

    serve_ui(port, tracking_uri, runs_dir)


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option(help="The reference that docs/ holds.")] = False,
) -> int:
    """Print the configuration's JSON schema, for editors."""
    from jobs.views import print_schema

    return print_schema(markdown)


@app.command()
def doctor(
    target: Annotated[
        str | None, typer.Option(help="`kubernetes`, or a Ray dashboard's http:// address.")
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Default: the kubeconfig's.")] = None,
    context: Annotated[str | None, typer.Option(help="Context of the kubeconfig.")] = None,
) -> int:
    """Say what this machine can do, or a cluster, and what to fix."""
    from jobs.doctor import examine, examine_target

    return examine_target(target, namespace, context) if target else examine()


@data_app.command("prepare")
def data_prepare(
    config: ConfigPath, overrides: Overrides = None, ray_address: RayAddress = None
) -> int:
    """Make the shards that the file's sweep would read."""
    from jobs.data import prepare_data

    return prepare_data(config, overrides or [], ray_address)


@data_app.command("inspect")
def data_inspect(
    config: ConfigPath,
    overrides: Overrides = None,
    ray_address: RayAddress = None,
    held_out: Annotated[bool, typer.Option("--held-out", help="Not the training data.")] = False,
    block: Annotated[int, typer.Option(min=0, help="The first block to show.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many blocks.")] = 1,
) -> int:
    """Show blocks as text. Where documents begin, and what the model learns to write."""
    from jobs.data import inspect_data

    return inspect_data(config, overrides or [], ray_address, held_out, block, count)


@data_app.command("stats")
def data_stats(
    config: ConfigPath,
    overrides: Overrides = None,
    ray_address: RayAddress = None,
    plot: Annotated[Path | None, typer.Option(help="An HTML file to write a plot to.")] = None,
) -> int:
    """Count tokens and documents. Their lengths, how full the blocks are, what was cut."""
    from jobs.data import show_stats

    return show_stats(config, overrides or [], ray_address, plot)


@data_app.command("stdlib-docs")
def stdlib_docs(
    out: Annotated[Path, typer.Option(help="The JSONL file to write.")] = Path("stdlib-docs.jsonl"),
) -> int:
    """Make questions and answers from the installed Python's docstrings."""
    from orchestrator.data.stdlib_docs import write_stdlib_docs

    print(f"{write_stdlib_docs(out)} examples in {out}")
    return 0


# In the order of the help.
app.command()(submit)
app.add_typer(data_app, name="data")
app.add_typer(registry_app, name="registry")
app.add_typer(jobs_app, name="jobs")


def main() -> None:
    # MLflow reports its use to its makers unless told otherwise; that is for the user to choose.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Eight processes of the UI's server, for jobs that no sweep has: 12 s of a core at its start.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    # At its end Python looks for cycles among the 300,000 objects of the imported libraries: 0.9 s.
    atexit.register(gc.freeze)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    try:
        return int(app(arguments, prog_name="orchestrator", standalone_mode=False) or 0)
    except typer.Exit as error:
        return error.exit_code
    except TyperException as error:
        print(_usage_error(error), file=sys.stderr)
        return 2
    except OrchestratorError as error:
        print(f"error: {error}", file=sys.stderr)
        return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)
    except OSError as error:
        if is_disk_full(error):
            print(f"error: the disk is full: {error}: free space and run again", file=sys.stderr)
        elif error.filename is not None:  # a path that somebody named
            print(f"error: {error}", file=sys.stderr)
        else:
            raise
        return 1
    except typer.Abort:
        return 130


def _usage_error(error: TyperException) -> str:
    words = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":  # typer exports no name for it
        return words
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "orchestrator"
    words = words.replace("Value error, ", "").rstrip(".")
    return f"error: {words}: see `{command} --help`"

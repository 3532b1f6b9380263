"""The command line of `orchestrator registry`: parses, and calls jobs/registry.py."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.options import RunsDir, TrackingUri, chosen_store

registry_app = typer.Typer(
    help="Registered models: versions, champions, and how they came about.", no_args_is_help=True
)

ModelName = Annotated[str, typer.Argument(metavar="NAME", help="Of the registered model.")]
VERSION = "NAME/VERSION or NAME@ALIAS, with or without models:/."
RUNS = Path("runs")


@registry_app.command("list")
def list_(tracking_uri: TrackingUri = None, runs_dir: RunsDir = RUNS) -> int:
    """All registered models with their champions."""
    from jobs.registry import list_models

    return list_models(chosen_store(tracking_uri, runs_dir))


@registry_app.command()
def show(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="NAME; or NAME/VERSION or NAME@ALIAS.")
    ],
    tracking_uri: TrackingUri = None,
    runs_dir: RunsDir = RUNS,
) -> int:
    """A model's versions and past champions. Or one version in full."""
    from jobs.registry import show_model

    return show_model(chosen_store(tracking_uri, runs_dir), model)


@registry_app.command()
def compare(
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help=VERSION)],
    champion: Annotated[str, typer.Argument(metavar="CHAMPION", help=VERSION)],
    tracking_uri: TrackingUri = None,
    runs_dir: RunsDir = RUNS,
) -> int:
    """What the gate would say of one version against another. Changes nothing."""
    from jobs.registry import compare_versions

    return compare_versions(chosen_store(tracking_uri, runs_dir), candidate, champion)


@registry_app.command()
def promote(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=VERSION)],
    force: Annotated[bool, typer.Option(help="Do without the gate; needs --reason.")] = False,
    reason: Annotated[str, typer.Option(help="Kept in the history.")] = "",
    tracking_uri: TrackingUri = None,
    runs_dir: RunsDir = RUNS,
) -> int:
    """Make a version champion, if the gate agrees. Exits 1 if it does not."""
    from jobs.registry import promote_version

    return promote_version(chosen_store(tracking_uri, runs_dir), model, force, reason)


@registry_app.command()
def rollback(
    model: ModelName,
    reason: Annotated[str, typer.Option(help="Kept in the history.")] = "",
    tracking_uri: TrackingUri = None,
    runs_dir: RunsDir = RUNS,
) -> int:
    """Give the alias back to the champion before."""
    from jobs.registry import roll_back

    return roll_back(chosen_store(tracking_uri, runs_dir), model, reason)

"""Options that several commands share, and what they mean together. Imports nothing heavy."""

import os
from pathlib import Path
from typing import Annotated

import typer

RunsDir = Annotated[Path, typer.Option(help="Folder of the runs and the local MLflow store.")]
TrackingUri = Annotated[
    str | None,
    typer.Option(help="MLflow server; default: MLFLOW_TRACKING_URI, then the local store."),
]
AdapterOption = Annotated[
    str, typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION, or an adapter's folder.")
]
ReadingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Read the rows of --data otherwise than in training, such as format=chat.",
    ),
]


def chosen_store(tracking_uri: str | None, runs_dir: Path) -> str:
    from orchestrator.tracking.stores import default_store

    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_store(runs_dir)

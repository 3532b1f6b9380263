"""`orchestrator ui`, `report`, `sync`, `schema`: ways to look at what is there."""

import json
import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

from jobs.options import chosen_store
from orchestrator.errors import RunFolderError, TrackingError
from orchestrator.sweep.run_store import RunStore
from orchestrator.wording import counted


def open_run(run_dir: Path | None, runs_dir: Path) -> RunStore:
    """The run folder named, or the newest one."""
    if run_dir is not None:
        return RunStore.open(run_dir)
    created: dict[Path, float] = {}
    for path in runs_dir.glob("*/sweep.json"):
        try:
            created[path.parent] = RunStore.open(path.parent).sweep.created
        except RunFolderError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not created:
        raise RunFolderError(f"{runs_dir} holds no run: name a run folder, or --runs-dir")
    return RunStore.open(max(created, key=lambda folder: created[folder]))


def rewrite_report(
    run_dir: Path | None, runs_dir: Path, png: bool, cost_per_hour: float | None
) -> int:
    from orchestrator.tracking.figures import write_pngs
    from orchestrator.tracking.report import write_report

    store = open_run(run_dir, runs_dir)
    print(write_report(store, cost_per_hour))
    if png:
        for path in write_pngs(store):
            print(path)
    return 0


def sync_run(run_dir: Path | None, runs_dir: Path, tracking_uri: str | None) -> int:
    from orchestrator.tracking.mlflow_view import MlflowView
    from orchestrator.tracking.stores import check_reachable, resolve_tracking_uri, without_password

    store = open_run(run_dir, runs_dir)
    uri = tracking_uri or resolve_tracking_uri(store.sweep.config)
    check_reachable(uri)
    with store.locked():
        view = MlflowView(store, uri)
        view.connect()
        dead = view.close_orphans()
        view.finish("FINISHED" if store.read("winner") else "KILLED")
    for run_id in dead:
        print(f"{run_id} is dead: its runs are closed")
    shown = counted(len(store.trials), "trial")
    print(f"{without_password(uri)} shows {shown} of {store.folder.name}")
    return 0


def serve_ui(port: int, tracking_uri: str | None, runs_dir: Path) -> NoReturn:
    """Becomes the server, so that whatever ends this command ends it."""
    from orchestrator.tracking.stores import default_store, is_absent, ui_command, without_password

    uri = chosen_store(tracking_uri, runs_dir)
    if is_absent(uri):  # MLflow would make an empty one
        if uri == default_store(runs_dir):
            open_run(None, runs_dir)
        raise TrackingError(
            f"{without_password(uri)} is not there: `orchestrator sync` makes it of a run folder"
        )
    _check_port(port)
    command = ui_command(uri, port)
    print(f"MLflow UI on http://127.0.0.1:{port} (end it with Ctrl-C)")
    # What a browser shows until it is told otherwise, and remembers, has no runs on its first page.
    print("sweeps and trials are under *Model training*, at the top left", flush=True)
    os.execv(command[0], command)


def _check_port(port: int) -> None:
    """The server itself would end with 0."""
    try:
        with socket.create_server(("127.0.0.1", port)):
            pass
    except OSError as error:
        raise TrackingError(f"--port {port} cannot be used: {error}: choose another") from error


def print_schema(markdown: bool) -> int:
    from jobs.reference import render_reference
    from orchestrator.config import SweepConfig

    if markdown:
        print(render_reference(), end="")
        return 0
    print(json.dumps(SweepConfig.model_json_schema(), indent=2))
    return 0

"""MLflow servers for tests: processes that are started and ended by their id."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.errors import TrackingError
from orchestrator.tracking.stores import check_reachable, ui_command

START_TIMEOUT_S = 90


@contextmanager
def mlflow_server(store: str) -> Iterator[str]:
    """The address of a server on a SQLite store; it takes some 10 s to start."""
    port = free_port()
    server = subprocess.Popen(
        ui_command(store, port),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # as jobs/cli.py
    )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address)
        yield address
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_for(address: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return check_reachable(address)
        except TrackingError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)

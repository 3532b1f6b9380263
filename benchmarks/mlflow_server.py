"""An MLflow server process on a SQLite store, started and ended by its id."""

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from orchestrator.errors import TrackingError
from orchestrator.tracking.stores import check_reachable, client, default_store, ui_command

START_TIMEOUT_S = 120.0
# Where there are several cores, the server has the last one, and what is measured the others.
_CORES = sorted(os.sched_getaffinity(0))
SERVER_CORES, OTHER_CORES = _CORES[-1:], _CORES[:-1] or _CORES


def on_cores(cores: Sequence[int]) -> list[str]:
    """What a command that shall run there, and nowhere else, begins with."""
    return ["taskset", "-c", ",".join(map(str, cores))]


def empty_store(folder: Path, template: Path) -> str:
    """The URI of a new database with MLflow's tables, which take 8 s to make: once, in `template`,
    from where it is copied."""
    store = default_store(template)
    if not (template / "mlflow.db").exists():
        template.mkdir(parents=True, exist_ok=True)
        client(store).search_experiments(max_results=1)
    folder.mkdir(parents=True)
    shutil.copy(template / "mlflow.db", folder / "mlflow.db")
    return default_store(folder)


class MlflowServer:
    def __init__(self, store: str, port: int) -> None:
        # It would run on another machine: what it takes of this one is not what is measured.
        self._command = [*on_cores(SERVER_CORES), *ui_command(store, port)]
        self._process: subprocess.Popen[bytes] | None = None
        self.address = f"http://127.0.0.1:{port}"

    @property
    def running(self) -> bool:
        return self._process is not None

    def __enter__(self) -> "MlflowServer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Takes some 10 s until it answers; see `wait`."""
        nothing = subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, stdout=nothing, stderr=nothing)

    def wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                return check_reachable(self.address)
            except TrackingError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def kill(self) -> None:
        """Its workers end with it: the server process is their parent and reaps them."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

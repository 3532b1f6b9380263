"""Close the runs of sweeps whose process was killed: nobody else would, and they show as RUNNING.

In: a client and an experiment. Out: ended runs. A sweep is dead if its run folder is on this
machine and nobody holds its lock; one whose folder is elsewhere is left alone.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import RunFolderError
from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.runs import (
    FOLDER_TAG,
    RUN_ID_TAG,
    TRIAL_TAG,
    end,
    find_runs,
    search_all,
)
from orchestrator.tracking.stores import client, mlflow_calls

if TYPE_CHECKING:
    from mlflow import MlflowClient

OPEN = ("RUNNING", "SCHEDULED")

logger = logging.getLogger(__name__)


def close_orphans(uri: str, experiment_id: str, own_run_id: str) -> list[str]:
    """Ids of the other sweeps of this experiment that were found dead, and are KILLED now.

    A resume opens them again.

    Raises:
        TrackingError: MLflow refused a call.
    """
    closed = []
    with mlflow_calls(uri):
        api = client(uri)
        for run in search_all(api, experiment_id, "attributes.status = 'RUNNING'"):
            tags = run.data.tags
            if TRIAL_TAG in tags or tags.get(RUN_ID_TAG, own_run_id) == own_run_id:
                continue
            if _close(api, experiment_id, tags[RUN_ID_TAG], tags.get(FOLDER_TAG, "")):
                closed.append(tags[RUN_ID_TAG])
    return closed


def _close(api: "MlflowClient", experiment_id: str, sweep_id: str, folder: str) -> bool:
    if not folder or not (Path(folder) / "sweep.json").exists():
        return False
    store = RunStore.open(Path(folder))
    if store.sweep.run_id != sweep_id:
        return False
    try:
        with store.locked():
            # Trials first: while its own run is open, a second try finds what the first left.
            for run in reversed(list(find_runs(api, experiment_id, sweep_id))):
                if run.info.status in OPEN:
                    end(api, run.info.run_id, "KILLED")
    except RunFolderError:  # it lives
        return False
    logger.warning("tracking: sweep %s is dead: its runs are closed", sweep_id)
    return True

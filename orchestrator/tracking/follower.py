"""Keep MLflow up to date from a thread of its own, so that tracking never slows training.

In: a connected MlflowView. Out: calls of its `sync`, now and then.
"""

import logging
import threading

from orchestrator.errors import TrackingError
from orchestrator.tracking.mlflow_view import MlflowView
from orchestrator.tracking.stores import check_reachable, without_password

logger = logging.getLogger(__name__)

# A call to a dead server gives up after minutes; the end of a sweep waits for it no longer.
STOP_TIMEOUT_S = 30.0


class TrackingFollower:
    def __init__(self, view: MlflowView, every_s: float = 2.0) -> None:
        self._view = view
        self._every_s = every_s
        self._stopped = threading.Event()
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._follow, name="tracking", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread and send the rest from here.

        Raises:
            TrackingError: MLflow does not have everything; the run folder does.
        """
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            raise TrackingError(
                f"MLflow at {without_password(self._view.uri)} does not answer: the run folder "
                "holds everything, send it later with `orchestrator sync`"
            )
        check_reachable(self._view.uri)
        self._view.sync()

    def _follow(self) -> None:
        while not self._stopped.wait(self._every_s):
            try:
                self._view.sync()
            # One of the project's two broad excepts: a lost metric must not end a training run.
            # Nothing is lost, for the run folder holds it and the next sync sends it.
            except Exception as error:
                self._warn(error)

    def _warn(self, error: Exception) -> None:
        """Once per distinct error: a server that is down would fill the log."""
        text = f"{type(error).__name__}: {error}"
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("tracking: %s (training goes on; it will be sent again)", text)

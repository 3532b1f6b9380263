"""Keep MLflow up to date from a thread of its own, so that tracking never slows training.

In: an MlflowView. Out: calls of its `connect` and then of its `sync`, now and then.
"""

import logging
import threading
import time

from orchestrator.errors import TrackingError, TrackingUnreachable
from orchestrator.tracking.mlflow_view import MlflowView
from orchestrator.tracking.stores import check_reachable, without_password

logger = logging.getLogger(__name__)

# A call to a server that hangs gives up after a while; the end of a sweep waits no longer for it.
STOP_TIMEOUT_S = 45.0
STOP_TRIES = 3
EVERY_S = 5.0
# Of one core, at most. Python runs one thread at a time, so where this process trains, what the
# follower takes is lost to training.
CPU_FRACTION = 0.1
CPU_FRACTION_BESIDE_TRAINING = 0.005


class TrackingFollower:
    def __init__(
        self, view: MlflowView, every_s: float = EVERY_S, cpu_fraction: float = CPU_FRACTION
    ) -> None:
        self._view = view
        self._every_s = every_s
        self._cpu_fraction = cpu_fraction
        self._tried = threading.Event()
        self._refusal: TrackingError | None = None
        self._stopped = threading.Event()
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._follow, name="tracking", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def await_connection(self, timeout_s: float) -> None:
        """Wait for the first try to connect; one that takes longer goes on in the background.

        Raises:
            TrackingError: MLflow answered, and waiting will not help.
        """
        self._tried.wait(timeout_s)
        if self._refusal is not None:
            raise self._refusal

    def stop(self) -> None:
        """End the thread and send the rest from here.

        Raises:
            TrackingError: MLflow does not have everything; the run folder does.
        """
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            raise TrackingUnreachable(
                f"MLflow at {without_password(self._view.uri)} does not answer: the run folder "
                "holds everything, send it later with `orchestrator sync`"
            )
        for tries_left in reversed(range(STOP_TRIES)):
            try:
                check_reachable(self._view.uri)
                return self._view.sync()
            except TrackingUnreachable:  # or a connection that the server closed while it was idle
                if not tries_left:
                    raise

    def _follow(self) -> None:
        try:
            self._view.connect()
            self._view.close_orphans()
        except TrackingUnreachable as error:
            self._warn(error)
        except TrackingError as error:
            self._refusal = error
            return
        finally:
            self._tried.set()
        rest_s = self._every_s
        while not self._stopped.wait(rest_s):
            began_s = time.thread_time()
            try:
                self._view.sync()
            # One of the project's two broad excepts: a lost metric must not end a training run.
            # Nothing is lost, for the run folder holds it and the next sync sends it.
            except Exception as error:
                self._warn(error)
            rest_s = max(self._every_s, (time.thread_time() - began_s) / self._cpu_fraction)

    def _warn(self, error: Exception) -> None:
        """Once per distinct error: a server that is down would fill the log."""
        text = f"{type(error).__name__}: {error}"
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("tracking: %s (training goes on; it will be sent again)", text)

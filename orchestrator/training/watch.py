"""Who of a pack's workers does not come where the others wait.

In: the store in which the workers met. Out: words that name a worker by its world_rank. Each worker
counts the places where it waits for the others, and a thread tells the store its count, so that a
step costs nothing more. Whoever waited in vain reads the counts: who is behind did not come.
"""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

TELLS_PER_TIMEOUT = 20
MAX_TELL_EVERY_S = 10.0
STORE_TIMEOUT = timedelta(seconds=5)


class Watch:
    def __init__(
        self,
        store: Any,
        world_rank: int,
        world_size: int,
        timeout_s: float,
        stuck: Callable[[str], None] | None = None,
    ) -> None:
        """`stuck` is called, once and from a thread, when this worker has not moved for the timeout
        while someone is behind it."""
        self._store = store
        self._world_rank = world_rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._stuck = stuck
        self._count = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="watch", daemon=True)
        store.set_timeout(STORE_TIMEOUT)
        self._thread.start()

    def came(self) -> None:
        """To the next place where the workers wait for each other."""
        self._count += 1

    def missing(self) -> str:
        """Names those that are behind this worker; empty where nobody is."""
        names = [_name(rank) for rank in range(self._world_size)]
        try:
            told = self._store.multi_get(names) if self._store.check(names) else []
        except torch.distributed.DistError:
            return "the store, which is world_rank 0's, does not answer"
        others = [(rank, int(count)) for rank, count in enumerate(told) if rank != self._world_rank]
        behind = [str(rank) for rank, count in others if count < self._count]
        if not behind:
            return ""
        where = f"where world_rank {self._world_rank} waits"
        return f"world_rank {', '.join(behind)} did not come to {where}"

    def close(self) -> None:
        """Safe to call twice."""
        self._closed.set()
        self._thread.join(STORE_TIMEOUT.total_seconds())

    def _tell(self) -> None:
        every_s = min(MAX_TELL_EVERY_S, self._timeout_s / TELLS_PER_TIMEOUT)
        told, since = -1, time.monotonic()
        while not self._closed.is_set():
            count = self._count
            if count != told:
                told, since = count, time.monotonic()
            try:
                self._store.set(_name(self._world_rank), str(count))
            except torch.distributed.DistError:
                return  # the others' waits for this worker, and its own, end by themselves
            late = time.monotonic() - since > self._timeout_s
            if late and self._stuck is not None and (missing := self.missing()):
                self._stuck(missing)
                return
            self._closed.wait(every_s)


def _name(world_rank: int) -> str:
    return f"came/{world_rank}"

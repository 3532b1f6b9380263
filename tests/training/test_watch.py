"""A worker that waits in vain learns who did not come."""

import queue
import socket
import time
from datetime import timedelta
from typing import Any

import pytest
import torch

from orchestrator.training.watch import Watch

LONG_S = 60.0
SHORT_S = 0.5


@pytest.fixture
def store() -> Any:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return torch.distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=True, timeout=timedelta(seconds=LONG_S)
    )


def test_a_worker_that_does_not_move_is_told_who_is_behind_it(store: Any) -> None:
    told: queue.Queue[str] = queue.Queue()
    watches = [Watch(store.clone(), rank, 3, SHORT_S, told.put) for rank in range(3)]
    for rank in (0, 0, 1, 2, 2):
        watches[rank].came()
    words = {told.get(timeout=LONG_S) for _ in range(2)}
    assert words == {
        "world_rank 1 did not come to where world_rank 0 waits",
        "world_rank 1 did not come to where world_rank 2 waits",
    }
    for watch in watches:
        watch.close()
        watch.close()
    assert told.empty()  # who is behind waits for nobody


def test_nobody_is_missing_once_the_others_have_come_as_far(store: Any) -> None:
    watches = [Watch(store.clone(), rank, 2, SHORT_S) for rank in range(2)]
    watches[0].came()
    while not watches[0].missing():  # until both have told their counts
        time.sleep(0.01)
    watches[1].came()
    while watches[0].missing():
        time.sleep(0.01)
    assert watches[1].missing() == ""
    for watch in watches:
        watch.close()

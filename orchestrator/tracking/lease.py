"""One at a time at a registered model's aliases, on any MLflow store.

In: a client and a model's name. Out: a context in which this process alone may move aliases. MLflow
has no transactions across calls, and a lock file is seen by one machine only, so the lease is a tag
on the model, taken as in Fischer's algorithm (Lamport, "A Fast Mutual Exclusion Algorithm", 1987):
see it free, write, wait longer than a write takes, and go on if it is still one's own.

A holder that dies leaves its tag. Who waits takes it over once it has not changed for STALE_S by
the waiter's own clock, so that clocks of several machines need not agree.
"""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.errors import RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient

LEASE_TAG = "orchestrator.lease"
SETTLE_S = 0.5
POLL_S = 0.2
# A holder makes some ten calls of well under a second.
STALE_S = 30.0
WAIT_S = 180.0


@dataclass(frozen=True)
class Lease:
    api: "MlflowClient"
    model_name: str
    token: str

    def check(self) -> None:
        """Raises RegistryError if the lease was taken over: this process stood still for long."""
        if holder(self.api, self.model_name) != self.token:
            raise RegistryError(
                f"another process took over the aliases of {self.model_name} meanwhile: run again"
            )


@contextmanager
def lease(
    api: "MlflowClient", model_name: str, settle_s: float = SETTLE_S, stale_s: float = STALE_S
) -> Iterator[Lease]:
    """Raises RegistryError if others hold it for WAIT_S on end."""
    taken = Lease(api, model_name, secrets.token_hex(8))
    _take(taken, settle_s, stale_s)
    try:
        yield taken
    finally:
        if holder(api, model_name) == taken.token:
            api.delete_registered_model_tag(model_name, LEASE_TAG)


def holder(api: "MlflowClient", model_name: str) -> str:
    """The holder's token; empty where the lease is free."""
    return str(api.get_registered_model(model_name).tags.get(LEASE_TAG, ""))


def _take(wanted: Lease, settle_s: float, stale_s: float) -> None:
    began = seen_at = time.monotonic()
    seen = ""
    while time.monotonic() - began < WAIT_S:
        present = holder(wanted.api, wanted.model_name)
        if present != seen:
            seen, seen_at = present, time.monotonic()
        if present and time.monotonic() - seen_at < stale_s:
            time.sleep(POLL_S)
            continue
        wanted.api.set_registered_model_tag(wanted.model_name, LEASE_TAG, wanted.token)
        time.sleep(settle_s)
        if holder(wanted.api, wanted.model_name) == wanted.token:
            return
    raise RegistryError(
        f"other processes have been at the aliases of {wanted.model_name} for {WAIT_S:.0f} s: "
        "run again later"
    )

"""One at a time at a registered model's aliases, on any MLflow store.

In: a client and a model's name. Out: a context in which this process alone may move aliases. MLflow
has no transactions across calls, and a lock file is seen by one machine only, so the lease is a tag
on the model, taken as in Fischer's algorithm (Lamport, "A Fast Mutual Exclusion Algorithm", 1987):
see it free, write, wait longer than a write takes, and go on if it is still one's own.

A holder that dies leaves its tag. Who waits takes it over once it has not changed for stale_s by
the waiter's own clock, so that clocks of several machines need not agree.
"""

import re
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
RACE = re.compile(r"IntegrityError|StaleDataError|expected to update 1 row")


@dataclass(frozen=True)
class Timing:
    settle_s: float = 0.5
    """Longer than it takes another process from seeing the lease free to its write being there."""
    stale_s: float = 30.0
    """Longer than anybody holds the lease: some ten calls of well under a second."""
    poll_s: float = 0.2
    wait_s: float = 180.0


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
def lease(api: "MlflowClient", model_name: str, timing: Timing) -> Iterator[Lease]:
    """Raises RegistryError if others hold it for `wait_s` on end."""
    taken = Lease(api, model_name, secrets.token_hex(8))
    _take(taken, timing)
    try:
        yield taken
    finally:
        if holder(api, model_name) == taken.token:
            api.delete_registered_model_tag(model_name, LEASE_TAG)


def holder(api: "MlflowClient", model_name: str) -> str:
    """The holder's token; empty where the lease is free."""
    return str(api.get_registered_model(model_name).tags.get(LEASE_TAG, ""))


def _take(wanted: Lease, timing: Timing) -> None:
    began = seen_at = time.monotonic()
    seen = ""
    while time.monotonic() - began < timing.wait_s:
        present = holder(wanted.api, wanted.model_name)
        if present != seen:
            seen, seen_at = present, time.monotonic()
        if present and time.monotonic() - seen_at < timing.stale_s:
            time.sleep(timing.poll_s)
            continue
        if not _write(wanted):
            continue
        time.sleep(timing.settle_s)
        if holder(wanted.api, wanted.model_name) == wanted.token:
            return
    raise RegistryError(
        f"other processes have been at the aliases of {wanted.model_name} for "
        f"{timing.wait_s:.0f} s: run again later"
    )


def _write(wanted: Lease) -> bool:
    """False if another process wrote or removed the tag in the same moment."""
    from mlflow.exceptions import MlflowException

    try:
        wanted.api.set_registered_model_tag(wanted.model_name, LEASE_TAG, wanted.token)
    except MlflowException as error:
        # MLflow looks for the tag's row, then inserts or updates it (3.17, sqlalchemy_store.py).
        if not RACE.search(str(error)):
            raise
        return False
    return True

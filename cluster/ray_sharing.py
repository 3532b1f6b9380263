"""How the sweeps of one Ray cluster meet: a ledger of their claims in an actor that takes nothing.

In: a sweep's claims, about one a second. Out: its share as it was last heard. A Sharing
(orchestrator/sweep/sharing.py). The actor is detached, so it outlives whichever driver came first,
and ends with the last claim that is withdrawn, or once none has come for IDLE_S. It may be lost at
any time: the next claims make it anew. Who uses the cluster and makes no claims is not seen.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.ray_runtime import accelerator
from orchestrator.config import ResourcesConfig
from orchestrator.planning.capacity import Node
from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.shares import Claim, PoolShare, Sizes
from orchestrator.sweep.sharing import CLAIM_EVERY_S, Claimant, Ledger, Share

# The number counts the changes of what is sent to it: versions that differ share nothing.
NAME = "orchestrator-ledger-1"
CORES = "CPU cores"
# What a start of the actor's process takes on a busy node; from then on the sweep goes on without.
ANSWER_TIMEOUT_S = 10.0
# An answer takes a millisecond. A later one is heard with the next claim.
ANSWER_S = 0.1
# Nodes come and go in minutes; each look asks Ray for all of them.
CAPACITY_LASTS_S = 5.0
CLOSE_S = 1.0
# Drivers that are killed withdraw nothing, and their node is not taken from a cluster that shrinks
# while an actor is on it.
IDLE_S = 60.0
# Ray raises ValueError where the actor ends between two looks for its name.
LOST = (RayError, ValueError)


class RaySharing:
    every_s = CLAIM_EVERY_S

    def __init__(self, claimant: Claimant, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self._claimant = claimant
        self._timeout_s = timeout_s
        self._ledger: Any | None = None
        self._asked: Any | None = None
        self._share = Share()
        self._silent_at: float | None = None
        """When it is said that no answer comes; monotonic seconds."""
        with suppress(*LOST):
            self._ledger = _open_ledger()  # which takes a while; the sweep has no need of it yet

    def claim(self, packs: Mapping[str, Sizes]) -> Share:
        """Waits for the first answer, as packs that are begun without a share may have to end."""
        until = time.monotonic() + ANSWER_S
        if self._silent_at is None:
            until = self._silent_at = time.monotonic() + self._timeout_s
        while not self._is_answered(packs, until) and time.monotonic() < until:
            pass
        if time.monotonic() >= self._silent_at:
            self._share = Share(reason=_silent(self._timeout_s))
        return self._share

    def close(self) -> None:
        """Without an answer the claim expires."""
        with suppress(*LOST):
            if self._ledger is not None:
                ray.wait([self._ledger.withdraw.remote(self._claimant.sweep)], timeout=CLOSE_S)

    def _is_answered(self, packs: Mapping[str, Sizes], until: float) -> bool:
        try:
            if self._ledger is None:
                self._ledger = _open_ledger()
            if self._asked is None:
                self._asked = self._ledger.claim.remote(self._claimant.claim(packs))
            if not ray.wait([self._asked], timeout=max(0.0, until - time.monotonic()))[0]:
                return False
            limited = ray.get(self._asked)
        except LOST:  # it has just ended, with the last claim that there was, or its node is gone
            self._ledger = self._asked = None
            time.sleep(ANSWER_S)
            return False
        self._asked = None
        self._share = self._claimant.share(limited)
        self._silent_at = time.monotonic() + self._timeout_s
        return True


class _LedgerActor:
    def __init__(self) -> None:
        self._ledger = Ledger(self._capacity)
        self._seen: dict[str, int] = {}
        self._seen_at = -CAPACITY_LASTS_S
        self._heard_at = time.monotonic()
        threading.Thread(target=self._end_if_idle, daemon=True).start()

    def claim(self, claim: Claim) -> dict[str, PoolShare]:
        self._heard_at = time.monotonic()
        return self._ledger.claim(claim)

    def withdraw(self, sweep: str) -> None:
        self._ledger.withdraw(sweep)
        if self._ledger.is_empty:
            ray.actor.exit_actor()

    def _end_if_idle(self) -> None:
        while (left_s := self._heard_at + IDLE_S - time.monotonic()) > 0:
            time.sleep(left_s)
        os._exit(0)  # Ray's own exit_actor is for the actor's methods

    def _capacity(self) -> Mapping[str, int]:
        if time.monotonic() - self._seen_at >= CAPACITY_LASTS_S:
            self._seen_at = time.monotonic()
            self._seen = _all_units()
        return self._seen


def _all_units() -> dict[str, int]:
    """Of each pool that the cluster has now, whoever uses them."""
    units: Counter[str] = Counter()
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            units[CORES] += int(has.get("CPU", 0))
            units[_gpus(accelerator(has))] += int(has.get("GPU", 0))
    return +units


def pools(
    resources: ResourcesConfig, device: str, kinds: Sequence[WorkerKind], nodes: Sequence[Node]
) -> dict[str, tuple[str, int]]:
    """By kind of worker, as a Claimant has it: on GPUs one of its kind, else cores."""
    if device != "cuda":
        return {"": (CORES, resources.cpus_per_worker)}
    if kinds:
        return {kind.name: (_gpus(kind.name), 1) for kind in kinds}
    names = {node.gpu_kind for node in nodes if node.num_gpus >= 1}
    return {"": (_gpus(*names), 1)}


def _silent(timeout_s: float) -> str:
    return (
        f"the cluster's actor {NAME} has not answered for {timeout_s:g} s: workers are not shared, "
        "and packs wait in Ray's queue instead"
    )


def _gpus(kind: str) -> str:
    return kind or "GPUs"


def _open_ledger() -> Any:
    """It is on this driver's node as long as that is there: on another it would keep the autoscaler
    from taking an idle one."""
    here = ray.get_runtime_context().get_node_id()
    options = {
        "name": NAME,
        "namespace": "orchestrator",
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=True),
    }
    return ray.remote(**options)(_LedgerActor).remote()

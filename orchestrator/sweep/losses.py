"""What becomes of the trials of a pack that is lost, and what a resume knows of it.

In: the pack's plan, its trials and how it was lost. Out: a Remedy with its reason. Pure.

A worker that is gone is no trial's fault: its trials are tried again, so many times. A pack that
ran out of memory is planned smaller. Where a worker of several trials raised, it is not known whose
fault that was: they are tried again in packs of half as many slots, down to one trial alone, and
only one that raises there fails. So one error among K trials costs log2(K) starts, and it ends: the
slots become fewer each time. A pack that raised while it loaded, with no error of the project's, is
taken for one that is gone.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.errors import LoadingFailed
from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.options import Premises
from orchestrator.planning.packs import PackPlan, learn_from
from orchestrator.planning.waiting import PackKey, pack_key
from orchestrator.records import PackLost, TrialSpec
from orchestrator.sweep.lessons import LEARNT, lesson
from orchestrator.sweep.running import RunningPack
from orchestrator.wording import counted, ranges

SPLIT = "split_pack"


@dataclass(frozen=True)
class Remedy:
    premises: Premises
    """That plans go by from now on."""
    retried: bool
    counted: bool = False
    """Whether trying a trial again counts towards max_restarts."""
    max_slots: int | None = None
    """Of the packs that its trials wait for from now on."""
    action: str = ""
    """Of the decision that a resume goes by; empty where there is none."""
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def remedy(
    plan: PackPlan,
    trials: Collection[int],
    at_work: int,
    lost: PackLost,
    premises: Premises,
    kinds: Sequence[WorkerKind] = (),
) -> Remedy:
    """`at_work` of the slots, those of trials that are over but may have been trained when the
    pack was lost among them."""
    if lost.reason == "worker_lost":
        return Remedy(premises, retried=True, counted=True)
    if lost.reason == "out_of_memory":
        if (learned := learn_from(plan, premises, kinds)) is None:
            return Remedy(premises, retried=False)
        known, reason = learned
        facts = lesson(premises, known)
        return Remedy(known, retried=True, action=LEARNT, reason=reason, facts=facts)
    if lost.may_pass and not trials and not at_work:  # while it loaded, before it had any
        return Remedy(premises, retried=True, counted=True)
    if lost.reason == "data_error" or not trials or at_work < 2:  # their data are the same
        return Remedy(premises, retried=False)
    most = math.ceil(len(trials) / 2)
    packs = f"at most {most} in a pack" if most > 1 else "each alone"
    return Remedy(
        premises,
        retried=True,
        max_slots=most,
        action=SPLIT,
        reason=f"it raised with {counted(at_work, 'trial')} at work, and whose fault that was is "
        f"not known: tried again, {packs}, so that no other fails for it",
        facts={"trials": sorted(trials), "max_slots": most},
    )


class Loads:
    """Of each key none of whose packs is ready: before which number packs began that have to fail,
    too, until a failed load says something of the base. One that was begun after that only tries
    again; so workers that are lost together, or one machine at fault, count once, if at all."""

    def __init__(self) -> None:
        self._since: dict[PackKey, int] = {}
        self._loaded: set[PackKey] = set()
        self.held: dict[PackKey, str] = {}
        """Of bases that cannot be loaded now: why. Their trials wait for the sweep's next start."""

    def ready(self, key: PackKey) -> None:
        self._since.pop(key, None)
        self._loaded.add(key)

    def hold(
        self, key: PackKey, lost: PackLost, message: str, half_trained: Iterable[PackKey]
    ) -> bool:
        """After max_restarts: whether its trials wait, rather than fail. What is elsewhere, or was
        loaded before, is not at fault."""
        if lost.unreachable or key in self._loaded or key in half_trained:
            self.held[key] = message
        return key in self.held

    def may_go_on(self, key: PackKey, next_pack: int, packs: Mapping[int, RunningPack]) -> bool:
        """One failed to load: whether others of its kind, which are there, may train its trials."""
        alike = {n: pack for n, pack in packs.items() if pack.plan.key.unlimited == key}
        if any(pack.ready for pack in alike.values()):
            return True
        since = self._since.setdefault(key, next_pack)
        if any(number < since for number in alike):
            return True
        del self._since[key]  # all have failed; it takes as many again to count once more
        return False


def check_none_held(held: Mapping[PackKey, str], unfinished: Iterable[TrialSpec]) -> None:
    """Raises LoadingFailed for trials that wait for bases which cannot be loaded now."""
    waits: dict[PackKey, list[int]] = {}
    for trial in unfinished:
        waits.setdefault(pack_key(trial.config), []).append(trial.number)
    lines = [
        f"no worker could load the {key.title} base: {why}; trials {ranges(sorted(waits[key]))} "
        "wait with all that they have: see to the cause, then resume the sweep"
        for key, why in held.items()
        if key in waits
    ]
    if lines:
        raise LoadingFailed("\n".join(lines))


def slot_limits(decisions: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """By trial, the most slots of the packs that it may be in."""
    limits: dict[int, int] = {}
    for decision in decisions:
        if decision["action"] == SPLIT:
            facts = decision["facts"]
            limits |= dict.fromkeys(facts["trials"], facts["max_slots"])
    return limits

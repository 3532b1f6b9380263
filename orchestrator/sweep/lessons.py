"""What a sweep has learnt of its workers' memory, for its decisions and for a resume.

In: Premises before and after a pack ran out of memory. Out: facts for a line of decisions.jsonl,
and Premises that heed such lines. A part of the memory, not bytes: a resume may have other workers.
Of packs with one key on one kind of workers: another pack may be as estimated. Where the base has
no estimate, of all.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from orchestrator.planning.options import Premises

LEARNT = "plan_less_memory"


def lesson(before: Premises, after: Premises) -> dict[str, Any]:
    """What takes less from now on, and what runs on larger workers alone."""
    return {
        "less": sorted(after.less - before.less),
        "max_slots_unknown": after.max_slots_unknown,
        "ran_out": sorted(after.ran_out - before.ran_out),
    }


def heeding(premises: Premises, decisions: Iterable[Mapping[str, Any]]) -> Premises:
    """What the planner goes by after all that was learnt."""
    for decision in decisions:
        if decision["action"] == LEARNT and (facts := decision.get("facts")):
            premises = replace(
                premises,
                less=premises.less | set(map(tuple, facts.get("less", ()))),
                max_slots_unknown=min(premises.max_slots_unknown, facts["max_slots_unknown"]),
                ran_out=premises.ran_out | {(key, size) for key, size in facts.get("ran_out", ())},
            )
    return premises

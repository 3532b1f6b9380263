"""What packs that ran out of memory teach the planner, and what a resume makes of it."""

import pytest

from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.memory import GIB
from orchestrator.planning.packs import learn_from, preview_packs
from orchestrator.planning.shape import UnknownShape
from orchestrator.records import (
    TrialSpec,
)
from orchestrator.sweep.lessons import heeding, lesson
from tests.sweeps import LLAMA_8B, premises, sweep_config


@pytest.mark.parametrize("kind", ["", "H200"])
def test_less_memory_is_remembered_as_a_part_of_it(kind: str) -> None:
    config = sweep_config()
    given = premises(config, "cuda", LLAMA_8B, 141 * GIB)
    kinds = (WorkerKind(kind, 1, 141 * GIB),) if kind else ()
    trials = [TrialSpec(n, {}, config.trial) for n in range(8)]
    ((lost, _),) = preview_packs(trials, 1, given, kinds=kinds)
    learned = learn_from(lost, given)
    assert learned is not None
    facts = lesson(given, learned[0])
    decisions = [{"action": "plan_less_memory", "facts": facts}, {"action": "start"}]
    ((again, _),) = preview_packs(trials, 1, heeding(given, decisions), kinds=kinds)
    ((as_then, _),) = preview_packs(trials, 1, learned[0], kinds=kinds)
    assert again.fit.budget_bytes == pytest.approx(as_then.fit.budget_bytes, rel=1e-6)
    assert again.fit.budget_bytes < lost.fit.budget_bytes
    ((smaller, _),) = preview_packs(
        trials, 1, heeding(premises(config, "cuda", LLAMA_8B, 70 * GIB), decisions)
    )
    assert smaller.fit.budget_bytes < 0.9 * 70 * GIB, "and of workers with other memory too"


@pytest.mark.parametrize("kind", ["", "H200"])
def test_packs_on_a_base_without_an_estimate_give_up_slots(kind: str) -> None:
    config = sweep_config()
    given = premises(config, "cuda", UnknownShape("a mixture of experts"), 141 * GIB)
    kinds = (WorkerKind(kind, 1, 141 * GIB),) if kind else ()
    trials = [TrialSpec(n, {}, config.trial) for n in range(8)]
    slots = []
    for _ in range(8):
        ((lost, _),) = preview_packs(trials, 1, given, kinds=kinds)
        slots.append(lost.num_slots)
        if (learned := learn_from(lost, given)) is None:
            break
        given, _ = learned
    assert slots == sorted(set(slots), reverse=True)
    assert slots[-1] == 1

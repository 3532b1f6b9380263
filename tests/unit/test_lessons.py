"""What packs that ran out of memory teach the planner, and what a resume makes of it."""

from typing import Any

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
    fewer = premises(config, "cuda", LLAMA_8B, 70 * GIB)
    kinds = (WorkerKind(kind, 1, 70 * GIB),) if kind else ()
    ((smaller, _),) = preview_packs(trials, 1, heeding(fewer, decisions), kinds=kinds)
    assert smaller.fit.budget_bytes < 0.9 * 70 * GIB, "and of workers with other memory too"


def test_other_packs_and_other_workers_are_planned_as_before() -> None:
    small: dict[str, Any] = {"trial__batch_size": 1, "data__block_length": 512}
    given = premises(sweep_config(**small), "cuda", LLAMA_8B, 80 * GIB)
    four, sixteen = (
        [TrialSpec(n, {}, sweep_config(**small, trial__quant__bit_width=b).trial) for n in range(8)]
        for b in (4, 16)
    )
    kinds = (WorkerKind("H100", 1, 80 * GIB), WorkerKind("L4", 4, 22 * GIB, speed=0.5))
    (lost, _), *others = preview_packs(four, 5, given, kinds=kinds)
    learned = learn_from(lost, given, kinds)
    assert learned is not None
    (again, _), *others_again = preview_packs(four, 5, learned[0], kinds=kinds)
    assert again.fit.budget_bytes < lost.fit.budget_bytes
    assert [plan.fit for plan, _ in others_again] == [plan.fit for plan, _ in others]
    assert {plan.kind.name for plan, _ in others_again} == {"L4"}
    assert preview_packs(sixteen, 1, learned[0], kinds=kinds[:1]) == preview_packs(
        sixteen, 1, given, kinds=kinds[:1]
    )


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

"""When a sampler is asked, and what does not wait for it."""

from collections.abc import Sequence
from pathlib import Path

from orchestrator.records import Directive, Event, Progress, TrialDone
from orchestrator.sweep.executor import InProcessExecutor
from orchestrator.sweep.simulated import SimulatedWorker
from tests.sweeps import make_controller, make_store, sweep_config


class Noting(InProcessExecutor):
    def __init__(self, log: list[str]) -> None:
        super().__init__(SimulatedWorker)
        self._log = log

    def advance(self, pack: int, directives: Sequence[Directive]) -> None:
        self._log.append("goes on")
        super().advance(pack, directives)

    def poll(self, timeout_s: float) -> list[tuple[int, list[Event]]]:
        answers = super().poll(timeout_s)
        kinds = {type(event) for _, events in answers for event in events}
        if Progress in kinds and TrialDone not in kinds:
            self._log.append("answers")
        return answers


def test_a_full_pack_does_not_wait_until_a_sampler_has_been_asked(tmp_path: Path) -> None:
    config = sweep_config(search__space={}, resources__slots_per_pack=1)
    log: list[str] = []
    store = make_store(tmp_path / "run", config)
    assert make_controller(store, Noting(log), 1, asked=lambda: log.append("is asked")).run()
    after = {log[place + 1] for place, what in enumerate(log) if what == "answers"}
    assert after == {"goes on"}
    assert "is asked" in log

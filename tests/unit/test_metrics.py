"""What a sweep's notices become; and that dashboard and documents use the metrics' own names."""

import json
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from cluster.metrics import (
    DECISIONS,
    MEMORY_PEAK,
    MEMORY_PREDICTED,
    METRICS,
    SLOTS,
    SLOTS_USED,
    TOKENS,
    TOKENS_PER_S,
    TRIALS,
    Metric,
    Sample,
    SweepMetrics,
)
from orchestrator.records import Notice, PackStanding, Progress, Standing
from orchestrator.sweep.executor import InProcessExecutor
from orchestrator.sweep.simulated import SimulatedWorker
from tests.sweeps import make_controller, make_store, sweep_config

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "k8s" / "base" / "monitoring" / "sweep-dashboard.json"


def progress(trial: int, attempt: int, tokens: int, rate: float = 10.0) -> Progress:
    return Progress(trial, attempt, 0.0, 1, tokens, 1.0, 1e-3, 1.0, rate)


def standing(*packs: PackStanding, waiting: int = 0) -> Standing:
    return Standing(waiting, 0, 0, 0, packs)


def value(samples: Iterable[Sample], metric: Metric, *labels: str) -> float:
    """The last one."""
    return [s.value for s in samples if s.metric == metric and s.labels == labels][-1]


def total(samples: Iterable[Sample], metric: Metric, *labels: str) -> float:
    return sum(s.value for s in samples if s.metric == metric and s.labels == labels)


def test_a_whole_sweep_ends_with_the_numbers_of_its_run_folder(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    metrics, samples = SweepMetrics(), list[Sample]()

    def watch(notice: Notice) -> None:
        samples.extend(metrics.take(notice))

    executor = InProcessExecutor(partial(SimulatedWorker, faults={1: "nan"}))
    make_controller(store, executor, observe=watch).run()
    states = ("waiting", "training", "finished", "failed")
    assert [value(samples, TRIALS, state) for state in states] == [0, 0, 3, 1]
    assert max(s.value for s in samples if s.metric == SLOTS_USED) >= 2
    assert value(samples, SLOTS) == value(samples, SLOTS_USED) == value(samples, TOKENS_PER_S) == 0
    trained = sum(max(p["tokens"] for p in store.points(t.number)) for t in store.trials)
    assert total(samples, TOKENS) == trained
    actions = [decision["action"] for decision in store.decisions]
    for action in set(actions):
        assert total(samples, DECISIONS, action) == actions.count(action)


def test_every_state_is_counted_at_every_moment(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    standings: list[Standing] = []

    def watch(notice: Notice) -> None:
        if isinstance(notice, Standing):
            standings.append(notice)

    make_controller(store, InProcessExecutor(SimulatedWorker), observe=watch).run()
    for each in standings:
        training = sum(len(pack.trials) for pack in each.packs)
        assert each.num_waiting + training + each.num_finished + each.num_failed == 4
        assert all(len(pack.trials) <= pack.num_slots for pack in each.packs)


def test_rates_of_trials_that_train_are_summed() -> None:
    metrics = SweepMetrics()
    metrics.take(standing(PackStanding(0, 2, (0, 1), 0)))
    metrics.take(progress(0, 1, 100, 10.0))
    assert value(metrics.take(progress(1, 1, 100, 5.0)), TOKENS_PER_S) == 15.0
    assert value(metrics.take(standing(PackStanding(0, 2, (1,), 0))), TOKENS_PER_S) == 5.0


def test_tokens_are_counted_once_and_an_attempt_goes_on_from_its_checkpoint() -> None:
    metrics = SweepMetrics()
    notices = [progress(0, 1, 100), progress(0, 1, 250), progress(0, 2, 230), progress(0, 2, 330)]
    samples = [sample for notice in notices for sample in metrics.take(notice)]
    assert total(samples, TOKENS) == 250 + 100


def test_memory_is_told_by_pack_and_a_pack_that_is_gone_needs_none() -> None:
    metrics = SweepMetrics()
    there = metrics.take(standing(PackStanding(3, 2, (0,), 20_000)))
    assert value(there, MEMORY_PREDICTED, "3") == 20_000
    assert value(metrics.take(standing()), MEMORY_PREDICTED, "3") == 0


def test_the_peak_of_a_pack_is_the_most_that_its_trials_measured(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run", sweep_config())
    metrics, samples = SweepMetrics(), list[Sample]()

    def watch(notice: Notice) -> None:
        samples.extend(metrics.take(notice))

    make_controller(store, InProcessExecutor(SimulatedWorker), observe=watch).run()
    peaks = {s.labels: s.value for s in samples if s.metric == MEMORY_PEAK}
    assert set(peaks.values()) == {10**9}


def names_in(text: str) -> set[str]:
    return set(re.findall(r"ray_orchestrator_\w+", text))


def test_the_dashboard_reads_exactly_the_metrics_that_there_are() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    queries += [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    assert names_in(" ".join(queries)) == {metric.exported_name for metric in METRICS}


def test_the_dashboard_uses_labels_that_the_metrics_have() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    labels = {metric.exported_name: {"sweep", *metric.labels} for metric in METRICS}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            (name, *_) = names_in(target["expr"]) or [""]
            used = set(re.findall(r"{{(\w+)}}", target.get("legendFormat", "")))
            used |= {
                x for by in re.findall(r"by \(([\w, ]+)\)", target["expr"]) for x in by.split(", ")
            }
            if name:
                assert used <= labels[name], target


def test_the_documents_list_the_metrics() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert names_in(text) == {metric.exported_name for metric in METRICS}
    for metric in METRICS:
        assert metric.description.rstrip(".") in text

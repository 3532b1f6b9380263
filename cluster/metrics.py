"""What a sweep tells Prometheus, through Ray's metrics API.

In: the controller's notices. Out: samples, and these set on Ray's instruments. SweepMetrics is the
pure half. Ray's agent on the driver's node exports them, each name with `ray_` before it; the
Grafana dashboard (k8s/base/monitoring) and docs/metrics.md use exactly the names in METRICS.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.records import Decision, Notice, Progress, Standing, TrialDone


@dataclass(frozen=True)
class Metric:
    name: str
    kind: Literal["gauge", "counter"]
    description: str
    labels: tuple[str, ...] = ()

    @property
    def exported_name(self) -> str:
        return f"ray_{self.name}"


TRIALS = Metric(
    "orchestrator_trials",
    "gauge",
    "Trials of the sweep by state: waiting, training, finished, pruned, failed.",
    ("state",),
)
SLOTS = Metric("orchestrator_slots", "gauge", "Slots of all packs.")
SLOTS_USED = Metric("orchestrator_slots_used", "gauge", "Slots that hold a trial.")
TOKENS = Metric(
    "orchestrator_tokens_total", "counter", "Tokens trained by all trials, padding excluded."
)
TOKENS_PER_S = Metric(
    "orchestrator_tokens_per_s", "gauge", "Tokens a second of the trials that train, summed."
)
MEMORY_PREDICTED = Metric(
    "orchestrator_memory_predicted_bytes",
    "gauge",
    "Device memory that the planner expects a worker of the pack to need at its peak.",
    ("pack",),
)
MEMORY_PEAK = Metric(
    "orchestrator_memory_peak_bytes",
    "gauge",
    "Most device memory that a worker of the pack has held; on a CPU, that of its process.",
    ("pack",),
)
DECISIONS = Metric(
    "orchestrator_decisions_total", "counter", "Decisions of the controller by action.", ("action",)
)
METRICS = (
    TRIALS,
    SLOTS,
    SLOTS_USED,
    TOKENS,
    TOKENS_PER_S,
    MEMORY_PREDICTED,
    MEMORY_PEAK,
    DECISIONS,
)


@dataclass(frozen=True)
class Sample:
    """A gauge's new value, or what a counter grows by."""

    metric: Metric
    value: float
    labels: tuple[str, ...] = ()
    """Values, in the order of the metric's labels."""


class SweepMetrics:
    """Notices in, samples out; remembers what the next notice must be compared with."""

    def __init__(self) -> None:
        self._pack_of: dict[int, int] = {}
        self._tokens: Counter[tuple[int, int]] = Counter()
        self._rates: dict[int, float] = {}
        self._peaks: Counter[int] = Counter()
        self._predicted: set[int] = set()

    def take(self, notice: Notice) -> list[Sample]:
        match notice:
            case Standing():
                return self._stand(notice)
            case Decision():
                return [Sample(DECISIONS, 1, (notice.action,))]
            case Progress():
                self._rates[notice.trial] = notice.tokens_per_s
                return [self._rate(), *self._grown(notice)]
            case TrialDone():
                return [*self._grown(notice), *self._peak(notice)]
            case _:
                return []

    def _stand(self, standing: Standing) -> list[Sample]:
        packs = standing.packs
        self._pack_of = {trial: pack.pack for pack in packs for trial in pack.trials}
        self._rates = {t: rate for t, rate in self._rates.items() if t in self._pack_of}
        training = len(self._pack_of)
        # A pack that is gone keeps its last value in Ray, so it is set to zero once.
        predicted = {pack.pack: pack.expected_memory_bytes for pack in packs}
        gone = self._predicted - predicted.keys()
        self._predicted = set(predicted)
        return [
            Sample(TRIALS, standing.num_waiting, ("waiting",)),
            Sample(TRIALS, training, ("training",)),
            Sample(TRIALS, standing.num_finished, ("finished",)),
            Sample(TRIALS, standing.num_pruned, ("pruned",)),
            Sample(TRIALS, standing.num_failed, ("failed",)),
            Sample(SLOTS, sum(pack.num_slots for pack in packs)),
            Sample(SLOTS_USED, training),
            self._rate(),
            *(Sample(MEMORY_PREDICTED, 0, (str(pack),)) for pack in sorted(gone)),
            *(Sample(MEMORY_PREDICTED, size, (str(pack),)) for pack, size in predicted.items()),
        ]

    def _rate(self) -> Sample:
        return Sample(TOKENS_PER_S, sum(self._rates.values()))

    def _grown(self, event: Progress | TrialDone) -> list[Sample]:
        """An attempt that goes on from a checkpoint counts on from there: its first report says how
        far it is, not how much of it is new."""
        attempt = (event.trial, event.attempt)
        before = self._tokens.get(attempt)
        self._tokens[attempt] = event.tokens
        if before is None and event.attempt > 1:
            return []
        return [Sample(TOKENS, event.tokens - (before or 0))]

    def _peak(self, event: TrialDone) -> list[Sample]:
        pack = self._pack_of.get(event.trial)
        if pack is None:
            return []
        self._peaks[pack] = max(self._peaks[pack], event.peak_memory_bytes)
        return [Sample(MEMORY_PEAK, self._peaks[pack], (str(pack),))]


def ray_metrics(sweep: str) -> Callable[[Notice], None]:
    """What to call with each notice of the sweep, from a Ray driver."""
    from ray.util.metrics import Counter as RayCounter
    from ray.util.metrics import Gauge as RayGauge

    metrics = SweepMetrics()
    instruments: dict[Metric, Any] = {}
    for metric in METRICS:
        make = RayGauge if metric.kind == "gauge" else RayCounter
        labels = ("sweep", *metric.labels)
        instruments[metric] = make(metric.name, metric.description, labels)

    def watch(notice: Notice) -> None:
        for sample in metrics.take(notice):
            labels = dict(zip(sample.metric.labels, sample.labels, strict=True)) | {"sweep": sweep}
            instrument = instruments[sample.metric]
            if sample.metric.kind == "gauge":
                instrument.set(sample.value, labels)
            elif sample.value > 0:  # Ray refuses to count nothing
                instrument.inc(sample.value, labels)

    return watch

"""`bit_width: auto` becomes a map of bits before a trial is planned.

In: a RunStore, the base, the data. Out: TrialSpecs whose quant names every layer's bits. What was
measured is kept in the cache; what was chosen in the run folder's bits.json, and stays chosen, also
where another machine measures anew. Measuring needs a worker's device and is done before any pack
holds it.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.config import QuantConfig, SweepConfig, TrialConfig
from orchestrator.data.prepare import PreparedData
from orchestrator.errors import ConfigError
from orchestrator.files import cache_dir, read_json, record_digest, write_json
from orchestrator.loading import trial_with
from orchestrator.planning.allocation import Allocation, LayerLoss, allocate, check_budget, resolved
from orchestrator.planning.bits import HQQ_BITS, bits_of
from orchestrator.planning.compatibility import problems
from orchestrator.planning.options import DTYPE_BYTES
from orchestrator.planning.shape import BaseShape, UnknownShape
from orchestrator.records import BaseModel, Device, TrialSpec
from orchestrator.search.space import grid_points

METHOD_VERSION = 1  # raise when the measurement changes
# What 4 and 8 bits are made with; the measurement depends on these.
MADE_WITH = ("quant_type", "double_quant", "block_size", "compute_dtype")

RunOnWorker = Callable[[Callable[[], Any]], Any]
"""Calls a picklable function where a worker would train."""


def run_here(job: Callable[[], Any]) -> Any:
    return job()


class BitChooser:
    """Gives trials of bit_width auto their map. The same measurements give the same map."""

    def __init__(
        self,
        base: BaseModel,
        shape: BaseShape | UnknownShape,
        data: PreparedData,
        compute_dtype: str,
        device: Device,
    ) -> None:
        self._base = base
        self._shape = shape
        self._data = data
        self._compute_dtype = compute_dtype
        self._device = device
        self._measured: dict[str, list[LayerLoss]] = {}
        self.chosen: dict[str, dict[str, Any]] = {}
        """What was asked for and chosen, as bits.json has it."""

    def measure(
        self, config: SweepConfig, run_on_worker: RunOnWorker, say: Callable[[str], None]
    ) -> None:
        """Everything that the sweep's trials may need.

        Raises:
            ConfigError: no trial has a budget that a map fits.
        """
        if not isinstance(self._shape, UnknownShape):
            check_budgets(config, self._shape, self._compute_dtype)
        found, refused = [], []
        for quant in auto_settings(config):
            path = self._cached(quant)
            if not path.exists():
                say("bits: measuring what each layer's bits cost the base")
                from orchestrator.training.sensitivity import measure_sensitivity

                concrete = self._concrete(quant)
                place = self._data.place
                job = partial(measure_sensitivity, self._base, concrete, self._device, place)
                layers = run_on_worker(job)
                write_json(path, {"layers": [layer.to_json() for layer in layers]})
            # A dry run does not read the data, whose digest the measurement is kept under.
            write_json(_last(config, self._concrete(quant)), read_json(path))
            try:
                found.append(f"bits: {quant.title}: {self.allocation(quant).reason}")
            except ConfigError as error:
                refused.append(str(error))
        if refused and not found and _only_auto(config):
            raise ConfigError("\n".join(dict.fromkeys(refused)))
        for line in [*found, *(f"bits: not trained: {why}" for why in refused)]:
            say(line)

    def settle(self, trial: TrialSpec) -> TrialSpec:
        """With a map; one whose budget no map fits is refused."""
        quant = trial.config.quant
        if quant.bit_width != "auto" or self._is_settled(quant):
            return trial
        try:
            allocation = self.allocation(quant)
        except ConfigError as error:
            return replace(trial, refused=str(error))
        self.chosen[_key(quant)] = {
            "asked": quant.model_dump(mode="json"),
            "reason": allocation.reason,
            **allocation.to_json(),
        }
        content = trial.config.model_dump() | {"quant": resolved(quant, allocation).model_dump()}
        return replace(trial, config=TrialConfig.model_validate(content))

    def allocation(self, quant: QuantConfig) -> Allocation:
        if known := self.chosen.get(_key(quant)):
            return Allocation.from_json(known)
        return _allocation(self._concrete(quant), self._layers(quant), self._shape)

    def _layers(self, quant: QuantConfig) -> list[LayerLoss]:
        path = self._cached(quant)
        if path.name not in self._measured:
            records = read_json(path)["layers"]
            self._measured[path.name] = [LayerLoss.from_json(record) for record in records]
        return self._measured[path.name]

    def _is_settled(self, quant: QuantConfig) -> bool:
        return all(bits_of(quant, layer.name) is not None for layer in self._layers(quant))

    def _concrete(self, quant: QuantConfig) -> QuantConfig:
        return _concrete(quant, self._compute_dtype)

    def _cached(self, quant: QuantConfig) -> Path:
        concrete = self._concrete(quant)
        key = {
            "version": METHOD_VERSION,
            "base": self._base.digest,
            "data": self._data.train.digest,
            **{name: getattr(concrete, name) for name in MADE_WITH},
        }
        return cache_dir() / "sensitivity" / f"{record_digest(key)[:32]}.json"


def _only_auto(config: SweepConfig) -> bool:
    return set(_widths(config)) == {"auto"}


def _widths(config: SweepConfig) -> tuple[Any, ...]:
    return config.search.values_of("quant.bit_width", config.trial.quant.bit_width)


def _key(quant: QuantConfig) -> str:
    return record_digest(quant.model_dump(mode="json"))[:12]


def check_hqq(config: SweepConfig) -> None:
    """Raises ConfigError if trials of 2 or 3 bits are asked for and HQQ is not installed here."""
    written = config.trial.quant.bit_width_pattern
    patterns = config.search.values_of("quant.bit_width_pattern", written)
    found = {*_widths(config), *itertools.chain(*(pattern.values() for pattern in patterns))}
    if found & set(HQQ_BITS) and importlib.util.find_spec("hqq") is None:
        raise ConfigError(
            "quant.bit_width: 2 and 3 need HQQ, which is not installed: "
            "DISABLE_CUDA=1 pip install -e '.[hqq]' in the project's folder, or set 4 bits or more"
        )


def last_allocation(
    config: SweepConfig, quant: QuantConfig, shape: BaseShape | UnknownShape, compute_dtype: str
) -> Allocation | None:
    """By what was measured last for this base and data, if anything was; reads neither.

    Raises:
        ConfigError: no map fits the budget.
    """
    concrete = _concrete(quant, compute_dtype)
    path = _last(config, concrete)
    if not path.exists():
        return None
    layers = [LayerLoss.from_json(record) for record in read_json(path)["layers"]]
    return _allocation(concrete, layers, shape)


def _last(config: SweepConfig, concrete: QuantConfig) -> Path:
    key = {
        "version": METHOD_VERSION,
        "base": config.base_model.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json"),
        **{name: getattr(concrete, name) for name in MADE_WITH},
    }
    return cache_dir() / "sensitivity" / "last" / f"{record_digest(key)[:32]}.json"


def _concrete(quant: QuantConfig, compute_dtype: str) -> QuantConfig:
    if quant.compute_dtype != "auto":
        return quant
    return QuantConfig.model_validate(quant.model_dump() | {"compute_dtype": compute_dtype})


def _allocation(
    quant: QuantConfig, layers: Sequence[LayerLoss], shape: BaseShape | UnknownShape
) -> Allocation:
    if quant.budget_gib is not None and isinstance(shape, UnknownShape):
        raise ConfigError(
            f"quant.budget_gib needs a base whose shape is known, but {shape.reason}: set "
            "quant.average_bits instead"
        )
    dtype_bytes = DTYPE_BYTES[quant.compute_dtype]
    plain = 0 if isinstance(shape, UnknownShape) else shape.num_plain_params * dtype_bytes
    return allocate(quant, layers, plain, dtype_bytes)


def check_budgets(config: SweepConfig, shape: BaseShape, compute_dtype: str) -> None:
    """Raises ConfigError where no trial has a budget that a map fits, before anything is
    measured."""
    refused, settings = [], list(auto_settings(config))
    for quant in settings:
        concrete = _concrete(quant, compute_dtype)
        try:
            check_budget(concrete, shape, DTYPE_BYTES[concrete.compute_dtype])
        except ConfigError as error:
            refused.append(str(error))
    if settings and len(refused) == len(settings) and _only_auto(config):
        raise ConfigError("\n".join(dict.fromkeys(refused)))


def auto_settings(config: SweepConfig) -> Iterator[QuantConfig]:
    """All of bit_width auto that the sweep's trials may have; of a range, those at its ends."""
    search = config.search
    if "auto" not in _widths(config):
        return
    # With the fields that their conditions name, and those of these.
    needed = {field for field in search.space if field.startswith("quant.")}
    while more := {name for f in needed for name in search.all_conditions.get(f, {})} - needed:
        needed |= more
    lists: dict[str, Any] = {
        field: values if isinstance(values, tuple) else (values.low, values.high)
        for field, values in search.space.items()
        if field in needed
    } | {"quant.bit_width": ("auto",)}
    found: set[QuantConfig] = set()
    for point in grid_points(search.model_copy(update={"space": lists, "num_trials": None})):
        try:
            trial = trial_with(config.trial, point | {"quant.bit_width": "auto"})
        except ConfigError:  # such a trial is none
            continue
        if trial.quant not in found and not problems(trial):
            found.add(trial.quant)
            yield trial.quant

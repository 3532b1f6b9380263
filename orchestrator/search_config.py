"""The search section of the schema: space, conditions, sampler, pruner, objectives, constraints.

In: a mapping. Out: a frozen SearchConfig, which knows nothing of the trial that it searches around:
what needs both is checked in loading.py and search/. Imports pydantic only.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from orchestrator.strict import NonNegativeInt, PositiveInt, Strict, Switch

Scalar = bool | int | float | str
Choice = Scalar | tuple[str, ...] | dict[str, int | float]
"""One listed value of a searched field; a tuple of names for adapter.target_modules, a mapping for
its patterns."""

BUDGETS = ("quant.average_bits", "quant.budget_gib")
"""Fields that only a trial of quant.bit_width auto reads."""

SamplerKind = Literal["grid", "random", "tpe", "gp", "nsga2"]
PrunerKind = Literal["none", "asha", "hyperband", "median"]
ObjectiveName = Literal[
    "eval_loss",
    "task_score",
    "peak_memory_bytes",
    "model_memory_bytes",
    "adapter_bytes",
    "tokens_per_s",
]


def encoded(choice: Choice) -> Scalar:
    """As one scalar, the same for equal values: a list of names or a mapping becomes text, in which
    a whole number is written as such, for a field of floats makes 16.0 of 16."""
    if isinstance(choice, dict):
        numbers = {name: value if value % 1 else int(value) for name, value in choice.items()}
        return json.dumps(numbers, sort_keys=True)
    return json.dumps(choice) if isinstance(choice, list | tuple) else choice


class RangeConfig(Strict):
    low: float
    high: float
    log: Switch = False
    """Sample on a logarithmic scale."""
    integer: Switch = False
    """Sample whole numbers only."""

    @model_validator(mode="after")
    def _ordered(self) -> "RangeConfig":
        if not self.low < self.high:
            raise ValueError(f"low < high must hold, but got (low={self.low}, high={self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range needs low > 0, but got low={self.low}")
        if self.integer and (self.low % 1 or self.high % 1):
            raise ValueError(
                f"an integer range needs whole bounds, but got (low={self.low}, high={self.high})"
            )
        return self


Values = tuple[Choice, ...] | RangeConfig
"""What a searched field may be."""


RUNGS = ("reduction_factor", "min_steps", "rungs")
READ_BY: dict[PrunerKind, tuple[str, ...]] = {
    "none": (),
    "asha": RUNGS,
    "hyperband": RUNGS,
    "median": (*RUNGS, "startup_trials"),
}
"""The settings that a kind of pruner goes by."""


class PrunerConfig(Strict):
    """When a trial is stopped early, by its held-out loss at rungs. Trials compete with those of
    a lower number that could share a pack with them, see docs/design.md."""

    kind: PrunerKind = "none"
    """asha: at each rung only the best 1/reduction_factor so far go on (asynchronous successive
    halving, arXiv:1810.05934). hyperband: the same in brackets that begin at later rungs, the last
    of which stops nobody. median: whose least loss so far is above the median of the losses that
    earlier trials had at the rung is stopped."""

    reduction_factor: Annotated[int, Field(strict=True, ge=2)] = 4
    """Of the trials at a rung, one in so many goes on; and each rung is so many times the one
    before."""

    min_steps: PositiveInt | None = None
    """Steps of the first rung; null: trial.steps / reduction_factor^2."""

    rungs: tuple[PositiveInt, ...] | None = None
    """Steps of all rungs, instead of min_steps."""

    startup_trials: NonNegativeInt = 5
    """median stops nobody at a rung until so many trials have got there."""

    @model_validator(mode="after")
    def _reads_what_is_set(self) -> "PrunerConfig":
        unread = set(PrunerConfig.model_fields) - {"kind", *READ_BY[self.kind]}
        if self.kind == "median" and self.rungs is not None:  # else it spaces them
            unread.add("reduction_factor")
        for name in sorted(unread):
            value = getattr(self, name)
            if value != PrunerConfig.model_fields[name].default:
                shown = list(value) if isinstance(value, tuple) else value
                raise ValueError(
                    f"pruner: {self.kind} does not read {name}, but got {name}={shown}: leave "
                    f"{name} out, or choose another kind"
                )
        return self

    @model_validator(mode="after")
    def _rungs_ascend(self) -> "PrunerConfig":
        if self.rungs is None:
            return self
        if self.min_steps is not None:
            raise ValueError(
                "pruner.rungs and pruner.min_steps exclude each other, but got "
                f"rungs={list(self.rungs)}, min_steps={self.min_steps}: leave one out"
            )
        if not self.rungs or list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(
                f"pruner.rungs must be steps in ascending order, but got {list(self.rungs)}"
            )
        return self


def _listed_twice(values: tuple[Choice, ...]) -> list[Choice]:
    """16 and 16.0 are one, true and 1 are not: each is a mistake in another kind of field."""
    keys = [(isinstance(value, bool), encoded(value)) for value in values]
    first = {key: place for place, key in reversed([*enumerate(keys)])}
    return [value for place, value in enumerate(values) if first[keys[place]] < place]


def _named_pruner(written: Any) -> Any:
    return {"kind": written} if isinstance(written, str) else written


class ConstraintsConfig(Strict):
    """What a winner must keep to."""

    peak_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """GiB of one worker. A trial that is expected to need more even alone is not trained, packs are
    planned within it, and one whose worker was measured above it cannot win."""

    adapter_mb: Annotated[float, Field(gt=0)] | None = None
    """Megabytes (10^6 bytes) of the adapter. A trial with a larger one is not trained."""


class SearchConfig(Strict):
    space: dict[str, Values] = {}
    """Dotted field of a trial -> list of choices, or a range {low, high, log, integer}. A choice of
    adapter.target_modules may be a list of names itself: [all-linear, [q_proj, v_proj]]."""

    conditions: dict[str, dict[str, tuple[Choice, ...]]] = {}
    """Searched field -> {another searched field: values}: it is searched only where the other one
    has one of these values, and elsewhere is as written under `trial`. quant.average_bits and
    budget_gib are searched only where quant.bit_width is auto, without being told."""

    sampler: SamplerKind = "grid"
    """grid tries every combination of lists; the others draw `num_trials`: random; tpe (a
    tree-structured Parzen estimator); gp (a Gaussian process: for few, costly trials over ranges);
    nsga2 (a genetic algorithm: for several objectives). All are Optuna's."""

    num_trials: PositiveInt | None = None
    """Trials to run; for grid, null means all combinations."""

    seed: NonNegativeInt = 0
    """The same seed asks for the same trials."""

    ahead: PositiveInt | None = None
    """For samplers that learn. null: a trial is asked for when a slot is about to be free, knowing
    all results that are in by then. A number N: trial n is asked for when trials 0 to n - N are
    over, knowing these alone: it may wait, and the sweep repeats trial by trial on any cluster."""

    pruner: Annotated[
        PrunerConfig,
        BeforeValidator(_named_pruner, json_schema_input_type=PrunerKind | PrunerConfig),
    ] = PrunerConfig()
    """A kind alone, such as asha, or a mapping."""

    objectives: tuple[ObjectiveName, ...] = ("eval_loss",)
    """What is sought: the least of each, and the most of tokens_per_s and task_score. eval_loss is
    the mean loss per token on the held-out examples, task_score the part of evaluation.task that is
    answered rightly. Among the trials that keep to all constraints the winner is the best in the
    first one; ties go to the better in the next one, then the smaller bit-width, then the smaller
    adapter, then the earlier trial.
    With several, the report shows the Pareto front. NaN never wins."""

    constraints: ConstraintsConfig = ConstraintsConfig()

    @property
    def continuous_fields(self) -> set[str]:
        """From which no two draws are alike."""
        return {
            name
            for name, values in self.space.items()
            if isinstance(values, RangeConfig) and not values.integer
        }

    @property
    def all_conditions(self) -> dict[str, dict[str, tuple[Choice, ...]]]:
        """With those that hold by themselves: budgets are searched only where bits are chosen."""
        widths = self.space.get("quant.bit_width", ())
        if isinstance(widths, RangeConfig) or all(width == "auto" for width in widths):
            return self.conditions
        return self.conditions | {
            name: self.conditions.get(name, {}) | {"quant.bit_width": ("auto",)}
            for name in BUDGETS
            if name in self.space
        }

    def values_of(self, field: str, written: Any) -> tuple[Any, ...]:
        """What trials may have of a field that is `written` under `trial`; of a range, its ends.
        The written value too, where a condition decides whether the field is searched."""
        values = self.space.get(field, (written,))
        found = (values.low, values.high) if isinstance(values, RangeConfig) else values
        return (*found, written) if field in self.all_conditions else tuple(found)

    @model_validator(mode="after")
    def _sampler_fits_space(self) -> "SearchConfig":
        ranges = [name for name, values in self.space.items() if isinstance(values, RangeConfig)]
        if self.sampler == "grid" and ranges:
            raise ValueError(
                f"sampler: grid needs lists, but space.{ranges[0]} is a range: "
                "list its values, or use sampler: random or tpe"
            )
        if self.sampler != "grid" and self.num_trials is None:
            raise ValueError(f"sampler: {self.sampler} needs num_trials")
        for name, values in self.space.items():
            if not isinstance(values, RangeConfig) and not values:
                raise ValueError(f"space.{name} needs at least one value")
            if not isinstance(values, RangeConfig) and (twice := _listed_twice(values)):
                raise ValueError(
                    f"space.{name} lists a value twice, but got {twice[0]!r} after an equal one: "
                    "leave one of them out"
                )
        return self

    @model_validator(mode="after")
    def _learners_only(self) -> "SearchConfig":
        if self.ahead is not None and self.sampler in ("grid", "random"):
            raise ValueError(
                f"ahead is for samplers that learn, but got ahead={self.ahead}, "
                f"sampler={self.sampler}: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _objectives_are_usable(self) -> "SearchConfig":
        names = list(self.objectives)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"objectives must name each at least one once, but got {names}")
        if self.pruner.kind != "none" and names != ["eval_loss"]:
            raise ValueError(
                f"pruner: {self.pruner.kind} goes by the held-out loss alone and would stop what "
                f"is good in another way, but got objectives={names}: set pruner: none, or "
                "objectives: [eval_loss]"
            )
        return self

    @model_validator(mode="after")
    def _conditions_can_hold(self) -> "SearchConfig":
        for field, needs in self.conditions.items():
            for name in (field, *needs):
                if name not in self.space:
                    raise ValueError(
                        f"conditions.{field} names {name}, which is not in search.space: add it "
                        "there, or leave the condition out"
                    )
            for name, wanted in needs.items():
                values = self.space[name]
                if isinstance(values, RangeConfig):
                    raise ValueError(
                        f"conditions.{field}: {name} is a range, and a condition needs a list of "
                        "choices: list its values"
                    )
                strange = [value for value in wanted if value not in values]
                if strange or not wanted:
                    raise ValueError(
                        f"conditions.{field}.{name} must list choices of space.{name}, "
                        f"{list(values)}, but got {list(wanted)}"
                    )
        self._refuse_circles()
        return self

    def _refuse_circles(self) -> None:
        conditions = self.all_conditions
        for field in conditions:
            above, todo = set[str](), [field]
            while todo:
                parents = conditions.get(todo.pop(), {})
                todo += [name for name in parents if name not in above]
                above |= parents.keys()
            if field in above:
                raise ValueError(
                    f"conditions.{field} depends on itself through {', '.join(sorted(above))}: "
                    "leave one of these conditions out"
                )

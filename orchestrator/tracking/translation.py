"""The one place where a trial's records become MLflow's words: names, params, tags and metrics.

In: TrialSpec, rows of its curve, TrialResult. Out: plain dicts. Pure; imports no mlflow.
"""

import math
from collections.abc import Mapping
from typing import Any

from orchestrator.config import TrialConfig
from orchestrator.records import TrialResult, TrialSpec

Point = tuple[float, int, dict[str, float]]
"""Unix seconds, step, values."""

GIB = 1 << 30
MIB = 1 << 20
MAX_PARAM_CHARS = 6000  # MLflow 3.17, utils/validation.py; a longer one refuses the whole batch
MAX_TAG_CHARS = 5000  # servers before 2.13 allow no more

# Fields whose last part says too little, or means something else in MLflow.
SHORT_NAMES = {
    "optimizer.name": "optimizer",
    "schedule.kind": "schedule",
    "strategy.kind": "strategy",
    "strategy.stage": "zero_stage",
}
ONLY_FOR_CODES = ("quant.quant_type", "quant.double_quant", "quant.block_size")
PATTERNS = ("bit_width_pattern", "rank_pattern", "alpha_pattern")
"""Mappings that are one field."""
ONLY_FOR_AUTO = ("quant.average_bits", "quant.budget_gib")
ONLY_FOR_ZERO = (
    "strategy.stage",
    "strategy.offload_optimizer",
    "strategy.offload_params",
    "strategy.nvme_path",
)
TITLES = {"bit_width": "{}-bit", "rank": "rank {}", "learning_rate": "lr {}", "alpha": "alpha {}"}
TITLES_FIRST = ("quant.bit_width", "adapter.rank")

PLACE = ("pack", "slot", "node")
LOSSES = ("train_loss", "eval_loss")
BY_TOKENS = "by_tokens/"  # MLflow shows what stands before a slash as a section of its own
PROGRESS_METRICS = ("train_loss", "learning_rate", "grad_norm", "tokens_per_s", "tokens")


def short_name(field: str) -> str:
    """`adapter.rank` -> `rank`: as params and titles show a dotted field."""
    return SHORT_NAMES.get(field) or field.rpartition(".")[2]


def searched(params: Mapping[str, Any]) -> dict[str, Any]:
    """The searched fields by short name, bit-width and rank first."""
    first = [field for field in TITLES_FIRST if field in params]
    fields = first + [field for field in params if field not in first]
    found = {short_name(field): params[field] for field in fields}
    return {
        name: shown(value) if isinstance(value, dict) else value for name, value in found.items()
    }


def beyond_bits_and_rank(params: Mapping[str, Any]) -> dict[str, Any]:
    """The searched fields that a table shows beside bits and rank, which it has of every trial."""
    return {field: value for field, value in params.items() if field not in TITLES_FIRST}


def title_parts(params: Mapping[str, Any]) -> list[str]:
    """`4-bit`, `rank 16`, `lr 0.0001`: the searched fields in words."""
    return [
        TITLES.get(name, f"{name} {{}}").format(brief(value))
        for name, value in searched(params).items()
    ]


def trial_name(number: int, params: Mapping[str, Any]) -> str:
    """`trial 003 · 4-bit · rank 16`, from the searched fields."""
    return " · ".join([f"trial {number:03d}", *title_parts(params)])


def brief(value: Any) -> str:
    """A value for a title: three digits tell trials apart."""
    return f"{value:.3g}" if isinstance(value, float) else shown(value)


def shown(value: Any) -> str:
    """A value in full, as the configuration would write it."""
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        return "; ".join(f"{name}: {part}" for name, part in value.items())
    return str(value)


def trial_params(config: TrialConfig, compute_dtype: str) -> dict[str, str]:
    """All fields of a trial that have a meaning for it."""
    fields = _flat(config.model_dump(mode="json")) | {"quant.compute_dtype": compute_dtype}
    quant = config.quant
    idle: tuple[str, ...] = () if quant.packed else ONLY_FOR_CODES
    idle += () if quant.bit_width == "auto" else ONLY_FOR_AUTO
    idle += () if quant.bit_width_pattern else ("quant.bit_width_pattern",)
    idle += () if quant.int8_type else ("quant.int8_type",)
    if config.strategy.kind != "zero":
        idle += (*ONLY_FOR_ZERO, "quant.storage_dtype")
    return cut({short_name(name): value for name, value in fields.items() if name not in idle})


def cut(params: Mapping[str, Any], limit: int = MAX_PARAM_CHARS) -> dict[str, str]:
    """As MLflow takes params: text, cut to its limit, for one long value must not end a sweep."""
    return {name: shown(value)[:limit] for name, value in params.items()}


def final_evaluation(result: TrialResult) -> dict[str, Any] | None:
    """The last point of the curve that decided: of a pruned trial, at its rung. None where there is
    no loss."""
    if result.eval_loss is None:
        return None
    return {
        "kind": "evaluated",
        "step": result.steps,
        "time": result.time,
        "tokens": result.tokens,
        "eval_loss": result.eval_loss,
        "attempt": result.attempt,
    }


def point_metrics(row: Mapping[str, Any]) -> list[Point]:
    """By step, and its losses once more by tokens: batch sizes of trials may differ."""
    if row["kind"] == "evaluated":
        loss = float(row["eval_loss"])
        by_step = {"eval_loss": loss, "perplexity": perplexity(loss)}
    else:
        by_step = {name: row[name] for name in PROGRESS_METRICS}
    by_tokens = {BY_TOKENS + name: value for name, value in by_step.items() if name in LOSSES}
    at = row["time"]
    return [
        (at, row["step"], finite_or_nan(by_step)),
        (at, row["tokens"], finite_or_nan(by_tokens)),
    ]


def result_metrics(result: TrialResult) -> dict[str, float]:
    """What is known only at the end. The final eval_loss is in the curve."""
    metrics: dict[str, float | None] = {
        "peak_memory_gib": result.peak_memory_bytes / GIB,
        "model_memory_gib": result.model_memory_bytes / GIB,
        "adapter_mib": result.adapter_bytes / MIB,
        "num_adapter_params": result.num_adapter_params,
        "train_s": result.train_s,
        "baseline_eval_loss": result.baseline_eval_loss,
        "eval_loss_gain": eval_loss_gain(result),
        "task_score": result.task_score,
    }
    known = {name: value for name, value in metrics.items() if value is not None}
    return finite_or_nan(known) if result.state == "finished" else {}


def eval_loss_gain(result: TrialResult) -> float | None:
    """How much lower the held-out loss is than the untrained base's."""
    if result.eval_loss is None or result.baseline_eval_loss is None:
        return None
    return result.baseline_eval_loss - result.eval_loss


def perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def finite_or_nan(metrics: Mapping[str, float]) -> dict[str, float]:
    """MLflow stores NaN, but turns an infinity into 1.8e308, which flattens every chart."""
    return {
        name: float(value) if math.isfinite(value) else math.nan for name, value in metrics.items()
    }


def trial_state(rows: list[dict[str, Any]], result: TrialResult | None) -> str:
    if result is not None:
        return result.state
    return "running" if rows else "waiting"


def state_tags(trial: TrialSpec, attempt: int, result: TrialResult | None) -> dict[str, str]:
    """Tags of a trial's run that may change while it trains. `attempt`: of its latest point."""
    state = result.state if result is not None else ("running" if attempt else "waiting")
    tags = {
        "orchestrator.state": state,
        "orchestrator.attempt": str(result.attempt if result is not None else attempt),
        "mlflow.runName": trial_name(trial.number, trial.params),
    }
    if result is not None and result.state != "finished":
        tags["orchestrator.reason"] = result.reason
        tags["orchestrator.message"] = result.message[:MAX_TAG_CHARS]
    return tags


def place_tags(place: Mapping[str, Any]) -> dict[str, str]:
    """Where a trial was opened last, by its row of packs.jsonl."""
    return {f"orchestrator.{name}": str(place[name]) for name in PLACE if name in place}


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if name in PATTERNS:
            flat[prefix + name] = value
        elif isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat

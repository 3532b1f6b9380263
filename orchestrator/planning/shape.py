"""The shape of a base model, read from its folder without loading a weight.

In: config.json and the headers of the .safetensors files that transformers would load. Out: a
BaseShape, or an UnknownShape that says why there is none: the planner then estimates no memory. No
torch, no transformers.
"""

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import ConfigError

Targets = tuple[str, ...] | Literal["all-linear"]

# The format's own limit; what a damaged file claims must not be read into memory.
MAX_HEADER_BYTES = 100_000_000
NEEDED_FIELDS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
)
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Language models whose layers are transformers' Conv1D, not torch's Linear (transformers 5.23).
CONV1D_FAMILIES = ("gpt2", "openai-gpt")


@dataclass(frozen=True)
class Linear:
    """A layer that is quantised and can take an adapter."""

    name: str
    in_features: int
    out_features: int

    @property
    def num_params(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True)
class BaseShape:
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    linears: tuple[Linear, ...]
    """All that are quantised: every linear layer but the output head."""
    num_plain_params: int
    """Weights that no bit-width touches: embeddings, norms, biases and the output head."""
    tied_embeddings: bool = True
    """The output head's weights are the input embedding's."""
    activation: str = ""
    """Of its MLPs, as its config names it; empty: unknown."""
    most_tokens: int | None = None
    """See most_tokens_of."""

    def __hash__(self) -> int:
        # Of a few numbers: plans are remembered by it, and the layers are hundreds.
        return hash((self.num_layers, self.hidden_size, self.vocab_size, self.num_plain_params))

    @cached_property
    def num_linear_params(self) -> int:
        return sum(linear.num_params for linear in self.linears)

    @property
    def num_params(self) -> int:
        return self.num_linear_params + self.num_plain_params

    @lru_cache(maxsize=256)  # noqa: B019  (a process sees few shapes)
    def targets(self, target_modules: Targets) -> tuple[Linear, ...]:
        """The layers that `adapter.target_modules` names."""
        names = set(matching((linear.name for linear in self.linears), target_modules))
        return tuple(linear for linear in self.linears if linear.name in names)


@dataclass(frozen=True)
class UnknownShape:
    reason: str
    conv1d: bool = False
    """Whether its layers are transformers' Conv1D: GPT-2's kind."""
    most_tokens: int | None = None
    """See most_tokens_of."""


def matching(names: Iterable[str], targets: Targets) -> list[str]:
    """Those that `targets` names by PEFT's rule: whole, or by their ending after a dot."""
    if targets == "all-linear":
        return list(names)
    endings = tuple(f".{target}" for target in targets)
    return [name for name in names if f".{name}".endswith(endings)]


def check_targets(targets: Targets, layers: Sequence[str]) -> None:
    """Raises ConfigError for a name that is no linear layer's."""
    for target in targets if targets != "all-linear" else ():
        if not matching(layers, (target,)):
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise ConfigError(
                f"adapter.target_modules: {target!r} matches no linear layer of the base model; it "
                f"has {', '.join(known)}"
            )


def read_shape(folder: Path) -> BaseShape | UnknownShape:
    try:
        config = json.loads((folder / "config.json").read_text())
        most_tokens = most_tokens_of(config)
        if reason := _why_unknown(config):
            conv1d = config.get("model_type") in CONV1D_FAMILIES
            return UnknownShape(reason, conv1d, most_tokens)
        tensors = _tensor_shapes(folder)
    except (OSError, ValueError, LookupError, struct.error) as error:
        return UnknownShape(f"{folder} cannot be read: {error}")
    if not tensors:
        return UnknownShape("the base has no .safetensors files", most_tokens=most_tokens)
    return _shape(config, tensors, most_tokens)


def _why_unknown(config: dict[str, Any]) -> str:
    family = f"base model family {config.get('model_type', 'unknown')!r}"
    if missing := [name for name in NEEDED_FIELDS if not isinstance(config.get(name), int)]:
        return f"{family}: its config.json has no {missing[0]}"
    if any(config.get(name) for name in EXPERT_FIELDS):
        return (
            f"{family}: a mixture of experts, which stay at 16 bits and take no adapter, and for "
            "which no memory is estimated"
        )
    if quantised_by(config):
        return f"{family}: its files are quantised already"
    return ""


def quantised_by(config: dict[str, Any]) -> str:
    """What quantised the files beside this config.json, as it names it; empty if nothing did."""
    quantised = config.get("quantization_config")
    return str(quantised.get("quant_method", "an unnamed method")) if quantised else ""


def _shape(
    config: dict[str, Any], tensors: dict[str, Sequence[int]], most_tokens: int | None
) -> BaseShape:
    if config.get("tie_word_embeddings"):
        tensors = {name: shape for name, shape in tensors.items() if "lm_head" not in name}
    linears = tuple(
        Linear(name.removesuffix(".weight"), shape[1], shape[0])
        for name, shape in sorted(tensors.items())
        if _is_linear(name, shape, config["vocab_size"])
    )
    heads = config["num_attention_heads"]
    total = sum(math.prod(shape) for shape in tensors.values())
    return BaseShape(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        linears=linears,
        num_plain_params=total - sum(linear.num_params for linear in linears),
        tied_embeddings=sum(_has_words(s, config["vocab_size"]) for s in tensors.values()) < 2,
        activation=config.get("hidden_act") or "",
        most_tokens=most_tokens,
    )


def most_tokens_of(config: dict[str, Any]) -> int | None:
    """Of a sequence, up to which its positions are its own; None where they always are.

    Beyond that transformers scales the positions of a whole batch by its longest sequence, and
    those of later batches by what it has seen (modeling_rope_utils.py, dynamic_rope_update, 5.23).
    """
    config = config.get("text_config") or config
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    limits = []
    for kind in (scaling, *(part for part in scaling.values() if isinstance(part, dict))):
        name = kind.get("rope_type") or kind.get("type") or ""
        if name in ("longrope", "su"):  # as Phi-3's first files call it
            own = "original_max_position_embeddings"
            limits.append(kind.get(own) or config.get(own) or config["max_position_embeddings"])
        elif "dynamic" in name:
            limits.append(config["max_position_embeddings"])
    return min(limits, default=None)


def _is_linear(name: str, shape: Sequence[int], vocab_size: int) -> bool:
    if not name.endswith(".weight") or len(shape) != 2 or _has_words(shape, vocab_size):
        return False
    return "embed" not in name and "lm_head" not in name


def _has_words(shape: Sequence[int], vocab_size: int) -> bool:
    """Whether it is an embedding's or a head's, whatever a family calls them (embed_in, wte)."""
    return len(shape) == 2 and shape[0] == vocab_size


def _tensor_shapes(folder: Path) -> dict[str, Sequence[int]]:
    """Of all tensors of the base, by name."""
    shapes: dict[str, Sequence[int]] = {}
    for path in _weight_files(folder):
        header = _header(path)
        shapes |= {name: tensor["shape"] for name, tensor in header.items()}
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    """Those that transformers 5 loads, in its order: one file, else an index's. Mistral's folders
    hold the weights a second time, in consolidated.safetensors under other names."""
    if (single := folder / "model.safetensors").exists():
        return [single]
    if (index := folder / "model.safetensors.index.json").exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    return sorted(folder.glob("*.safetensors"))


def _header(path: Path) -> dict[str, Any]:
    """A .safetensors file begins with the length of its header, 8 bytes, then JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path.name} is no safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}

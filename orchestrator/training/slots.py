"""K slots of low-rank adapters on one frozen base: the heart of a pack.

Every target linear layer is wrapped once. Its input is the concatenation of the active slots' equal
sub-batches: the frozen product runs once over all tokens, the low-rank paths run as one batched
product over slots padded to the largest rank.

One fp32 row per slot holds all of that slot's adapter weights, and another its gradients; the
layers' parameters and gradients are views into them. So an optimizer step, a clip, a checkpoint and
a refill are each one operation on a row. Padded rows of A and columns of B, and layers that a trial
does not target, are zero and stay exactly zero: their gradients are products with zero. No mask.

Shapes: K slots, k active slots, b blocks per slot, S block length, R largest rank, in/out features.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from orchestrator.config import AdapterConfig
from orchestrator.errors import BaseModelError, ConfigError

# Views into rows are not dense, and autograd would like dense gradients for them; it adds its own
# dense result into our view in place, which is what we want.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")

Targets = tuple[str, ...] | Literal["all-linear"]


@dataclass(frozen=True)
class Layer:
    """Where one wrapped layer's weights lie in a row: A [R, in] at `start`, then B [out, R]."""

    name: str
    in_features: int
    out_features: int
    start: int
    middle: int
    end: int


@dataclass(frozen=True)
class DropoutKey:
    """Everything that decides one slot's dropout mask, so that a resumed step draws it again."""

    probability: float
    seed: int


class ActiveSlots:
    """Which slots the next forward pass serves; shared by all wrapped layers."""

    def __init__(self) -> None:
        self.index: Tensor | None = None  # [k], or None for all K in order
        self.scaling = torch.ones(0)  # [k, 1, 1]
        self.dropout: Sequence[DropoutKey] = ()
        self.enabled = False


class SlottedLinear(nn.Module):
    """A frozen linear layer with K adapters."""

    A: nn.Parameter  # [K, R, in]
    B: nn.Parameter  # [K, out, R]

    def __init__(self, base: nn.Module, active: ActiveSlots, number: int) -> None:
        super().__init__()
        self.base = base
        self.active = active
        self.number = number

    def forward(self, x: Tensor) -> Tensor:  # [k*b, S, in] -> [k*b, S, out]
        output: Tensor = self.base(x)
        active = self.active
        if not active.enabled:
            return output
        A: Tensor = self.A
        B: Tensor = self.B
        if active.index is not None:
            A, B = A[active.index], B[active.index]
        k = A.shape[0]
        tokens = x.reshape(k, -1, x.shape[-1])  # [k, b*S, in]
        if any(key.probability for key in active.dropout):
            tokens = self._drop(tokens)
        inner = torch.bmm(tokens, A.to(tokens.dtype).transpose(1, 2))  # [k, b*S, R]
        update = torch.bmm(inner, (B * active.scaling).to(tokens.dtype).transpose(1, 2))
        return output + update.view_as(output)

    def _drop(self, tokens: Tensor) -> Tensor:
        # A mask is a function of (trial seed, step, micro-batch, layer): the same alone, in a pack,
        # in a recomputed forward pass and after a resume.
        masks = []
        generator = torch.Generator(device=tokens.device)
        for key in self.active.dropout:
            generator.manual_seed(mix(key.seed, self.number))
            uniform = torch.rand(tokens.shape[1:], generator=generator, device=tokens.device)
            masks.append((uniform >= key.probability) / (1 - key.probability))
        return tokens * torch.stack(masks).to(tokens.dtype)


class Slots:
    """The rows of K slots, and the model's layers that look into them."""

    def __init__(
        self, model: nn.Module, targets: Targets, num_slots: int, max_rank: int, device: str
    ) -> None:
        self.max_rank = max_rank
        self.active = ActiveSlots()
        names = target_names(model, targets)
        self.layers = tuple(_layout(model, names, max_rank))
        row_length = self.layers[-1].end
        self.rows = torch.zeros(num_slots, row_length, device=device)
        self.gradients = torch.zeros_like(self.rows)
        self.parameters: list[nn.Parameter] = []
        for number, layer in enumerate(self.layers):
            wrapped = SlottedLinear(model.get_submodule(layer.name), self.active, number)
            wrapped.A = self._view(layer.start, layer.middle, max_rank, layer.in_features)
            wrapped.B = self._view(layer.middle, layer.end, layer.out_features, max_rank)
            _replace(model, layer.name, wrapped)

    def _view(self, start: int, end: int, *shape: int) -> nn.Parameter:
        num_slots = len(self.rows)
        parameter = nn.Parameter(self.rows[:, start:end].view(num_slots, *shape))
        parameter.grad = self.gradients[:, start:end].view(num_slots, *shape)
        self.parameters.append(parameter)
        return parameter

    def open(self, slot: int, adapter: AdapterConfig, seed: int) -> None:
        """Give the slot its first values: A as PEFT draws it, B zero, everything else zero."""
        self.clear(slot)
        targets = set(_matching([layer.name for layer in self.layers], adapter.target_modules))
        for number, layer in enumerate(self.layers):
            if layer.name in targets:
                generator = torch.Generator().manual_seed(mix(seed, number))
                first = torch.empty(adapter.rank, layer.in_features)
                nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
                self._A(slot, layer)[: adapter.rank] = first.to(self.rows.device)

    def give_up_gradients(self) -> None:
        """Another engine makes the gradients: free the rows for them, and the views into them."""
        self.gradients = torch.zeros(len(self.rows), 0, device=self.rows.device)
        for parameter in self.parameters:
            parameter.grad = None

    def row_views(self, slot: int) -> Iterator[Tensor]:
        """The values of one slot's row, part by part as `parameters` holds them."""
        for layer in self.layers:
            yield self._A(slot, layer)
            yield self._B(slot, layer)

    def clear(self, slot: int) -> None:
        self.rows[slot].zero_()
        self.gradients[slot].zero_()

    def activate(
        self, slots: Sequence[int], scaling: Sequence[float], dropout: Sequence[DropoutKey] = ()
    ) -> None:
        """The next forward pass serves these slots, in this order."""
        device = self.rows.device
        everything = list(slots) == list(range(len(self.rows)))
        self.active.index = None if everything else torch.tensor(list(slots), device=device)
        self.active.scaling = torch.tensor(list(scaling), device=device).view(-1, 1, 1)
        self.active.dropout = dropout
        self.active.enabled = True

    def deactivate(self) -> None:
        """The next forward pass is the base model's alone."""
        self.active.enabled = False

    def adapter_tensors(self, slot: int, adapter: AdapterConfig) -> dict[str, Tensor]:
        """The slot's weights without padding, under PEFT's names (peft 0.21)."""
        targets = set(_matching([layer.name for layer in self.layers], adapter.target_modules))
        tensors = {}
        for layer in self.layers:
            if layer.name in targets:
                prefix = f"base_model.model.{layer.name}"
                A = self._A(slot, layer)[: adapter.rank]
                B = self._B(slot, layer)[:, : adapter.rank]
                tensors[f"{prefix}.lora_A.weight"] = A.cpu().clone().contiguous()
                tensors[f"{prefix}.lora_B.weight"] = B.cpu().clone().contiguous()
        return tensors

    def layout_key(self) -> str:
        """Equal for two packs whose rows can be exchanged."""
        layers = ";".join(f"{layer.name}:{layer.start}:{layer.end}" for layer in self.layers)
        return f"R{self.max_rank};{layers}"

    def _A(self, slot: int, layer: Layer) -> Tensor:
        row = self.rows[slot, layer.start : layer.middle]
        return row.view(self.max_rank, layer.in_features)

    def _B(self, slot: int, layer: Layer) -> Tensor:
        row = self.rows[slot, layer.middle : layer.end]
        return row.view(layer.out_features, self.max_rank)


def scaling(adapter: AdapterConfig) -> float:
    divisor = math.sqrt(adapter.rank) if adapter.rslora else adapter.rank
    return adapter.alpha / divisor


def target_names(model: nn.Module, targets: Targets) -> list[str]:
    """Names of the layers to wrap: linear ones that match, never the output head.

    Raises:
        ConfigError: a name in `targets` matches no linear layer.
        BaseModelError: the model has none at all; GPT-2's are of a class of its own.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    if not linear:
        raise BaseModelError(
            "the base model has no linear layer that an adapter could be put on: choose another "
            "base model"
        )
    if targets != "all-linear":
        for target in targets:
            if not _matching(linear, (target,)):
                known = sorted({name.rpartition(".")[2] for name in linear})
                raise ConfigError(
                    f"adapter.target_modules: {target!r} matches no linear layer of the base "
                    f"model; it has {', '.join(known)}"
                )
    return _matching(linear, targets)


def mix(seed: int, salt: int) -> int:
    """A 63-bit seed from two numbers (splitmix64's finaliser)."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + salt + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


def _matching(names: Sequence[str], targets: Targets) -> list[str]:
    # PEFT's rule: the whole name, or its ending after a dot.
    if targets == "all-linear":
        return list(names)
    return [
        name
        for name in names
        if any(name == target or name.endswith(f".{target}") for target in targets)
    ]


def _layout(model: nn.Module, names: Sequence[str], max_rank: int) -> Iterator[Layer]:
    start = 0
    for name in names:
        module = model.get_submodule(name)
        n_in, n_out = int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
        middle = start + max_rank * n_in
        end = middle + max_rank * n_out
        yield Layer(name, n_in, n_out, start, middle, end)
        start = end


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)

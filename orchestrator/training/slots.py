"""The rows of K slots: every adapter weight of a pack, one flat row per trial.

One fp32 row per slot holds all of that slot's adapter weights, and another its gradients. So an
optimizer step, a clip, an all-reduce, a checkpoint and a refill are each one operation on a row.
The forward and backward pass read and write copies of the rows in the arithmetic's type, see
lanes.py. Padded columns of A and rows of B, and layers that a trial does not target, are zero and
stay exactly zero: their gradients are products with zero. No mask.

With DoRA a row holds each layer's magnitudes too. Those of a layer that a trial does not target
are zero, and its scaling is 0, which says that it has no adapter.

Shapes: K slots, R largest rank, L values in a row, in/out features.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orchestrator.config import AdapterConfig
from orchestrator.errors import BaseModelError, TrialFailed
from orchestrator.planning.ranks import idle_patterns, rank_of, scaling_of
from orchestrator.planning.shape import Targets, check_targets, matching
from orchestrator.training.adapter import check_peft_keeps
from orchestrator.training.dora import lengths, squared_lengths
from orchestrator.training.frozen import PackedLinear, decoder_modules, names_elsewhere
from orchestrator.training.loftq import Correction


@dataclass(frozen=True)
class Layer:
    """Where one adapted layer's weights lie in a row: A [in, R] at `start`, B [R, out], and with
    DoRA the magnitudes [out].

    A and B are PEFT's matrices transposed, as the gradients come out of the products.
    """

    name: str
    in_features: int
    out_features: int
    start: int
    middle: int
    magnitudes: int
    """Where they begin: at the end if there are none."""
    end: int

    @property
    def key(self) -> int:
        """What its first values and its dropout masks are drawn by, 32 bits signed: of its name
        alone, whatever other layers the pack's trials adapt."""
        hashed = zlib.crc32(self.name.encode())
        return hashed - (hashed >> 31 << 32)


class Slots:
    """The rows of K slots and their gradients, fp32 [K, L] each (fp64 under fp64 arithmetic)."""

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        num_slots: int,
        max_rank: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        dora: bool = False,
    ) -> None:
        self.max_rank = max_rank
        self.dora = dora
        self.layers = tuple(_layout(model, target_names(model, targets), max_rank, dora))
        check_peft_keeps(model, (layer.name for layer in self.layers))
        self.names_elsewhere = names_elsewhere(model)
        self.rows = torch.zeros(num_slots, self.layers[-1].end, device=device, dtype=dtype)
        self.gradients = torch.zeros_like(self.rows)
        self.corrections: dict[str, Correction] = {}
        """Of the base's quantisation errors, by layer, where a trial begins with them."""
        self._bases = [model.get_submodule(layer.name) for layer in self.layers] if dora else []
        self.squares = [squared_lengths(base, dtype) for base in self._bases]
        """With DoRA: of each layer's frozen rows, [out]."""

    def open(self, slot: int, adapter: AdapterConfig, seed: int) -> None:
        """Give the slot its first values: A as PEFT draws it, B zero, everything else zero; with
        loftq those of `corrections` before these, as many as a layer has. Magnitudes are the rows'
        lengths.

        Raises:
            TrialFailed: a key of a pattern matches no layer that the trial targets. Its sweep says
                so before, where the base's shape is known.
        """
        self.clear(slot)
        targets = self._targets(adapter)
        if idle := idle_patterns(adapter, targets):
            raise TrialFailed("not_valid", "; ".join(idle))
        for number, layer in enumerate(self.layers):
            if layer.name not in targets:
                continue
            rank, found = rank_of(adapter, layer.name), 0
            if adapter.init == "loftq" and layer.name in self.corrections:
                A, B = self.corrections[layer.name].parts(rank, scaling_of(adapter, layer.name))
                found = len(A)  # fewer than the rank where a side of the layer is smaller
                self._A(slot, layer)[:, :found] = A.T.to(self.rows)
                self._B(slot, layer)[:found] = B.T.to(self.rows)
            if found < rank:
                generator = torch.Generator().manual_seed(mix(seed, layer.key))
                first = torch.empty(rank, layer.in_features)
                nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
                self._A(slot, layer)[:, found:rank] = first[found:].T.to(self.rows)
            if self.dora:
                scaling = self.rows.new_full((1, 1, 1), scaling_of(adapter, layer.name))
                self._magnitudes(slot, layer).copy_(self._lengths(slot, number, scaling))

    def give_up_gradients(self) -> None:
        """Another engine makes the gradients: free the rows for them."""
        self.gradients = self.gradients.new_zeros(len(self.rows), 0)

    def parts(self, rows: Tensor) -> Iterator[Tensor]:
        """Views of what lies in rows [..., L] as in these: of each layer A [..., in, R] and
        B [..., R, out], and with DoRA the magnitudes [..., 1, out]."""
        outer, rank = rows.shape[:-1], self.max_rank
        for layer in self.layers:
            A, B = rows[..., layer.start : layer.middle], rows[..., layer.middle : layer.magnitudes]
            yield A.view(*outer, layer.in_features, rank)
            yield B.view(*outer, rank, layer.out_features)
            if self.dora:
                yield rows[..., layer.magnitudes : layer.end].unsqueeze(-2)

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Where the parts of each layer lie in a row: from, to. As `Lanes.parameters`."""
        found = []
        for layer in self.layers:
            found += [(layer.start, layer.middle), (layer.middle, layer.magnitudes)]
            found += [(layer.magnitudes, layer.end)] if self.dora else []
        return found

    def clear(self, slot: int) -> None:
        self.rows[slot].zero_()
        self.gradients[slot].zero_()

    def adapter_tensors(self, slot: int, adapter: AdapterConfig) -> dict[str, Tensor]:
        """The slot's weights without padding, under PEFT's names (peft 0.21)."""
        targets = self._targets(adapter)
        tensors = {}
        for layer in self.layers:
            if layer.name in targets:
                prefix = f"base_model.model.{layer.name}"
                rank = rank_of(adapter, layer.name)
                A = self._A(slot, layer)[:, :rank]
                B = self._B(slot, layer)[:rank]
                for name, factor in (("A", A), ("B", B)):
                    transposed = factor.T.clone(memory_format=torch.contiguous_format)
                    tensors[f"{prefix}.lora_{name}.weight"] = transposed.cpu()
                if self.dora:
                    magnitudes = self._magnitudes(slot, layer).cpu().clone()
                    tensors[f"{prefix}.lora_magnitude_vector"] = magnitudes
        return tensors

    def load(self, slot: int, tensors: Mapping[str, Tensor], adapter: AdapterConfig) -> None:
        """Take an adapter's weights under PEFT's names: the way back from `adapter_tensors`.

        Raises:
            KeyError, ValueError: the adapter has not just the weights of these layers.
        """
        self.clear(slot)
        for layer in self.layers:
            prefix = f"base_model.model.{layer.name}"
            A, B = (tensors[f"{prefix}.lora_{name}.weight"].T for name in ("A", "B"))
            rank = rank_of(adapter, layer.name)
            if A.shape != (layer.in_features, rank) or B.shape != (rank, layer.out_features):
                raise ValueError(f"{layer.name}: an adapter of another shape: {A.shape}, {B.shape}")
            self._A(slot, layer)[:, :rank] = A.to(self.rows)
            self._B(slot, layer)[:rank] = B.to(self.rows)
            if self.dora:
                magnitudes = tensors[f"{prefix}.lora_magnitude_vector"]
                if magnitudes.shape != (layer.out_features,):
                    raise ValueError(f"{layer.name}: {magnitudes.shape} of magnitudes")
                self._magnitudes(slot, layer).copy_(magnitudes)
        if len(tensors) != (3 if self.dora else 2) * len(self.layers):
            raise ValueError("the adapter has weights of layers that the base model does not have")

    def values(self, row: Tensor, adapter: AdapterConfig) -> Tensor:
        """Of a row [L] what is the adapter's own: the same in packs of any largest rank and any
        layers."""
        return torch.cat([part.ravel() for part in self._own(row, adapter)])

    def laid_out(self, values: Tensor, adapter: AdapterConfig) -> Tensor:
        """The way back from `values`: a row [L] that is zero elsewhere."""
        row = values.new_zeros(self.layers[-1].end)
        start = 0
        for part in self._own(row, adapter):
            part.copy_(values[start : start + part.numel()].view_as(part))
            start += part.numel()
        if start != len(values):
            raise ValueError(f"{len(values)} values for an adapter of {start}")
        return row

    def _own(self, row: Tensor, adapter: AdapterConfig) -> Iterator[Tensor]:
        targets = self._targets(adapter)
        for layer in self.layers:
            if layer.name in targets:
                rank = rank_of(adapter, layer.name)
                A, B = row[layer.start : layer.middle], row[layer.middle : layer.magnitudes]
                yield A.view(layer.in_features, self.max_rank)[:, :rank]
                yield B.view(self.max_rank, layer.out_features)[:rank]
                if self.dora:
                    yield row[layer.magnitudes : layer.end]

    def scalings(self, adapter: AdapterConfig) -> float | tuple[float, ...]:
        """What each layer's update is multiplied by; one number where that is the same for all."""
        targets = self._targets(adapter) if self.dora else {layer.name for layer in self.layers}
        found = tuple(
            scaling_of(adapter, layer.name) if layer.name in targets else 0.0
            for layer in self.layers
        )
        return found[0] if len(set(found)) == 1 else found

    def _targets(self, adapter: AdapterConfig) -> set[str]:
        return set(matching([layer.name for layer in self.layers], adapter.target_modules))

    def layout_key(self) -> str:
        """Equal for two packs whose rows can be exchanged."""
        layers = ";".join(f"{layer.name}:{layer.start}:{layer.end}" for layer in self.layers)
        return f"in x R{self.max_rank} x out;{layers}"

    def _A(self, slot: int, layer: Layer) -> Tensor:
        row = self.rows[slot, layer.start : layer.middle]
        return row.view(layer.in_features, self.max_rank)

    def _B(self, slot: int, layer: Layer) -> Tensor:
        row = self.rows[slot, layer.middle : layer.magnitudes]
        return row.view(self.max_rank, layer.out_features)

    def _magnitudes(self, slot: int, layer: Layer) -> Tensor:
        return self.rows[slot, layer.magnitudes : layer.end]

    def _lengths(self, slot: int, number: int, scaling: Tensor) -> Tensor:
        """Of the rows of a layer with the slot's update, [out]."""
        layer, base = self.layers[number], self._bases[number]
        A, B = self._A(slot, layer)[None], self._B(slot, layer)[None]
        return lengths(base, self.squares[number], A, B, scaling)[0, 0]


def target_names(model: nn.Module, targets: Targets) -> list[str]:
    """Names of the layers to wrap: linear ones that match, never the output head.

    Raises:
        ConfigError: a name in `targets` matches no linear layer.
        BaseModelError: the model has none at all, as GPT-2 in 16 bits.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [
        name
        for name, module in decoder_modules(model)
        if isinstance(module, nn.Linear | PackedLinear) and module is not head
    ]
    if not linear:
        raise BaseModelError(
            "the base model has no linear layer that an adapter could be put on: choose another "
            "base model"
        )
    check_targets(targets, linear)
    return matching(linear, targets)


def mix(seed: int, salt: int) -> int:
    """A 63-bit seed from two numbers (splitmix64's finaliser)."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + salt + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


def _layout(model: nn.Module, names: Sequence[str], max_rank: int, dora: bool) -> Iterator[Layer]:
    start = 0
    for name in names:
        module = model.get_submodule(name)
        n_in, n_out = int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
        middle = start + max_rank * n_in
        magnitudes = middle + max_rank * n_out
        end = magnitudes + (n_out if dora else 0)
        yield Layer(name, n_in, n_out, start, middle, magnitudes, end)
        start = end

"""Lanes: the places of a step's batch, each serving one slot, and the layers that read them.

A step's batch is the concatenation of n equal parts, one per lane. The frozen product of a layer
runs once over all tokens; its low-rank path runs as one batched product over the lanes, which hold
copies of their slots' rows in the arithmetic's type. A lane may serve any slot, or none (its
weights are zero then), or the same slot as another lane: so the program of a step is the same
whatever is in the slots, and an evaluation of one slot uses all lanes.

Shapes: n lanes, b blocks per lane, S block length, R largest rank, L values in a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from orchestrator.training.slots import Slots

if TYPE_CHECKING:
    from orchestrator.training.kernels import GradientGatherer


@dataclass(frozen=True)
class Served:
    """What one lane serves in the next forward pass."""

    slot: int | None
    """None: no adapter, the base alone."""
    scaling: float
    dropout: float = 0.0
    dropout_seed: int = 0
    """63 bits that decide the dropout mask, so that a resumed step draws it again."""


BASE_ALONE = Served(None, 0.0)


class Lanes:
    """Weights of n lanes, [n, L], and what goes with each lane."""

    def __init__(self, slots: Slots, num_lanes: int, dtype: torch.dtype) -> None:
        shape = (num_lanes, slots.rows.shape[1])
        self._take(slots, torch.zeros(shape, dtype=dtype, device=slots.rows.device))

    @classmethod
    def over(cls, slots: Slots) -> "Lanes":
        """Lanes whose weights are the slots' rows themselves."""
        lanes = cls.__new__(cls)
        lanes._take(slots, slots.rows)
        return lanes

    def _take(self, slots: Slots, weights: Tensor) -> None:
        self._slots = slots
        self.weights = weights
        device = weights.device
        factors = torch.float64 if weights.dtype == torch.float64 else torch.float32
        self.scaling = torch.zeros(len(weights), 1, 1, device=device, dtype=factors)
        self.dropout = Dropout(len(weights), device, factors)
        self.parameters = list(self._views())
        self._serving: tuple[int | None, ...] = ()
        self._gatherer: GradientGatherer | None = None

    def __len__(self) -> int:
        return len(self.weights)

    def serve(self, served: Sequence[Served]) -> None:
        """Copy the slots' rows in; lanes beyond `served` serve nothing."""
        idle = len(self) - len(served)
        scaling = [lane.scaling for lane in served] + [0.0] * idle
        self.scaling.copy_(_on(self.scaling, scaling).view(-1, 1, 1), non_blocking=True)
        self.dropout.set(served, idle)
        self._serving = tuple(lane.slot for lane in served)
        if self.weights is self._slots.rows:
            return
        if self._serving == tuple(range(len(self._slots.rows))):
            self.weights.copy_(self._slots.rows)
            return
        for lane, slot in enumerate(self._serving):
            if slot is None:
                self.weights[lane].zero_()
            else:
                self.weights[lane].copy_(self._slots.rows[slot])
        self.weights[len(served) :].zero_()

    def add_gradients(self, parts: Sequence[Tensor], fresh: Sequence[bool]) -> None:
        """Add gradients by `parameters` to the slots'; a fresh lane's replace what is there."""
        slots = [slot for slot in self._serving if slot is not None]
        assert len(slots) == len(fresh), "a lane without a slot has no gradient"
        rows = self._slots.gradients
        if rows.is_cuda:
            self._add_at_once(parts, slots, fresh)
            return
        for (start, end), part in zip(self._slots.segments, parts, strict=True):
            for lane, (slot, is_fresh) in enumerate(zip(slots, fresh, strict=True)):
                row = rows[slot, start:end]
                _ = row.copy_(part[lane].ravel()) if is_fresh else row.add_(part[lane].ravel())

    def _add_at_once(
        self, parts: Sequence[Tensor], slots: Sequence[int], fresh: Sequence[bool]
    ) -> None:
        if self._gatherer is None:
            from orchestrator.training.kernels import GradientGatherer

            self._gatherer = GradientGatherer(self._slots.segments, self.weights.device)
        self._gatherer.add(parts, self._slots.gradients, slots, fresh)

    def attach(self, model: nn.Module) -> None:
        """Let the model's layers read these lanes; wraps them the first time."""
        parameters = iter(self.parameters)
        for number, layer in enumerate(self._slots.layers):
            module = model.get_submodule(layer.name)
            if not isinstance(module, AdaptedLinear):
                module = AdaptedLinear(module, number)
                parent, _, leaf = layer.name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, module)
            module.A, module.B = next(parameters), next(parameters)
            module.lanes = self

    def _views(self) -> Iterator[nn.Parameter]:
        rank = self._slots.max_rank
        for layer in self._slots.layers:
            A = self.weights[:, layer.start : layer.middle]
            B = self.weights[:, layer.middle : layer.end]
            yield nn.Parameter(A.view(len(self), layer.in_features, rank))
            yield nn.Parameter(B.view(len(self), rank, layer.out_features))


class Dropout:
    """Masks by a hash of (seed, layer, place), so that no generator's state is part of a step.

    A mask is the same alone, in a pack, in a recomputed forward pass, after a resume, on a CPU, on
    a GPU and in a CUDA graph.
    """

    def __init__(self, num_lanes: int, device: torch.device, factors: torch.dtype) -> None:
        self.active = False
        """Whether masks are drawn at all. Set once: a program with masks is another program."""
        self._seeds = torch.zeros(num_lanes, 2, 1, 1, dtype=torch.int32, device=device)
        self._thresholds = torch.zeros(num_lanes, 1, 1, dtype=torch.int32, device=device)
        self._kept = torch.ones(num_lanes, 1, 1, dtype=factors, device=device)

    def set(self, served: Sequence[Served], idle: int) -> None:
        if not self.active:
            assert not any(lane.dropout for lane in served), "the pack was opened without dropout"
            return
        seeds = [_halves(lane.dropout_seed) for lane in served] + [(0, 0)] * idle
        rates = [lane.dropout for lane in served] + [0.0] * idle
        self._seeds.copy_(_on(self._seeds, seeds).view(-1, 2, 1, 1))
        self._thresholds.copy_(
            _on(self._thresholds, [round(rate * 2**31) for rate in rates]).view(-1, 1, 1)
        )
        self._kept.copy_(_on(self._kept, [1 / (1 - rate) for rate in rates]).view(-1, 1, 1))

    def __call__(self, tokens: Tensor, layer: Tensor) -> Tensor:  # [n, T, in] -> the same
        _, length, width = tokens.shape
        place = torch.arange(length * width, dtype=torch.int32, device=tokens.device)
        random = _hash(place.view(1, length, width) ^ self._seeds[:, 0])
        random = _hash(random ^ self._seeds[:, 1] ^ _hash(layer))
        keep = (random & 0x7FFFFFFF) >= self._thresholds
        return (tokens * (keep * self._kept)).to(tokens.dtype)


class AdaptedLinear(nn.Module):
    """A frozen linear layer with an adapter for each lane."""

    A: nn.Parameter  # [n, in, R]
    B: nn.Parameter  # [n, R, out]
    lanes: Lanes

    def __init__(self, base: nn.Module, number: int) -> None:
        super().__init__()
        self.base = base
        # A tensor: as a plain number it would make torch.compile compile every layer anew.
        self.register_buffer("number", torch.tensor(number, dtype=torch.int32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [n*b, S, in] -> [n*b, S, out]
        output: Tensor = self.base(x)
        A, B, lanes = self.A, self.B, self.lanes
        tokens = x.reshape(A.shape[0], -1, x.shape[-1])  # [n, b*S, in]
        if lanes.dropout.active:
            tokens = lanes.dropout(tokens, self.number)  # type: ignore[arg-type]
        inner = torch.bmm(tokens, A.to(tokens.dtype))  # [n, b*S, R]
        inner = (inner * lanes.scaling).to(tokens.dtype)
        update = torch.bmm(inner, B.to(tokens.dtype))
        return output + update.view_as(output)


def _hash(x: Tensor) -> Tensor:
    """lowbias32, a 32-bit mixer (Chris Wellons, hash-prospector), on int32 that wraps around."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7935B975  # 0x846CA68B
    return x ^ ((x >> 16) & 0xFFFF)


def _halves(seed: int) -> tuple[int, int]:
    """A seed's two halves as signed 32-bit numbers."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def _on(like: Tensor, values: Sequence[object]) -> Tensor:
    """The values as a tensor of the same type, ready to be copied to its device at once."""
    tensor = torch.tensor(values, dtype=like.dtype)
    return tensor.pin_memory() if like.is_cuda else tensor

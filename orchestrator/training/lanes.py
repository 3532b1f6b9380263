"""Lanes: the places of a step's batch, each serving one slot, and the layers that read them.

A step's batch is the concatenation of n equal parts, one per lane. The frozen product of a layer
runs once over all tokens; its low-rank path runs as one batched product over the lanes, which hold
copies of their slots' rows in the arithmetic's type. A lane may serve any slot, or none (its
weights are zero then), or the same slot as another lane: so the program of a step is the same
whatever is in the slots, and an evaluation of one slot uses all lanes.

Shapes: n lanes, b blocks per lane, S block length, R largest rank, L values in a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from orchestrator.training.dora import lengths, product
from orchestrator.training.dropout import Dropout, Drops
from orchestrator.training.slots import Slots

if TYPE_CHECKING:
    from orchestrator.training.kernels import GradientGatherer


@dataclass(frozen=True)
class Served:
    """What one lane serves in the next forward pass."""

    slot: int | None
    """None: no adapter, the base alone."""
    scaling: float | tuple[float, ...]
    """What updates are multiplied by: in all layers, or in each."""
    drops: Drops = Drops()


BASE_ALONE = Served(None, 0.0)


class Lanes:
    """Weights of n lanes, [n, L], and what goes with each lane."""

    def __init__(
        self,
        slots: Slots,
        num_lanes: int,
        dtype: torch.dtype,
        masked_blocks: int | None = None,
        over_rows: bool = False,
    ) -> None:
        """`masked_blocks`: see Dropout. `over_rows`: the weights are the slots' rows themselves."""
        self._slots = slots
        rows = slots.rows
        shape = (num_lanes, rows.shape[1])
        # DoRA's factors lie so near to 1 that bfloat16, whose steps there are 1/128, holds few.
        dtype = rows.dtype if slots.dora else dtype
        self.weights = rows if over_rows else torch.zeros(shape, dtype=dtype, device=rows.device)
        sizes = (len(slots.layers), num_lanes, 1, 1)
        self.scaling = torch.zeros(sizes, device=rows.device, dtype=rows.dtype)
        """[layers, n, 1, 1]; each layer reads its own part."""
        self._scaling_of = [self.scaling[number] for number in range(len(slots.layers))]
        self.dropout = Dropout(num_lanes, masked_blocks, rows.device, rows.dtype)
        self.parameters = [nn.Parameter(part) for part in slots.parts(self.weights)]
        self._serving: tuple[int | None, ...] = ()
        self._gatherer: GradientGatherer | None = None

    def __len__(self) -> int:
        return len(self.weights)

    def serve(self, served: Sequence[Served]) -> None:
        """Copy the slots' rows in; lanes beyond `served` serve nothing."""
        idle = len(self) - len(served)
        self._scale([lane.scaling for lane in served] + [0.0] * idle)
        self.dropout.set([lane.drops for lane in served], idle)
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
        if rows.is_cuda and rows.dtype == torch.float32:
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

    def _scale(self, scaling: Sequence[float | tuple[float, ...]]) -> None:
        num_layers = len(self.scaling)
        if all(isinstance(one, float) for one in scaling):
            by_layer = staged(self.scaling, scaling).view(1, -1, 1, 1)
        else:
            columns = [one if isinstance(one, tuple) else (one,) * num_layers for one in scaling]
            by_layer = staged(self.scaling, list(zip(*columns, strict=True)))[..., None, None]
        self.scaling.copy_(by_layer, non_blocking=True)

    def attach(self, model: nn.Module) -> None:
        """Let the model's layers read these lanes; wraps them the first time. Back from others, a
        layer has the very tensors that it had: a compiled program goes on with them."""
        parameters = iter(self.parameters)
        for number, layer in enumerate(self._slots.layers):
            module = model.get_submodule(layer.name)
            if not isinstance(module, AdaptedLinear):
                if self._slots.dora:
                    module = DoraLinear(module, layer.key, self._slots.squares[number])
                else:
                    module = AdaptedLinear(module, layer.key)
                parent, _, leaf = layer.name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, module)
            module.A, module.B = next(parameters), next(parameters)
            if isinstance(module, DoraLinear):
                module.magnitudes = next(parameters)
            module.lanes = self
            module.scaling = self._scaling_of[number]


class AdaptedLinear(nn.Module):
    """A frozen linear layer with an adapter for each lane."""

    A: nn.Parameter  # [n, in, R]
    B: nn.Parameter  # [n, R, out]
    lanes: Lanes
    scaling: Tensor  # [n, 1, 1]

    def __init__(self, base: nn.Module, key: int) -> None:
        super().__init__()
        self.base = base
        # A tensor: as a plain number it would make torch.compile compile every layer anew.
        self.register_buffer("key", torch.tensor(key, dtype=torch.int32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [n*b, S, in] -> [n*b, S, out]
        return self.updated(self.base(x), self.inner(x))

    def inner(self, x: Tensor) -> Tensor:  # [n*b, S, in] -> [n, b*S, R]
        A, dropout = self.A, self.lanes.dropout
        tokens = x.reshape(A.shape[0], -1, x.shape[-1])  # [n, b*S, in]
        if dropout.active:
            tokens = dropout(tokens, self.key)  # type: ignore[arg-type]
        return torch.bmm(tokens, A.to(tokens.dtype))

    def updated(self, frozen: Tensor, inner: Tensor) -> Tensor:
        update = torch.bmm(self.scaled(inner), self.B.to(inner.dtype))
        return frozen + update.view_as(frozen)

    def scaled(self, inner: Tensor) -> Tensor:
        return (inner * self.scaling).to(inner.dtype)


class DoraLinear(AdaptedLinear):
    """With its rows scaled to trained lengths, see dora.py."""

    magnitudes: nn.Parameter  # [n, 1, out]

    def __init__(self, base: nn.Module, key: int, squares: Tensor) -> None:
        super().__init__(base, key)
        self.register_buffer("squares", squares, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        A, B, dropout = self.A, self.B, self.lanes.dropout
        tokens = x.reshape(A.shape[0], -1, x.shape[-1])  # [n, b*S, in]
        # As in PEFT, what is dropped is dropped from the base's part too, as far as that is scaled.
        read = dropout(tokens, self.key) if dropout.active else tokens  # type: ignore[arg-type]
        frozen = product(self.base, read)  # [n, b*S, out]
        inner = (torch.bmm(read, A.to(x.dtype)) * self.scaling).to(x.dtype)
        whole = frozen + torch.bmm(inner, B.to(x.dtype))
        output = (self._factors() * whole).to(x.dtype)
        if dropout.active:
            output = output + (product(self.base, tokens) - frozen)
        if self.base.bias is not None:
            output = output + self.base.bias.to(x.dtype)  # type: ignore[operator]
        return output.view(*x.shape[:-1], output.shape[-1])

    def _factors(self) -> Tensor:
        """Magnitude by length of each row, [n, 1, out]; 1 where a lane has no adapter here."""
        found = lengths(self.base, self.squares, self.A, self.B, self.scaling)  # type: ignore[arg-type]
        return torch.where(self.scaling != 0, self.magnitudes, found) / found


def staged(like: Tensor, values: Sequence[object]) -> Tensor:
    """The values as a tensor of the same type, ready to be copied to its device at once."""
    tensor = torch.tensor(values, dtype=like.dtype)
    return tensor.pin_memory() if like.is_cuda else tensor

"""Programs: how the forward and backward pass of a step run.

Eager: the model's own code, on as many lanes as there are members. In place: the same for one slot,
without a copy of its row or of its gradients. Compiled: its blocks through torch.compile, which
needs a constant shape, so always all lanes. Recorded: the compiled passes as two CUDA graphs; the
loss between them stays ordinary code, for the number of labels varies. Where one adapter's step is
a thousand small kernels, launching them one by one takes longer than they do.

Shapes: n lanes, b blocks per lane, S block length, H hidden size.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.data.reader import Batch
from orchestrator.errors import BaseModelError
from orchestrator.records import StepProgram
from orchestrator.training.attention import document_extents
from orchestrator.training.base_model import (
    LoadedBase,
    difference,
    keep_embedding_on_host,
    max_leak,
    probe,
)
from orchestrator.training.lanes import BASE_ALONE, Lanes, Served
from orchestrator.training.slots import Slots

WARM_UP_PASSES = 3  # as torch.cuda.make_graphed_callables


@torch.no_grad()
def check_lanes(base: LoadedBase, slots: Slots) -> None:
    """Refuse a base whose layers do not see the blocks in their order: one that gathers tokens by
    expert would give a token another lane's adapter. Slot 0 is empty before and after.

    Raises:
        BaseModelError: an adapter in one lane changes another lane's numbers.
    """
    block, other, position_ids = probe(base)
    words, positions = torch.cat([block, other]), position_ids.repeat(2, 1)
    program = EagerProgram(base, slots)
    slots.rows[0].normal_(std=0.1)
    program.serve([BASE_ALONE, BASE_ALONE])
    expected = base.hidden(words, positions)
    program.serve([BASE_ALONE, Served(0, 1.0)])
    found = base.hidden(words, positions)
    slots.clear(0)
    if not expected.isfinite().all():
        return  # the base's own loss will say what is wrong
    if not difference(found[0], expected[0]) <= max_leak(found.dtype):
        raise BaseModelError(
            f"base model family {base.model.config.model_type!r}: its layers mix the tokens of "  # type: ignore[union-attr]
            "different blocks, so adapters cannot share it: set resources.slots_per_pack: 1"
        )


def program_kind(wanted: StepProgram, base: LoadedBase) -> tuple[StepProgram, str]:
    """The kind of program that the base allows, and why it is not the one wanted."""
    if wanted == "graph" and base.why_not_by_document:
        # transformers looks at the positions' values when it makes a mask, which a graph cannot.
        return "compiled", f"no CUDA graph: {base.why_not_by_document}"
    return wanted, ""


class Program(Protocol):
    lanes: Lanes
    num_lanes: int | None
    """Lanes that every pass has; None: as many as are served."""
    blocks_per_lane: int | None
    """Blocks that every lane has; None: any number."""
    frugal: bool
    """Whether memory counts for more than time, between its passes too: see RowEngine.step."""

    def serve(self, served: Sequence[Served]) -> None:
        """What the lanes serve in the passes that follow; lanes beyond it are idle."""
        ...

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states, [n * b, S, H], of the served lanes' blocks."""
        ...

    def backward(self, hidden: Tensor, gradient: Tensor, fresh: Sequence[bool]) -> None:
        """Add to the slots' gradients, from the one by what the last `hidden` returned; those of a
        fresh lane replace what is there."""
        ...


class EagerProgram:
    num_lanes: int | None = None
    blocks_per_lane: int | None = None
    frugal = False

    def __init__(self, base: LoadedBase, slots: Slots, lanes: Lanes | None = None) -> None:
        self._base = base
        self._slots = slots
        self._attach(lanes or Lanes(slots, 1, base.dtype))

    def serve(self, served: Sequence[Served]) -> None:
        if len(served) != len(self.lanes):
            self._attach(Lanes(self._slots, len(served), self._base.dtype))
        self.lanes.serve(served)

    def hidden(self, batch: Batch) -> Tensor:
        put, extents = self._base.on_device, None
        if not self._base.why_not_by_document:
            extents = put(document_extents(batch.position_ids))
        return self._base.hidden(put(batch.input_ids), put(batch.position_ids), extents)

    def backward(self, hidden: Tensor, gradient: Tensor, fresh: Sequence[bool]) -> None:
        self.lanes.add_gradients(_gradients(hidden, self.lanes, gradient), fresh)

    def _attach(self, lanes: Lanes) -> None:
        lanes.attach(self._base.model)
        self.lanes = lanes


class InPlaceProgram(EagerProgram):
    """For one slot, where its memory counts for more than its time: layers read the row itself, and
    autograd adds to the row's gradients, layer by layer.

    A layer casts its part of the row at each use, and its gradient comes back through the cast. So
    the numbers are those of a lane that holds a copy. The input embedding lies on the host, if no
    output head needs it on the GPU: a pass takes a few of its rows (of 70B, 8 MB of 2 GB).
    """

    frugal = True

    def __init__(self, base: LoadedBase, slots: Slots, blocks_per_lane: int) -> None:
        assert len(slots.rows) == 1, "a row can be read in place by one lane"
        self.blocks_per_lane = blocks_per_lane  # an evaluation takes no more at once than training
        if base.device.type != "cpu":
            keep_embedding_on_host(base.model)
        super().__init__(base, slots, Lanes(slots, 1, base.dtype, over_rows=True))
        parts = slots.parts(slots.gradients)
        for parameter, gradient in zip(self.lanes.parameters, parts, strict=True):
            parameter.grad = gradient

    def backward(self, hidden: Tensor, gradient: Tensor, fresh: Sequence[bool]) -> None:
        if fresh[0]:
            self._slots.gradients.zero_()
        torch.autograd.backward(hidden, gradient)


class FixedProgram:
    """Compiled blocks (see compile_blocks) on a constant shape."""

    num_lanes: int | None
    blocks_per_lane: int | None
    frugal = False

    def __init__(
        self,
        base: LoadedBase,
        slots: Slots,
        dropout: bool,
        num_lanes: int,
        blocks_per_lane: int,
        block_length: int,
    ) -> None:
        self.num_lanes, self.blocks_per_lane = num_lanes, blocks_per_lane
        self._base = base
        self._dropout = dropout
        masked_blocks = blocks_per_lane if dropout else None
        self.lanes = Lanes(slots, num_lanes, base.dtype, masked_blocks)
        self.lanes.attach(base.model)
        num_blocks = num_lanes * blocks_per_lane
        # An idle lane's documents have one token each: attention does next to nothing for them.
        self._idle = np.zeros(block_length, dtype=np.int64)
        device = base.device
        self._input_ids = torch.zeros(num_blocks, block_length, dtype=torch.long, device=device)
        self._position_ids = self._input_ids.clone()
        self._extents: Tensor | None = None
        if not base.why_not_by_document:
            shape = (2, num_blocks, block_length)
            self._extents = torch.zeros(shape, dtype=torch.int32, device=device)

    def serve(self, served: Sequence[Served]) -> None:
        dropping = any(lane.drops.rate for lane in served)
        assert self._dropout or not dropping, "the program was built without dropout"
        self.lanes.serve(served)

    def hidden(self, batch: Batch) -> Tensor:
        self._fill(batch)
        return self._forward()[: len(batch.input_ids)]

    def backward(self, hidden: Tensor, gradient: Tensor, fresh: Sequence[bool]) -> None:
        self.lanes.add_gradients(_gradients(hidden, self.lanes, gradient), fresh)

    def _forward(self) -> Tensor:
        return self._base.hidden(self._input_ids, self._position_ids, self._extents)

    def _fill(self, batch: Batch) -> None:
        idle = len(self._input_ids) - len(batch.input_ids)
        positions = np.concatenate([batch.position_ids, np.tile(self._idle, (idle, 1))])
        _copy(self._position_ids, positions)
        _copy(self._input_ids, np.pad(batch.input_ids, ((0, idle), (0, 0))))
        if self._extents is not None:
            _copy(self._extents, document_extents(positions))


class RecordedProgram(FixedProgram):
    """The same, recorded in CUDA graphs. Needs attention by document."""

    def __init__(self, base: LoadedBase, *args: Any) -> None:
        super().__init__(base, *args)
        assert self._extents is not None, base.why_not_by_document
        no_blocks = np.zeros((0, len(self._idle)), dtype=np.int64)
        self._fill(Batch(no_blocks, no_blocks, no_blocks, no_blocks))
        self._warm_up()
        # Another thread may call CUDA meanwhile, and backward passes run in one.
        options: dict[str, Any] = {"capture_error_mode": "thread_local"}
        self._forward_graph = torch.cuda.CUDAGraph()
        options["stream"] = _recording_stream()
        with torch.cuda.graph(self._forward_graph, **options):
            hidden = self._forward()
        self._gradient = torch.zeros_like(hidden)
        self._backward_graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._backward_graph, pool=self._forward_graph.pool(), **options):
            self._parts = _gradients(hidden, self.lanes, self._gradient)
        self._hidden = hidden.detach()

    def hidden(self, batch: Batch) -> Tensor:
        self._fill(batch)
        self._forward_graph.replay()
        return self._hidden[: len(batch.input_ids)]

    def backward(self, hidden: Tensor, gradient: Tensor, fresh: Sequence[bool]) -> None:
        self._gradient[: len(gradient)].copy_(gradient)
        self._gradient[len(gradient) :].zero_()
        self._backward_graph.replay()
        self.lanes.add_gradients(self._parts, fresh)

    def _warm_up(self) -> None:
        """Compile and load every kernel: neither may happen while a graph is recorded."""
        stream = _recording_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                hidden = self._forward()
                _gradients(hidden, self.lanes, torch.zeros_like(hidden))
        torch.cuda.current_stream().wait_stream(stream)


@cache
def _recording_stream() -> torch.cuda.Stream:
    """One for all warm-ups and recordings: cuBLAS keeps a workspace of 32 MiB for each thread and
    stream that ever multiplied, and one made while recording would keep the graph's pool, too."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def compile_blocks(model: nn.Module) -> int:
    """Compile the decoder's blocks, which are all alike, each once for its one shape.

    Returns their number; 0 for a family whose blocks transformers does not mark.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    # Or the first block would be a program of its own: its input alone would need no gradient.
    model.enable_input_require_grads()  # type: ignore[operator]
    blocks = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    # Each block counts as a recompilation of the first where something about it differs, once for
    # training, once for evaluation, and again for each number of lanes. Past the limit it would run
    # uncompiled, and nobody be told.
    config: Any = torch._dynamo.config
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, limit, max(getattr(config, limit), 16 * (len(blocks) + 1)))
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)


def _gradients(hidden: Tensor, lanes: Lanes, gradient: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(hidden, lanes.parameters, gradient)
    return [part.contiguous() for part in found]


def _copy(to: Tensor, array: NDArray[Any]) -> None:
    source = torch.from_numpy(array)
    to.copy_(source.pin_memory() if to.is_cuda else source, non_blocking=True)

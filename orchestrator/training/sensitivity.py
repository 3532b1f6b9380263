"""What each layer's bits cost the base, measured on a few of the training blocks.

In: a base model, its 4-bit settings, a manifest. Out: LayerLoss records. A weight that changes by
d adds about d^2 / 2 times the loss's curvature to the loss, and the curvature is taken as the mean
over the tokens of the squared gradient that the weight would have: squared input of its column
times squared gradient of the loss by its row's output (the diagonal of the empirical Fisher
matrix). So layers are compared by one measure, the loss, and not each by its own size.

Instead of a number for each weight two vectors a layer are kept: the mean squared gradient of each
output, and the mean squared input of each column, where a token counts as much as the gradient that
comes back to it. Without that weight the few tokens whose activations are a thousand times larger
than others', and to which next to no gradient comes back (attention sinks), decide everything.

The base is calibrated at 4 bits, and the weights' errors are then taken layer by layer as they are
read: whoever can train the base at 4 bits can measure it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.data.manifest import fetch_manifest
from orchestrator.data.reader import IGNORED, Batch, BlockReader
from orchestrator.planning.allocation import WIDTHS, LayerLoss
from orchestrator.records import BaseModel, Device
from orchestrator.training.base_model import LoadedBase, load_base_model
from orchestrator.training.codes import quantise
from orchestrator.training.frozen import PackedLinear
from orchestrator.training.loss import losses_and_gradient

# Whether more of them would choose better is not measured.
CALIBRATION_TOKENS = 4096


@dataclass
class _Moments:
    """Sums over tokens, fp64; a token's energy is its gradient's squared length."""

    inputs: Tensor
    """Squared inputs times energy, [in]."""
    gradients: Tensor
    """Squared gradients, [out]; their sum is the energy of all tokens."""
    num_labels: int = 0


def measure_sensitivity(
    base: BaseModel,
    quant: QuantConfig,
    device: Device,
    data_place: str,
    num_tokens: int = CALIBRATION_TOKENS,
) -> list[LayerLoss]:
    """`quant` says how 4 and 8 bits are made; which layer has them is not looked at."""
    uniform = QuantConfig.model_validate(
        quant.model_dump() | {"bit_width": 4, "bit_width_pattern": {}}
    )
    loaded = load_base_model(base, uniform, device, StrategyConfig())
    moments = _moments(loaded, BlockReader(fetch_manifest(data_place, "train")), num_tokens)
    del loaded
    found: list[LayerLoss] = []

    def on_layer(name: str, weight: Tensor, layer: PackedLinear) -> None:
        eight = quantise(weight, 8, uniform).values()
        errors = {4: layer.values() - weight, 8: eight - weight}
        increases = {bits: _increase(error, moments[name]) for bits, error in errors.items()}
        found.append(LayerLoss(name, weight.numel(), increases | {WIDTHS[-1]: 0.0}))

    load_base_model(base, uniform, device, StrategyConfig(), on_layer=on_layer)
    return found


def _increase(error: Tensor, moments: _Moments) -> float:
    inputs = moments.inputs / moments.gradients.sum().clamp_min(1e-300)
    gradients = moments.gradients / max(1, moments.num_labels)
    by_row = error.double().square() @ inputs.to(error.device)
    return float(by_row @ gradients.to(error.device)) / 2


def _moments(base: LoadedBase, reader: BlockReader, num_tokens: int) -> dict[str, _Moments]:
    num_blocks = min(reader.num_blocks, max(1, num_tokens // reader.manifest.block_length))
    # Spread over the whole: neighbours in a file may be of one kind.
    chosen = np.linspace(0, reader.num_blocks - 1, num_blocks).round().astype(int)
    with _watched(base.model) as moments:
        num_labels = sum(_learn(base, reader.blocks([block])) for block in chosen)
    for moment in moments.values():
        moment.num_labels = num_labels
    return moments


def _learn(base: LoadedBase, batch: Batch) -> int:
    """One forward and backward pass for the sum of the labels' losses; returns their number."""
    labels = base.on_device(batch.labels)
    hidden = base.hidden(base.on_device(batch.input_ids), base.on_device(batch.position_ids))
    kept = labels != IGNORED
    count = int(kept.sum())
    if not count:
        return 0
    lanes = torch.zeros(count, dtype=torch.long, device=labels.device)
    weights = torch.ones(1, dtype=base.wide_dtype, device=labels.device)
    _, gradient = losses_and_gradient(hidden[kept], labels[kept], lanes, weights, base.head)
    torch.autograd.backward(hidden[kept], gradient)
    return count


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, _Moments]]:
    """Sums of squares of what goes through the packed layers meanwhile."""
    moments: dict[str, _Moments] = {}
    layers = [
        (name, part) for name, part in model.named_modules() if isinstance(part, PackedLinear)
    ]
    for name, layer in layers:
        place: torch.device = layer.codes.device  # type: ignore[assignment]
        sizes = (layer.in_features, layer.out_features)
        columns, rows = (torch.zeros(n, dtype=torch.float64, device=place) for n in sizes)
        moments[name] = _Moments(columns, rows)
    # The embeddings are frozen: without this nothing would have a gradient.
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    handles = [embeddings.register_forward_hook(lambda *call: call[-1].requires_grad_())]
    handles += [part.register_forward_hook(_watch(moments[name])) for name, part in layers]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def _watch(moments: _Moments) -> Callable[..., None]:
    def on_forward(layer: nn.Module, inputs: Sequence[Any], output: Tensor) -> None:
        (x,) = inputs

        def on_gradient(gradient: Tensor) -> None:
            squares = gradient.double().square().flatten(0, -2)  # [tokens, out]
            moments.gradients += squares.sum(0)
            moments.inputs += squares.sum(1) @ x.detach().double().square().flatten(0, -2)

        output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

    return on_forward

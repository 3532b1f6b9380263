"""What each layer's bits cost the base, measured on a few of the training blocks.

In: a base model, its 4-bit settings, a manifest. Out: LayerLoss records. A weight that changes by
d adds about d^2 / 2 times the loss's curvature to the loss. The curvature is taken as the product
of two means over the blocks' tokens, the squared input of the weight's column and the squared
gradient of the loss by its row's output (the diagonal of K-FAC's Fisher matrix, arXiv:1503.05671).
So layers are compared by one measure, the loss, and not each by its own size.

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
    """Means over tokens, fp64: of the squared inputs [in], of the squared gradients [out]."""

    inputs: Tensor
    gradients: Tensor


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
    by_row = error.double().square() @ moments.inputs.to(error.device)
    return float(by_row @ moments.gradients.to(error.device)) / 2


def _moments(base: LoadedBase, reader: BlockReader, num_tokens: int) -> dict[str, _Moments]:
    num_blocks = min(reader.num_blocks, max(1, num_tokens // reader.manifest.block_length))
    # Spread over the whole: neighbours in a file may be of one kind.
    chosen = np.linspace(0, reader.num_blocks - 1, num_blocks).round().astype(int)
    with _watched(base.model) as moments:
        seen = 0
        for block in chosen:
            batch = reader.blocks([block])
            seen += _learn(base, batch)
    for moment in moments.values():
        moment.inputs /= len(chosen) * reader.manifest.block_length
        moment.gradients /= max(1, seen)
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
        moments[name] = _Moments(
            *(torch.zeros(n, dtype=torch.float64, device=place) for n in sizes)
        )
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
    def squares(tensor: Tensor) -> Tensor:
        return tensor.detach().double().square().flatten(0, -2).sum(0)

    def on_gradient(gradient: Tensor) -> None:
        moments.gradients += squares(gradient)

    def on_forward(layer: nn.Module, inputs: Sequence[Any], output: Tensor) -> None:
        moments.inputs += squares(inputs[0])
        output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

    return on_forward

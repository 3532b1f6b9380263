"""The frozen products of a training step alone: the rate that a pack cannot pass.

Forward and by the input's gradient, of every linear layer of a block and of the output head, each
with weights of its own, one after another and recorded in a CUDA graph where there is a GPU. All
that a step does besides takes no time here: attention, norms, low-rank products, cross entropy,
AdamW. So the rate at K times the tokens over the own single's rate is the most that K slots could
gain, and the rates at both numbers of tokens show what the card itself gains by more of them.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.models import SHAPES, Shape
from benchmarks.own import Measurement
from orchestrator.records import Device
from orchestrator.training.memory import peak_memory_bytes

WARM_UP = 3


def measure(shape_name: str, tokens: int, steps: int, ready: Callable[[], None]) -> Measurement:
    """`tokens`: of all adapters together in a step."""
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.monotonic()
    products = _Products(SHAPES[shape_name], tokens, device)
    load_s = time.monotonic() - started
    started = time.monotonic()
    run = _recorded(products) if device == "cuda" else products
    warm_up_s = _seconds(run, WARM_UP, device)
    ready()
    train_s = _seconds(run, steps, device)
    rate, peak = steps * tokens / train_s, peak_memory_bytes(device)
    return Measurement(rate, train_s, train_s, load_s, warm_up_s, peak)


def layer_sizes(shape: Shape) -> list[tuple[int, int]]:
    """(outputs, inputs) of all frozen products of a forward pass."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = [(query, shape.hidden), (key, shape.hidden), (key, shape.hidden)]
    attention += [(shape.hidden, query)]
    mlp = [(shape.intermediate, shape.hidden)] * 2 + [(shape.hidden, shape.intermediate)]
    return [*(attention + mlp) * shape.layers, (shape.vocab, shape.hidden)]


class _Products:
    def __init__(self, shape: Shape, tokens: int, device: Device) -> None:
        sizes = layer_sizes(shape)
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        first = {size: torch.randn(size, **options) for size in set(sizes)}
        # Of the same values, but at places of their own: no cache holds all of them.
        self._weights = [first[size].clone() for size in sizes]
        widths = {width for size in sizes for width in size}
        self._values = {width: torch.randn(tokens, width, **options) for width in widths}
        self._results = {width: torch.empty(tokens, width, **options) for width in widths}

    def __call__(self) -> None:
        for weight in self._weights:
            outputs, inputs = weight.shape
            torch.mm(self._values[inputs], weight.T, out=self._results[outputs])
        for weight in reversed(self._weights):
            outputs, inputs = weight.shape
            torch.mm(self._values[outputs], weight, out=self._results[inputs])


def _recorded(products: _Products) -> Callable[[], None]:
    products()  # cuBLAS chooses its kernels before anything is recorded
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        products()
    return graph.replay


def _seconds(run: Callable[[], None], steps: int, device: Device) -> float:
    started = time.monotonic()
    for _ in range(steps):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - started

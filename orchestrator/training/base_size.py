"""How many weights a loaded base has, and how many bytes they take.

Whole, also where they are packed into fewer elements, or partitioned by ZeRO-3.
"""

import torch
from torch import Tensor, nn

from orchestrator.training.frozen import PackedLinear


def num_values(model: nn.Module) -> int:
    """Weights that the parameters and codes stand for."""
    packed = sum(part.num_weights for part in model.modules() if isinstance(part, PackedLinear))
    return packed + sum(_values_of(parameter) for parameter in model.parameters())


def num_bytes_of(model: nn.Module) -> int:
    """Bytes of all weights, with the constants of quantised ones."""
    tensors = [
        tensor
        for parameter in model.parameters()
        for tensor in (parameter.data, *_quant_tensors(parameter))
    ]
    for part in model.modules():
        if isinstance(part, PackedLinear):
            tensors += part.buffers()
    storages = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    partitioned = (p for p in model.parameters() if hasattr(p, "ds_id"))
    away = sum(whole_shape(p).numel() * p.element_size() for p in partitioned)
    return sum(storages.values()) + away


def note_of_experts(model: nn.Module, num_params: int) -> str:
    """Transformers keeps all experts of a layer in one parameter of three dimensions, which is no
    linear layer."""
    experts = sum(
        whole_shape(parameter).numel()
        for name, parameter in model.named_parameters()
        if ".experts." in name and len(whole_shape(parameter)) == 3
    )
    part = experts / num_params
    words = f"{part:.0%} of its base's weights, the experts, stay at 16 bits and take no adapter"
    return words if experts else ""


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Of one that ZeRO-3 has partitioned, too."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _values_of(parameter: nn.Parameter) -> int:
    """More than it has elements where 4-bit ones are packed into it."""
    state = getattr(parameter, "quant_state", None)
    return (torch.Size(state.shape) if state is not None else whole_shape(parameter)).numel()


def _quant_tensors(parameter: nn.Parameter) -> list[Tensor]:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        scales = getattr(parameter, "SCB", None)
        return [scales] if isinstance(scales, Tensor) else []
    inner = getattr(state, "state2", None)
    tensors = [state.absmax, *([inner.absmax, state.offset] if inner is not None else [])]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]

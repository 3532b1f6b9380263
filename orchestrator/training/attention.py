"""Attention within documents by where they start and end, where the base model allows it.

transformers finds packed documents by their positions and makes a mask of S x S for each block,
under which no fast kernel runs. Here two numbers of each token say what the mask would: no work
between documents, and nothing that depends on the data but one tensor of constant shape. So it can
be recorded in a CUDA graph. The kernels are attention_kernels.py's, their reference is here.

Shapes: B blocks, S block length, H query heads, K key heads, D head width.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.data.packing import document_starts

BY_DOCUMENT = "by_document"


class NotByDocument(Exception):
    """The model's attention is more than ours does."""


# What a config says when a layer's attention is more than causal within a document.
SPECIAL = ("sliding_window", "attn_logit_softcapping", "attention_chunk_size")


def why_not_by_document(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Empty where ours does all that the model's attention does."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    if device.type != "cuda" or dtype != torch.bfloat16:
        return "attention by document needs a GPU and bfloat16"
    if not getattr(model, "_supports_attention_backend", False):
        return f"transformers' {config.model_type} cannot change its attention"
    for name in SPECIAL:
        used = getattr(config, "use_sliding_window", True) if name == "sliding_window" else True
        if getattr(config, name, None) and used:
            return f"{config.model_type} has {name}"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"{config.model_type} has layers of {', '.join(sorted(kinds))}"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return "" if width % 8 == 0 and width <= 256 else f"its heads are {width} wide"


def set_attention(model: nn.Module, name: str) -> str:
    """Let the model's layers use this implementation; returns the one that they used."""
    from transformers import AttentionInterface

    AttentionInterface.register(BY_DOCUMENT, _attend)
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    own: str = config._attn_implementation
    # BY_DOCUMENT is not among those that have a mask: transformers makes none for it.
    config._attn_implementation = name
    return own


def document_extents(position_ids: NDArray[np.int64]) -> NDArray[np.int32]:
    """Where each token's document starts in its block, and where it ends: [2, B, S]."""
    borders = np.flatnonzero(document_starts(position_ids))
    lengths = np.diff(borders, append=position_ids.size)
    starts = borders % position_ids.shape[1]
    extents = np.stack([starts, starts + lengths]).astype(np.int32)
    return np.repeat(extents, lengths, axis=1).reshape(2, *position_ids.shape)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    extents: Tensor,
    **others: Any,
) -> tuple[Tensor, None]:
    for name in ("s_aux", "softcap", "sliding_window", "position_bias"):
        if others.get(name) is not None:
            raise NotByDocument(f"its attention takes {name}")
    if attention_mask is not None:
        raise NotByDocument("its layers make masks of their own")
    if query.shape[-1] != value.shape[-1]:
        raise NotByDocument("its queries and values differ in width")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not query.is_cuda:
        return attend(query, key, value, extents, scale), None
    output: Tensor = torch.ops.orchestrator.attention_by_document(
        query, key, value, extents, scale
    )[0]
    return output, None


def attend(query: Tensor, key: Tensor, value: Tensor, extents: Tensor, scale: float) -> Tensor:
    """The kernels' reference: query [B, H, S, D], key and value [B, K, S, D] -> [B, S, H, D]."""
    starts = extents[0, :, None, :, None]
    places = torch.arange(query.shape[2], device=query.device)
    seen = (starts <= places) & (places <= places[:, None])  # [B, 1, S, S]
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    scores = (query @ key.mT).float() * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


@torch.library.custom_op("orchestrator::attention_by_document", mutates_args=())
def _by_document(
    query: Tensor, key: Tensor, value: Tensor, extents: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    from orchestrator.training import attention_launch

    return attention_launch.forward(query, key, value, extents, scale)


@_by_document.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, extents: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    num_blocks, num_heads, length, width = query.shape
    output = query.new_empty(num_blocks, length, num_heads, width)
    return output, query.new_empty(num_blocks, num_heads, length, dtype=torch.float32)


@torch.library.custom_op("orchestrator::attention_by_document_backward", mutates_args=())
def _by_document_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extents: Tensor,
    output: Tensor,
    normaliser: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from orchestrator.training import attention_launch

    return attention_launch.backward(
        gradient, query, key, value, extents, output, normaliser, scale
    )


@_by_document_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    num_blocks, num_key_heads, length, width = key.shape
    by_key = key.new_empty(num_blocks, length, num_key_heads, width)
    return query.new_empty(gradient.shape), by_key, torch.empty_like(by_key)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # no zeros for the normaliser


def _input_gradients(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
    found = torch.ops.orchestrator.attention_by_document_backward(
        gradient, *ctx.saved_tensors, ctx.scale
    )
    return (*(part.transpose(1, 2) for part in found), None, None)


_by_document.register_autograd(_input_gradients, setup_context=_keep_inputs)

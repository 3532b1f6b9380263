"""Attention within documents by lengths alone, where the base model allows it.

transformers finds packed documents by their positions and makes a mask of S x S for each block,
under which no flash kernel runs. Here the documents of all blocks are one ragged batch: no mask, no
work between documents, and nothing that depends on the data but one tensor of borders. So it can be
recorded in a CUDA graph.

Shapes: B blocks, S block length, H heads, D head width, M room for documents.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.data.packing import document_starts

BY_DOCUMENT = "by_document"


class NotByDocument(Exception):
    """The model's attention is more than the flash kernel does."""


# What a config says when a layer's attention is more than causal within a document.
SPECIAL = ("sliding_window", "attn_logit_softcapping", "attention_chunk_size")


def why_not_by_document(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Empty where the flash kernel does all that the model's attention does."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    if device.type != "cuda" or dtype != torch.bfloat16:
        return "the flash kernel needs a GPU and bfloat16"
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


def document_borders(position_ids: NDArray[np.int64], room: int | None = None) -> NDArray[np.int32]:
    """Where each document starts among all B * S tokens, and then the end.

    With `room`, the end again and again up to room + 1 numbers: documents without tokens.
    """
    starts = np.flatnonzero(document_starts(position_ids))
    borders = np.full((room or len(starts)) + 1, position_ids.size, dtype=np.int32)
    borders[: len(starts)] = starts
    return borders


def _attend(
    module: nn.Module,
    query: Tensor,  # [B, H, S, D]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    borders: Tensor,
    **others: Any,
) -> tuple[Tensor, None]:
    for name in ("s_aux", "softcap", "sliding_window", "position_bias"):
        if others.get(name) is not None:
            raise NotByDocument(f"its attention takes {name}")
    if attention_mask is not None:
        raise NotByDocument("its layers make masks of their own")
    if query.shape[-1] != value.shape[-1]:
        raise NotByDocument("its queries and values differ in width")
    batch, _heads, length, _width = query.shape
    query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    # What torch.nn.attention.varlen calls; that module's own signature differs between versions.
    output: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, borders, borders, length, length, 0.0, True, False, scale=scaling
    )[0]
    return output.view(batch, length, *output.shape[1:]), None

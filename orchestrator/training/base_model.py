"""The frozen base model: loaded once per pack at one bit-width, quantised by bitsandbytes.

In: a BaseModel record and a QuantConfig. Out: a model whose base parameters are frozen, its decoder
and its output head. This is the one place where `bit_width` becomes a library's own words.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.errors import BaseModelError
from orchestrator.records import BaseModel, Device
from orchestrator.training.model_source import local_folder
from orchestrator.training.quiet import quiet_libraries

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class LoadedBase:
    model: nn.Module
    num_params: int
    num_bytes: int
    device: torch.device
    """Where it computes."""

    def hidden(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Last hidden states, [B, S, H]. Positions that start again at 0 start a new document;
        attention does not cross it (transformers finds packed documents by their positions)."""
        decoder = self.model.get_decoder()  # type: ignore[operator]
        output: Tensor = decoder(
            input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False
        ).last_hidden_state
        return output

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden states [n, H]."""
        config: Any = self.model.config
        logits: Tensor = self.model.get_output_embeddings()(hidden)  # type: ignore[operator]
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if divisor := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits


def load_base_model(
    base: BaseModel, quant: QuantConfig, device: Device, strategy: StrategyConfig
) -> LoadedBase:
    """`quant.compute_dtype` must be concrete.

    Raises:
        BaseModelError: the folder holds no causal language model that transformers can load.
    """
    folder = local_folder(base)
    try:
        with quiet_libraries():
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=DTYPES[quant.compute_dtype],
                quantization_config=_quantization_config(quant, strategy),
                device_map={"": _first_place(quant, device, strategy)},
                attn_implementation="sdpa",
                trust_remote_code=base.trust_remote_code,
                local_files_only=True,
            )
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"{base.source}: transformers cannot load it: {error}") from error
    return _prepare(model, device)


def _prepare(model: nn.Module, device: Device) -> LoadedBase:
    """Freeze the model, and keep its quantised weights as they are for ever."""
    model.requires_grad_(False)
    for module in model.modules():
        # On CPUs with AVX512-BF16 an eval-mode forward repacks 4-bit weights with rounded
        # constants, and the way back loses more (bitsandbytes 0.50.2): loss 15.36 -> 19.06.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    model.train()
    num_params = sum(_num_values(parameter) for parameter in model.parameters())
    place = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    return LoadedBase(model, num_params, _num_bytes(model), place)


def enable_recomputation(model: nn.Module) -> None:
    """Gradient checkpointing: keep each block's input, compute the rest again when needed."""
    model.gradient_checkpointing_enable(  # type: ignore[operator]
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )


def _first_place(quant: QuantConfig, device: Device, strategy: StrategyConfig) -> int | str:
    """Where the weights are loaded to."""
    # A base whose parameters ZeRO offloads may be too large for the GPU. A quantised one must pass
    # through it all the same: its constants, which are no parameters, have to stay there.
    offloaded = strategy.offload_params == "cpu" and quant.bit_width == 16
    return 0 if device == "cuda" and not offloaded else "cpu"


def _quantization_config(quant: QuantConfig, strategy: StrategyConfig) -> Any:
    from transformers import BitsAndBytesConfig

    if quant.bit_width == 4:
        compute_dtype = DTYPES[quant.compute_dtype]
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant.quant_type,
            bnb_4bit_use_double_quant=quant.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
            # ZeRO-3 moves parameters about in the base's type, into which 4-bit codes are packed.
            bnb_4bit_quant_storage=compute_dtype if strategy.stage == 3 else None,
        )
    if quant.bit_width == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return None


def _num_values(parameter: nn.Parameter) -> int:
    """Weights that a parameter stands for; 4-bit ones are packed."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


def _num_bytes(model: nn.Module) -> int:
    """Bytes of all weights, with the constants of quantised ones."""
    storages: dict[int, int] = {}
    for parameter in model.parameters():
        for tensor in (parameter.data, *_quant_tensors(parameter)):
            storages[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(storages.values())


def _quant_tensors(parameter: nn.Parameter) -> list[Tensor]:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        scales = getattr(parameter, "SCB", None)
        return [scales] if isinstance(scales, Tensor) else []
    inner = getattr(state, "state2", None)
    tensors = [state.absmax, *([inner.absmax, state.offset] if inner is not None else [])]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]

"""Layers are quantised as transformers reads them, one at a time, each at its own bits.

A quantiser of transformers' own kind. The file's tensor of a layer is read when its turn comes, is
quantised where it will stay, and is let go of before the next: the host holds one layer in full,
never the model. Layers that a cache has are not read from the file at all. Imports transformers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from orchestrator.config import QuantConfig
from orchestrator.errors import BaseModelError, ConfigError, OrchestratorError
from orchestrator.planning.bits import bits_of, stored_bits
from orchestrator.planning.compatibility import conv1d_refusal
from orchestrator.planning.patterns import unmatched
from orchestrator.training.codes import Codes, quantise
from orchestrator.training.frozen import PackedLinear, decoder_modules
from orchestrator.training.quantised_cache import QuantisedCache

METHOD = "orchestrator"

OnLayer = Callable[[str, Tensor, PackedLinear], None]
"""Is given each quantised layer's name, its weight in the arithmetic's type, and what was made."""


class LayerByLayer(QuantizationConfigMixin):  # type: ignore[misc]
    """What from_pretrained takes as its quantization_config."""

    def __init__(
        self,
        quant: QuantConfig,
        on_layer: OnLayer | None = None,
        cache: QuantisedCache | None = None,
    ) -> None:
        self.quant_method = METHOD
        self.quant = quant
        self.on_layer = on_layer
        self.cache = cache
        self.failed: Exception | None = None
        """By what the first layer failed that did: transformers goes on with the others, and says
        at the end no more than that there was something."""

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "quant": self.quant.model_dump(mode="json")}

    def __deepcopy__(self, memo: Any) -> "LayerByLayer":
        return self  # transformers copies configurations; a callback's state must stay one


@register_quantizer(METHOD)
class LayerQuantiser(HfQuantizer):  # type: ignore[misc]
    quantization_config: LayerByLayer

    def __init__(self, quantization_config: LayerByLayer, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.widths: dict[str, int] = {}
        self._known: dict[str, Codes] = {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        quant = self.quantization_config.quant
        if any(isinstance(module, Conv1D) for module in model.modules()):
            raise BaseModelError(conv1d_refusal(quant, "replicated"))
        kept = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        names = [
            name
            for name, module in decoder_modules(model)
            if type(module) is nn.Linear and should_convert_module(name, kept)
        ]
        if idle := unmatched(quant.bit_width_pattern, names):
            endings = sorted({name.rpartition(".")[2] for name in names})
            raise ConfigError(
                f"quant.bit_width_pattern: {idle[0]!r} matches no linear layer of the base "
                f"model; it has {', '.join(endings)}"
            )
        for name in names:
            bits = bits_of(quant, name)
            assert bits is not None, f"no bits were chosen for {name}"
            self.widths[name] = bits
        if self.quantization_config.cache is not None:
            self._look_into(self.quantization_config.cache, model)

    def _look_into(self, cache: QuantisedCache, model: nn.Module) -> None:
        # A callback is to see each layer's weight.
        if self.quantization_config.on_layer is None and (known := cache.read(self.widths)):
            self._known = known
            for name in known:
                model.set_submodule(name, _Awaited(model.get_submodule(name)))
            return
        quant = self.quantization_config.quant
        num_bytes = 0.0
        for name, bits in self.widths.items():
            if bits != 16:
                num_weights = model.get_parameter(f"{name}.weight").numel()
                num_bytes += num_weights * stored_bits(quant, bits) / 8
        cache.begin(self.widths, round(num_bytes))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        layer, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and layer in self.widths

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        if not self.param_needs_quantization(model, param_name):
            return float(param.element_size())
        bits = self.widths[param_name.rpartition(".")[0]]
        return stored_bits(self.quantization_config.quant, bits, param.element_size()) / 8

    def get_quantize_ops(self) -> "_Quantise":
        return _Quantise(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        cache = self.quantization_config.cache
        while self._known:  # the model holds on to its quantiser, which must not hold on to codes
            self._put(model, *self._known.popitem())
        # A checkpoint that fuses layers of different bits has one conversion for all of them.
        for name in self.widths:
            module = model.get_submodule(name)
            if self.widths[name] != 16 and not isinstance(module, PackedLinear):
                self.replace(model, name, module.weight.data)
                self.fused_with_plain_ones()
        if cache is not None:
            cache.finish()
        self.remove_quantization_config(model)

    def fused_with_plain_ones(self) -> None:
        """A file's tensor holds a layer in codes and one of 16 bits: it must be read each time."""
        if self.quantization_config.cache is not None:
            self.quantization_config.cache.abandon("the files fuse layers of 16 bits with others")

    def replace(self, model: nn.Module, name: str, weight: Tensor) -> None:
        config = self.quantization_config
        codes = quantise(weight, self.widths[name], config.quant)
        packed = self._put(model, name, codes)
        if config.cache is not None:
            config.cache.write(name, codes)
        if config.on_layer is not None:
            config.on_layer(name, weight, packed)

    def _put(self, model: nn.Module, name: str, codes: Codes) -> PackedLinear:
        packed = PackedLinear(codes, model.get_submodule(name).bias)  # type: ignore[arg-type]
        packed._is_hf_initialized = True  # type: ignore[assignment]
        model.set_submodule(name, packed)
        return packed

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Awaited(nn.Module):
    """In the place of a layer whose codes are known: without a weight for transformers to read."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.bias = layer.bias
        self._is_hf_initialized = True


class _Quantise(ConversionOps):  # type: ignore[misc]
    """What transformers does with a tensor that it has read."""

    def __init__(self, quantiser: LayerQuantiser) -> None:
        self._quantiser = quantiser

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        assert model is not None
        config = self._quantiser.quantization_config
        if config.failed is not None:
            raise config.failed
        try:
            return self._converted(input_dict, model, missing_keys)
        except (MemoryError, OrchestratorError, OSError, RuntimeError, ValueError) as error:
            config.failed = error
            raise

    def _converted(
        self, input_dict: dict[str, Any], model: nn.Module, missing_keys: set[str] | None
    ) -> dict[str, Tensor]:
        plain = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            layer = name.removesuffix(".weight")
            if self._quantiser.widths.get(layer, 16) == 16:
                plain[name] = weight
                continue
            self._quantiser.replace(model, layer, weight)
            if missing_keys is not None:
                missing_keys.discard(name)
        if 0 < len(plain) < len(input_dict):
            self._quantiser.fused_with_plain_ones()
        return plain

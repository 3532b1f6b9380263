"""A base for ZeRO-3, partitioned as transformers reads it: each parameter when it gets its place.

In: a strategy. Out: DeepSpeed's parameters, of which a worker holds its own part and no more. What
the files hold is read as their pages in memory, which the workers of a machine share; a layer of 4
bits is quantised whole on every worker, which keeps all of its constants and a part of its codes.
DeepSpeed itself would send every parameter from worker 0, so that the workers would have to load in
step; here each takes its part of what it has read. Imports transformers.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from orchestrator.config import StrategyConfig
from orchestrator.planning.zero import zero_config
from orchestrator.records import Device
from orchestrator.training.deepspeed_ops import load_op
from orchestrator.training.process_group import start_deepspeed
from orchestrator.training.swap_folder import SwapFolder, check_locked_memory

METHOD = "orchestrator_partitioned"


class Partitioner:
    """Of one base; `strategy` is ZeRO-3."""

    def __init__(
        self, strategy: StrategyConfig, dtype: torch.dtype, device: Device, place: torch.device
    ) -> None:
        """`dtype` is the base's; it computes at `place`.

        Raises:
            StrategyError: parameters cannot be swapped to strategy.nvme_path.
        """
        self._deepspeed = start_deepspeed(device)
        self.place = place
        self.swap_folder: SwapFolder | None = None
        """Of parameters on NVMe."""
        if strategy.offload_params == "nvme":
            load_op("async_io")
            self.swap_folder = SwapFolder.of(strategy)
            strategy = self.swap_folder.named_in(strategy)
        # The adapter, of which there is none yet, has no part in what is read of it here.
        self._config = zero_config(strategy, 1, 1, device)
        # What DeepSpeed swaps it keeps in one type (AsyncPartitionedParameterSwapper): the base's,
        # 4-bit codes' too.
        self._dtype = torch.bfloat16 if dtype == torch.bfloat16 else None

    def begin(self, model: nn.Module) -> None:
        """The model has its layers, and no weights yet.

        Raises:
            StrategyError: this process may not lock the memory that is swapped through.
        """
        if self.swap_folder is not None:
            offload = self._config["zero_optimization"]["offload_param"]
            world_size = self._deepspeed.comm.get_world_size()
            largest = max(_num_stored(parameter) for parameter in model.parameters())
            offload["buffer_size"] = -(-largest // world_size)
            element_bytes = 4 if self._dtype is None else 2
            check_locked_memory(offload["buffer_count"] * offload["buffer_size"] * element_bytes)
        # Given a module, an empty one too, DeepSpeed lets linear layers keep no weight of their own
        # for the backward pass (zero/linear.py).
        with torch.device("cpu"):  # transformers asks while its default is the meta device
            self._init = self._deepspeed.zero.Init(
                module=nn.Module(), config_dict_or_path=self._config, dtype=self._dtype
            )
        # Whether the files hold two weights where one would do transformers sees by comparing them.
        tied: dict[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
        names = {name.rpartition(".")[0] for pair in tied.items() for name in pair}
        self._waiting = {model.get_submodule(name) for name in names}

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Inside, parameters that transformers has read are let go of but for this worker's part.
        The few that no file holds are left whole; DeepSpeed sends them from worker 0."""
        with ExitStack() as failed:
            if self.swap_folder is not None:
                failed.callback(self.swap_folder.remove)
            hook = register_module_parameter_registration_hook(self._on_parameter)
            try:
                yield
            finally:
                hook.remove()
            failed.pop_all()

    def finish(self, model: nn.Module) -> None:
        """Take those that waited to be tied, too; and 4-bit layers keep no codes between a forward
        and its backward pass."""
        for parameter in model.parameters():
            self._take(parameter)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.register_forward_hook(_let_go_of_codes)

    def _on_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if not parameter.is_meta and module not in self._waiting:
            self._take(parameter)

    def _take(self, parameter: nn.Parameter) -> None:
        read = getattr(parameter, "_is_hf_initialized", False)  # set by transformers
        if not read or hasattr(parameter, "ds_id"):
            return
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
        # It is gathered to where it is while it is empty.
        parameter.data = parameter.data.to(self.place)


class _CodesAtUse:
    """Of a layer: those that are gathered when its input's gradient is computed."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __iter__(self) -> Iterator[Tensor | None]:
        yield None  # the input, in bitsandbytes' pair
        yield self._layer.weight.view(-1, 1)  # type: ignore[operator]


def _let_go_of_codes(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    """bitsandbytes keeps a view of the codes for the backward pass, as an attribute that
    recomputation does not reach (0.50, MatMul4Bit.forward): every worker would hold those of all
    layers, whatever DeepSpeed lets go of."""
    node: Any = output.grad_fn
    if hasattr(node, "tensors"):
        node.tensors = _CodesAtUse(layer)


class ReadInParts(BitsAndBytesConfig):  # type: ignore[misc]
    """What from_pretrained takes as its quantization_config; with no options nothing is quantised.
    Where there is a quantiser transformers does not read ahead, which it does in threads."""

    def __init__(self, partitioner: Partitioner, **options: Any) -> None:
        super().__init__(**options)
        self.quant_method = METHOD
        self.partitioner = partitioner
        self.failed: Exception | None = None
        """As LayerByLayer's."""

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}

    def __deepcopy__(self, memo: Any) -> "ReadInParts":
        return self


@register_quantizer(METHOD)
class _PartitioningQuantiser(Bnb4BitHfQuantizer):  # type: ignore[misc]
    quantization_config: ReadInParts

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.quantization_config.load_in_4bit:
            super()._process_model_before_weight_loading(model, **kwargs)
        self.quantization_config.partitioner.begin(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.quantization_config.partitioner.finish(model)
        self.remove_quantization_config(model)

    def get_quantize_ops(self) -> "_QuantiseAtPlace":
        return _QuantiseAtPlace(self)


class _QuantiseAtPlace(Bnb4bitQuantize):  # type: ignore[misc]
    """Where the base computes: what has been read is on the host."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        config: ReadInParts = self.hf_quantizer.quantization_config
        if config.failed is not None:
            raise config.failed
        try:
            moved = {}
            for name, value in input_dict.items():
                weight = value[0] if isinstance(value, list) else value
                moved[name] = weight.to(config.partitioner.place)
            quantised: dict[str, Tensor] = super().convert(moved, **kwargs)
        except RuntimeError as error:
            config.failed = error
            raise
        return quantised


def _num_stored(parameter: nn.Parameter) -> int:
    """Elements that it will have: 4-bit codes are packed into a type of their own."""
    storage: torch.dtype | None = getattr(parameter, "quant_storage", None)
    numel = parameter.numel()
    return numel if storage is None else (numel + 1) // (2 * storage.itemsize)

"""An adapter's update added to its base's weights, layer by layer.

In: an adapter's folder and the base that it was trained on. Out: 16-bit safetensors with all that
transformers needs to load them.

The base's values as trained are merged: of a 4-bit or 8-bit layer those that its codes stand for,
not the ones that were quantised. In memory are the quantised base and one file's worth of merged
weights.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.errors import BaseModelError
from orchestrator.files import read_json, write_file, write_json
from orchestrator.planning.ranks import scaling_of
from orchestrator.records import BaseModel, Device
from orchestrator.training.adapter import PREFIX, WEIGHTS, saved_config
from orchestrator.training.base_model import load_base_model
from orchestrator.training.dora import LEAST_SQUARE
from orchestrator.training.frozen import PackedLinear

ExportType = Literal["bfloat16", "float16"]
DTYPES_16: dict[ExportType, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}

INDEX = "model.safetensors.index.json"
FILE_BYTES = 2 * 2**30
INT8_MAX = 127


def merge(adapter_dir: Path, base_folder: str, to: Path, dtype: ExportType) -> None:
    """Base plus adapter in 16 bits, files of at most 2 GiB, with all that transformers needs."""
    from transformers import AutoTokenizer

    from orchestrator.tracking.adapter_model import end_where_taught

    record = read_json(adapter_dir / "orchestrator.json")
    quant = QuantConfig.model_validate(record["quant"] | {"compute_dtype": record["compute_dtype"]})
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    base = BaseModel(**{**record["base_model"], "folder": base_folder})
    model: Any = load_base_model(base, quant, device, StrategyConfig()).model
    updates = Updates(adapter_dir)
    files = _write_files(to, _merged_tensors(model, updates, DTYPES_16[dtype]))
    if updates.left:
        missing = ", ".join(sorted(updates.left))
        raise BaseModelError(f"{adapter_dir} does not fit its base model: it has no {missing}")
    total = sum((to / name).stat().st_size for name in set(files.values()))
    write_json(to / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = DTYPES_16[dtype]
    config.save_pretrained(to)
    trust = record["base_model"]["trust_remote_code"]
    tokenizer = AutoTokenizer.from_pretrained(base_folder, trust_remote_code=trust)
    end_where_taught(model, tokenizer)
    model.generation_config.save_pretrained(to)
    if record["template"] == "plain":
        tokenizer.chat_template = None
    tokenizer.save_pretrained(to)


class Updates:
    """What an adapter makes of each layer's weight, when it is asked for."""

    def __init__(self, adapter_dir: Path) -> None:
        self._config = saved_config(adapter_dir)
        self._tensors = load_file(adapter_dir / WEIGHTS)
        self.left = {name.removeprefix(PREFIX).split(".lora_")[0] for name in self._tensors}
        """Layers that were not asked for yet."""

    def merged(self, layer: str, weight: Tensor) -> Tensor:
        """[out, in] in fp32; the weight as it is for a layer without an adapter."""
        if layer not in self.left:
            return weight
        self.left.remove(layer)
        A, B = (self._tensors.pop(f"{PREFIX}{layer}.lora_{part}.weight").float() for part in "AB")
        update = (B @ A) * scaling_of(self._config, layer)
        found: Tensor = weight.float() + update.to(weight.device)
        if self._config.use_dora:
            magnitudes = self._tensors.pop(f"{PREFIX}{layer}.lora_magnitude_vector")
            lengths = torch.linalg.vector_norm(found, dim=1).clamp_min(LEAST_SQUARE**0.5)
            found *= (magnitudes.to(found.device) / lengths)[:, None]
        return found


@torch.no_grad()
def _merged_tensors(
    model: nn.Module, updates: Updates, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Every weight once, and every buffer that is of the model's state, such as a router's bias, in
    its own type; under the names of that state."""
    from transformers.pytorch_utils import Conv1D

    seen: set[int] = set()
    for name, module in model.named_modules():
        values = _layer_values(module)
        own = {} if values is None else {"weight": values}
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.data_ptr() not in seen and not (leaf == "weight" and own):
                own[leaf] = parameter.data
            seen.add(parameter.data_ptr())  # tied ones are written once
        for leaf, tensor in own.items():
            merged = updates.merged(name, tensor) if leaf == "weight" else tensor
            if leaf == "weight" and getattr(module, "source_cls", None) is Conv1D:
                merged = merged.T  # as GPT-2's files have it; bitsandbytes has turned it
            yield f"{name}.{leaf}".lstrip("."), merged.to("cpu", dtype).contiguous()
        if values is None:  # constants of quantisation are buffers, too
            for leaf, buffer in module.named_buffers(recurse=False):
                if leaf not in module._non_persistent_buffers_set:
                    yield f"{name}.{leaf}".lstrip("."), buffer.to("cpu").contiguous()


def _layer_values(module: nn.Module) -> Tensor | None:
    """What a quantised layer's codes stand for; None where the weight itself is it."""
    if isinstance(module, PackedLinear):
        return module.values()
    if hasattr(module, "init_8bit_state"):  # bitsandbytes' Linear8bitLt
        weight: Any = module.weight
        state: Any = module.state
        # The first forward pass moves them from the weight to the state.
        scales = state.SCB if weight.SCB is None else weight.SCB
        values: Tensor = weight.data.float() * (scales.float()[:, None] / INT8_MAX)
        return values
    return None


def _write_files(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> dict[str, str]:
    """File of each tensor. A file is written as soon as it is full."""
    where: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    held_bytes = 0

    def flush() -> None:
        file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        content = dict(held)
        write_file(folder / file, lambda path: save_file(content, path, metadata={"format": "pt"}))
        where.update(dict.fromkeys(held, file))
        held.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and held_bytes + size > FILE_BYTES:
            flush()
            held_bytes = 0
        held[name] = tensor
        held_bytes += size
    flush()
    return where

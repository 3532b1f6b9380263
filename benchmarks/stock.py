"""Tokens per second of one adapter trained the usual way, with PEFT and bitsandbytes.

QLoRA's recipe: prepare_model_for_kbit_training, gradient checkpointing unless the caller does
without, bf16 autocast, gradient clipping; which optimizer, the caller says. A 16-bit base is not
prepared for k-bit training, which would turn it to fp32; it gets gradient checkpointing alone.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.own import ALPHA, RANK, WARM_UP_STEPS, Measurement
from orchestrator.records import Device
from orchestrator.training.memory import peak_memory_bytes


def measure(
    folder: Path,
    bit_width: int,
    tokens: int,
    optimizer_name: str,
    steps: int,
    ready: Callable[[], None],
    checkpointing: bool = True,
) -> Measurement:
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.monotonic()
    model = load_for_training(folder, bit_width, RANK, ALPHA, checkpointing)
    load_s = time.monotonic() - started
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[optimizer_name](parameters, 1e-4)
    shape = (1, tokens)
    input_ids = torch.randint(model.config.vocab_size, shape, device=device)

    def train(count: int) -> float:
        started = time.monotonic()
        for _ in range(count):
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - started

    warm_up_s = train(WARM_UP_STEPS)
    ready()
    train_s = train(steps)
    return Measurement(
        steps * tokens / train_s, train_s, train_s, load_s, warm_up_s, peak_memory_bytes(device)
    )


def load_for_training(
    folder: Path, bit_width: int, rank: int, alpha: float, checkpointing: bool = True
) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = load_base(folder, bit_width)
    recompute = {"use_reentrant": False}
    if bit_width == 4:
        model = prepare_model_for_kbit_training(model, checkpointing, recompute)
    elif checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=recompute)
        model.enable_input_require_grads()
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config).train()


def load_base(folder: Path, bit_width: int) -> Any:
    """By transformers and bitsandbytes alone: NF4 with double quantisation, LLM.int8, or bf16."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quant = None
    if bit_width == 4:
        quant = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if bit_width == 8:
        quant = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=quant,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        local_files_only=True,
    )


def _adamw(parameters: list[torch.nn.Parameter], rate: float) -> Any:
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)


def _paged_adamw_8bit(parameters: list[torch.nn.Parameter], rate: float) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.PagedAdamW8bit(parameters, lr=rate, weight_decay=0.0)


# The same as orchestrator.training.optimizers gives by these names.
OPTIMIZERS = {"adamw": _adamw, "paged_adamw_8bit": _paged_adamw_8bit}

"""Tokens per second of K adapters in one pack, against stock PEFT + bitsandbytes one at a time.

    python -m benchmarks.packs --model FOLDER --name packs_gpu --tokens 1024 --slots 1 4 16
    python -m benchmarks.packs --model FOLDER --name packs_cpu --tokens 64 --slots 1 8 --steps 3

The stock recipe is QLoRA's: prepare_model_for_kbit_training, gradient checkpointing, paged 8-bit
AdamW, bf16. Both sides train rank-16 adapters on all linear layers, on random tokens, in one run.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.recording import Bar, record
from orchestrator.config import AdapterConfig, OptimizerConfig, QuantConfig, StrategyConfig
from orchestrator.records import BaseModel, Device
from orchestrator.training.base_model import LoadedBase, load_base_model
from orchestrator.training.engine import RowStepper
from orchestrator.training.loss import slot_losses
from orchestrator.training.slots import Slots, scaling

ADAPTER = AdapterConfig(rank=16, alpha=32)
OPTIMIZER = OptimizerConfig(name="paged_adamw_8bit")
WARMUP_STEPS = 2


def main() -> None:
    options = _options()
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for bit_width in options.bits:
        for tokens in options.tokens:
            stock = _stock(options.model, bit_width, tokens, device, options.steps)
            rows.append(_row("stock PEFT + bitsandbytes", bit_width, tokens, 1, stock, stock))
            for num_slots in options.slots:
                base = _base(options.model, bit_width, device)
                step = pack_step(base, num_slots, tokens, device)
                rate = num_slots * tokens / _seconds(step, options.steps, device)
                rows.append(_row("pack", bit_width, tokens, num_slots, rate, stock))
                del base, step
                if device == "cuda":
                    torch.cuda.empty_cache()
    bars = {}
    if options.goal:
        best = max(row["ratio_to_stock"] for row in rows)
        bars["best ratio to stock"] = Bar(best, options.goal)
    print(record(options.name, rows, bars))


def pack_step(base: LoadedBase, num_slots: int, tokens: int, device: Device) -> Callable[[], None]:
    """One optimizer step of every slot, each on one block of `tokens`."""
    slots = Slots(base.model, "all-linear", num_slots, ADAPTER.rank, device)
    for slot in range(num_slots):
        slots.open(slot, ADAPTER, seed=slot)
    steppers = [
        RowStepper(slots.rows[slot], slots.gradients[slot], OPTIMIZER) for slot in range(num_slots)
    ]
    input_ids = _random_tokens(base.model, num_slots, tokens, device)
    positions = torch.arange(tokens, device=device).repeat(num_slots, 1)
    owners = torch.arange(num_slots, device=device).repeat_interleave(tokens)
    weights = torch.full((num_slots,), 1 / tokens, device=device)
    slots.activate(range(num_slots), [scaling(ADAPTER)] * num_slots)

    def step() -> None:
        hidden = base.hidden(input_ids, positions).flatten(0, 1)
        losses = slot_losses(hidden, input_ids.flatten(), owners, weights, base.head)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        for stepper in steppers:
            stepper.step(1e-4)

    return step


def _stock(folder: str, bit_width: int, tokens: int, device: Device, steps: int) -> float:
    """Tokens per second of one adapter trained the usual way."""
    import bitsandbytes
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    base = _base(folder, bit_width, device).model
    prepared = prepare_model_for_kbit_training(base, use_gradient_checkpointing=True)
    config = LoraConfig(r=ADAPTER.rank, lora_alpha=ADAPTER.alpha, target_modules="all-linear")
    model = get_peft_model(prepared, config)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = bitsandbytes.optim.PagedAdamW8bit(parameters, lr=1e-4)
    input_ids = _random_tokens(base, 1, tokens, device)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return tokens / _seconds(step, steps, device)


def _base(folder: str, bit_width: int, device: Device) -> LoadedBase:
    quant = QuantConfig.model_validate({"bit_width": bit_width, "compute_dtype": "bfloat16"})
    return load_base_model(
        BaseModel(folder, None, folder, "benchmark"), quant, device, StrategyConfig()
    )


def _random_tokens(model: Any, blocks: int, tokens: int, device: Device) -> torch.Tensor:
    generator = torch.Generator(device=device).manual_seed(0)
    shape = (blocks, tokens)
    return torch.randint(model.config.vocab_size, shape, device=device, generator=generator)


def _seconds(step: Callable[[], None], steps: int, device: Device) -> float:
    """Median wall seconds of a step."""
    times = []
    for number in range(WARMUP_STEPS + steps):
        started = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= WARMUP_STEPS:
            times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def _row(
    who: str, bit_width: int, tokens: int, num_slots: int, rate: float, stock: float
) -> dict[str, Any]:
    row = {
        "who": who,
        "bit_width": bit_width,
        "tokens_per_adapter": tokens,
        "adapters": num_slots,
        "tokens_per_s": round(rate, 1),
        "ratio_to_stock": round(rate / stock, 2),
    }
    print(row, flush=True)
    return row


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a base model")
    parser.add_argument("--name", required=True, help="of the result file")
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--goal", type=float, default=0.0, help="least best ratio to stock")
    return parser.parse_args()


if __name__ == "__main__":
    main()

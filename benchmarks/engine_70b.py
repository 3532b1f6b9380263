"""Peak memory and time of a step on a base of 70B in 4 bits, on one GPU.

    python -m benchmarks.engine_70b run --rows FILE --program in_place
    python -m benchmarks.engine_70b record --rows FILE

Llama-3-70B's shape with random weights, NF4 with double quantisation, rank 64 on all linear layers,
one block of 512 tokens a step, recomputation, paged 8-bit AdamW. The weights are drawn and
quantised on the GPU layer by layer, as no file of them is at hand; all that follows is the pack
worker's own. `device` is what the driver counts for this process, read every millisecond: torch's
memory, paged states that lie on the GPU, the CUDA context.
"""

import argparse
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import own
from benchmarks.blocks import prepare_blocks
from benchmarks.memory_cases import Case, expected
from benchmarks.memory_part import pack_spec
from benchmarks.models import SHAPES, llama_config, save_tokenizer
from benchmarks.recording import (
    Bar,
    Row,
    add_record_action,
    append_row,
    environment,
    parser_of_actions,
    read_rows,
    record,
)
from orchestrator.config import EvaluationConfig, QuantConfig, StrategyConfig, TrialConfig
from orchestrator.planning.memory import GIB
from orchestrator.records import Device, Progress, TrialDone
from orchestrator.training.base_model import LoadedBase, made_ready
from orchestrator.training.codes import quantise
from orchestrator.training.frozen import PackedLinear
from orchestrator.training.loftq import Corrections
from orchestrator.training.memory import driver_handle
from orchestrator.training.pack import PackWorker

RANK, TOKENS, OPTIMIZER = 64, 512, "paged_adamw_8bit"
MOST_GIB = 46
INITIAL_STD = 0.02
SAMPLE_S = 0.001
# The driver tells less of an idle GPU, and more of one with a worker on it.
MOST_BEFORE_BYTES = GIB


def main() -> None:
    options = _options()
    if options.action == "record":
        rows = read_rows(options.rows)
        print(record(options.name, rows, bars(rows)))
        return
    append_row(options.rows[0], _measured(options) | {"environment": environment()})


def bars(rows: list[Row]) -> dict[str, Bar]:
    least = min(row["device_bytes"] for row in rows if row["shape"] == "70b")
    title = "GiB on the device at the peak, at most"
    return {title: Bar(round(least / GIB, 2), MOST_GIB, at_most=True)}


class RandomBaseWorker(PackWorker):
    """Its base has a configuration, and no weights in files."""

    def _load_base(self, strategy: StrategyConfig, corrections: Corrections) -> LoadedBase:
        quant = QuantConfig.model_validate(self.spec.quant)
        model = _random_model(Path(self.spec.base_model.folder), quant)
        return made_ready(model, quant, self.spec.device, strategy)


def _random_model(folder: Path, quant: QuantConfig) -> Any:
    """Drawn where it trains; one layer at a time is there in full."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if quant.compute_dtype == "bfloat16" else torch.float32
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            weight = torch.empty(module.weight.shape, device=device, dtype=dtype)
            weight.normal_(std=INITIAL_STD)
            model.set_submodule(name, PackedLinear(quantise(weight, 4, quant), None))
    for name, parameter in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        values = torch.ones(parameter.shape, device=device, dtype=dtype)
        if parameter.ndim > 1:
            values.normal_(std=INITIAL_STD)
        setattr(model.get_submodule(module), leaf, nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    return model


def _measured(options: argparse.Namespace) -> Row:
    shape = SHAPES[options.shape]
    cuda = torch.cuda.is_available()
    device: Device = "cuda" if cuda else "cpu"
    case = Case(
        options.shape,
        4,
        False,
        RANK,
        1,
        1,
        TOKENS,
        True,
        False,
        OPTIMIZER,
        options.program,
        None,
        "none",
        "none",
    )
    with tempfile.TemporaryDirectory() as temporary, _sampled() as device_bytes:
        folder = Path(temporary)
        llama_config(shape).save_pretrained(folder / "base")
        save_tokenizer(folder / "base")
        shards = prepare_blocks(folder / "data", folder / "base", TOKENS)
        spec = pack_spec(case, folder / "base", shards, device)
        every_step = EvaluationConfig(batch_size=1, every_steps=1)  # is when losses are told
        worker = RandomBaseWorker(replace(spec, evaluation=every_step))
        ready = worker.load()
        trial = TrialConfig.model_validate(
            {
                "adapter": {"rank": RANK, "alpha": RANK},
                "optimizer": {"name": OPTIMIZER},
                "steps": options.steps,
                "batch_size": 1,
                "gradient_checkpointing": True,
            }
        )
        events = own.train(worker, [trial], folder)
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    losses = [event.train_loss for event in events if isinstance(event, Progress)]
    return {
        "shape": options.shape,
        "program": worker.programs.kind,
        "bit_width": 4,
        "rank": RANK,
        "adapter_params": done.num_adapter_params,
        "tokens": TOKENS,
        "optimizer": OPTIMIZER,
        "load_s": round(ready.load_s, 1),
        "step_s": round(done.train_s / done.steps, 3),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "device_bytes": max(device_bytes),
        "torch_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else 0,
        "torch_allocated_bytes": worker.memory.tensor_bytes if cuda else 0,
        "expected_bytes": expected(case, shape, "cuda").total_bytes,
    }


@contextmanager
def _sampled() -> Iterator[list[int]]:
    """Bytes that the driver counts beyond those of before this process had a CUDA context, while
    the `with` block lasts."""
    found = [0]
    if not torch.cuda.is_available():
        yield found
        return
    import pynvml

    over = threading.Event()
    used_before = _used_bytes()
    with driver_handle() as handle:
        before = used_before[pynvml.nvmlDeviceGetUUID(handle)]
        if before > MOST_BEFORE_BYTES:  # what others give back meanwhile would be missing
            raise SystemExit(f"another process has {before / GIB:.1f} GiB of the GPU: end it first")

        def sample() -> None:
            while not over.wait(SAMPLE_S):
                found[0] = max(found[0], pynvml.nvmlDeviceGetMemoryInfo(handle).used - before)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield found
        finally:
            over.set()
            thread.join()


def _used_bytes() -> dict[str, int]:
    """By each GPU's UUID."""
    import pynvml

    pynvml.nvmlInit()
    handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    used = {
        pynvml.nvmlDeviceGetUUID(handle): pynvml.nvmlDeviceGetMemoryInfo(handle).used
        for handle in handles
    }
    pynvml.nvmlShutdown()
    return used


def _options() -> argparse.Namespace:
    parser, actions = parser_of_actions(__doc__)
    run = actions.add_parser("run")
    run.add_argument("--shape", default="70b")
    run.add_argument("--program", default="in_place")
    run.add_argument("--steps", type=int, default=6)
    run.add_argument("--rows", type=Path, nargs=1, required=True)
    add_record_action(actions, "engine_70b")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""One worker of two that train cells of `benchmarks.engine_zero_matrix`, one after another.

    python -m benchmarks.zero_cells --world-rank 0 --init-method URL --work FILE.json

Worker 0 trains each cell's reference by itself, replicated, and writes a row for each cell.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import own
from benchmarks.recording import Row, append_row, environment
from benchmarks.stock import load_base
from orchestrator.config import EvaluationConfig, TrialConfig
from orchestrator.data.manifest import load_manifest
from orchestrator.data.reader import BlockReader
from orchestrator.records import Device, Evaluated, GroupPlace, Leave, PackSpec, TrialDone
from orchestrator.training.pack import PackWorker
from orchestrator.training.replicas import Alone, Replicas, join

RANK, STEPS, BATCH, EVERY = 16, 8, 2, 4
LEARNING_RATE = 1e-3


class GroupWorker(PackWorker):
    """One of many packs that its process trains with the same partner: it leaves without ending
    their process group, which DeepSpeed joins once."""

    def __init__(self, spec: PackSpec, place: GroupPlace, replicas: Replicas) -> None:
        super().__init__(spec, place)
        self._shared = replicas

    def _join(self) -> Replicas:
        lent: Any = _Lent(self._shared)
        return lent


class _Lent:
    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replicas, name)

    def close(self) -> None:
        pass


def main() -> None:
    options = _options()
    work = json.loads(options.work.read_text())
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    if work["nvme_path"]:
        os.makedirs(work["nvme_path"], exist_ok=True)
    place = GroupPlace(options.world_rank, 2, options.init_method)
    replicas = join(place, device)
    references: dict[tuple[int, str], list[float]] = {}
    plain: dict[int, PlainPeft] = {}
    for cell in work["cells"]:
        started = time.monotonic()
        bits, optimizer = cell["bit_width"], cell["optimizer"]
        # DeepSpeed's AdamW has no replicated form; it is the same arithmetic as torch's.
        replicated = "adamw" if optimizer == "deepspeed_cpu_adam" else optimizer
        writes = options.world_rank == 0
        if writes and (bits, replicated) not in references:
            alone = _trained(work, bits, {}, replicated, Alone(), GroupPlace(), device)
            references[bits, replicated] = alone[0]
            plain[bits] = plain.get(bits) or PlainPeft(work, bits)
        with tempfile.TemporaryDirectory() as folder:
            curve, done, seconds = _trained(
                work, bits, cell["strategy"], optimizer, replicas, place, device, Path(folder)
            )
            if not writes:
                continue
            again = plain[bits].loss(Path(done.adapter_dir))
        reference = references[bits, replicated]
        row: Row = {
            **cell,
            "state": "trained",
            "losses": [round(loss, 4) for loss in curve],
            "reference": [round(loss, 4) for loss in reference],
            "largest_difference": round(_apart(curve, reference), 4),
            "peft_loss": round(again, 4),
            "peft_difference": round(abs(again - done.eval_loss), 4),
            "step_s": round(seconds, 3),
            "took_s": round(time.monotonic() - started, 1),
        }
        append_row(
            options.rows,
            row | {"environment": environment() | {"hardware": _hardware(work["gpus"])}},
        )


def _trained(
    work: Row,
    bits: int,
    strategy: Row,
    optimizer: str,
    replicas: Replicas,
    place: GroupPlace,
    device: Device,
    folder: Path | None = None,
) -> tuple[list[float], TrialDone, float]:
    """Held-out losses by the way and at the end, the end, and seconds of a step."""
    trial = TrialConfig.model_validate(
        {
            "quant": {"bit_width": bits},
            "adapter": {"rank": RANK, "alpha": 2 * RANK},
            "optimizer": {"name": optimizer, "learning_rate": LEARNING_RATE},
            "strategy": strategy,
            "steps": STEPS,
            "batch_size": BATCH,
            "micro_batch_size": 1,
        }
    )
    pack = own.Pack(Path(work["model"]), Path(work["shards"]), bits, 1, "eager")
    spec = replace(
        own.pack_spec(pack),
        strategy=trial.strategy.model_dump(),
        world_size=place.world_size,
        dequantise_once=False,
        evaluation=EvaluationConfig(every_steps=EVERY, batch_size=4),
    )
    worker = GroupWorker(spec, place, replicas)
    worker.load()
    with tempfile.TemporaryDirectory() as temporary:
        events = own.train(worker, [trial], folder or Path(temporary))
    worker.advance([Leave(save=False)])
    curve = [event.eval_loss for event in events if isinstance(event, Evaluated) and event.step]
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    worker.__dict__.clear()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return curve, done, done.train_s / done.steps


class PlainPeft:
    """The same held-out loss by transformers, bitsandbytes and PEFT alone."""

    def __init__(self, work: Row, bits: int) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._base = load_base(Path(work["model"]), bits)
        self._reader = BlockReader(load_manifest(work["shards"], "held_out"))

    @torch.no_grad()
    def loss(self, adapter: Path) -> float:
        from peft import PeftModel

        model = PeftModel.from_pretrained(self._base, str(adapter)).eval()
        total, count = 0.0, 0
        for index in range(self._reader.num_blocks):
            batch = self._reader.blocks([index])
            ids = torch.from_numpy(batch.input_ids).to(self._device)
            logits: Any = model(input_ids=ids, use_cache=False).logits
            labels = torch.from_numpy(batch.labels).to(self._device).flatten()
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels, reduction="sum"
            )
            total += float(losses)
            count += int((labels >= 0).sum())
        self._base = model.unload()
        return total / count


def _apart(curve: Sequence[float], reference: Sequence[float]) -> float:
    return max(abs(one - other) for one, other in zip(curve, reference, strict=True))


def _hardware(gpus: int) -> str:
    """Each of the two processes sees but one."""
    if not torch.cuda.is_available():
        return "CPU, 2 processes"
    return f"{gpus} x {torch.cuda.get_device_name()}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world-rank", type=int, required=True)
    parser.add_argument("--init-method", required=True)
    parser.add_argument("--work", type=Path, required=True, help="JSON")
    parser.add_argument("--rows", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()

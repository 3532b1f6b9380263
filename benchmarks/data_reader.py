"""How fast packed blocks become batches, from shards in the page cache, on two cores.

    OMP_NUM_THREADS=1 python -m benchmarks.data_reader

Shards of random tokens in documents as long as GSM8K's; the slots of a pack read them in random
order, each its own. `gathered ahead` is how a pack worker reads; `in line` is one thread that
gathers each step when it is asked for. Tokens are counted without padding. Apart from the rate: how
long a round of training waits for its blocks where the training itself takes some time.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.recording import Bar, Row, append_row, environment, read_rows, record
from orchestrator.config import TrialConfig
from orchestrator.data.block_files import write_blocks
from orchestrator.data.manifest import Manifest, Recipe, Repeats
from orchestrator.data.packing import build_blocks
from orchestrator.data.reader import BlockReader
from orchestrator.data.shards import describe_shard
from orchestrator.data.tokenizing import Document
from orchestrator.training.feed import Feed, ReadAhead

CORES = 2
SHARDS = 8
DOCUMENTS_PER_SHARD = 10_000
VOCAB_SIZE = 49_152
SLOTS = 8
GOAL_TOKENS_PER_S = 20e6
ROUND_S = 0.02
WAYS = ("gathered ahead", "in line")


def main() -> None:
    options = _options()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as temporary:
        for block_length in options.block_lengths:
            manifest = _write_shards(Path(temporary) / str(block_length), block_length)
            for batch_size in options.batch_sizes:
                for way in WAYS:
                    row = _measure(manifest, batch_size, way, options.seconds)
                    append_row(Path(temporary) / "rows", row)
        rows = read_rows([Path(temporary) / "rows"])
    print(record(options.name, rows, _bars(rows)))


def _measure(manifest: Manifest, batch_size: int, way: str, seconds: float) -> Row:
    reader = BlockReader(manifest)
    reader.blocks(np.arange(reader.num_blocks))  # verified, mapped, and in the page cache
    tokens_per_s = max(_rate(reader, batch_size, way, seconds) for _ in range(3))
    return {
        "way": way,
        "block_length": manifest.block_length,
        "batch_size": batch_size,
        "slots": SLOTS,
        "shards": len(manifest.shards),
        "blocks": reader.num_blocks,
        "cores": CORES,
        "tokens_per_s": round(tokens_per_s),
        "round_ms": ROUND_S * 1e3,
        "waited_per_round_ms": round(_waited_s(reader, batch_size, way) * 1e3, 3),
        "environment": environment(),
    }


def _rate(reader: BlockReader, batch_size: int, way: str, seconds: float) -> float:
    feed, slots = _open_slots(reader, batch_size)
    tokens = step = 0
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        for slot in slots:
            tokens += slot.take(step).num_tokens
            if way == "gathered ahead":
                slot.fill(step)
        step += 1
    feed.close()
    return tokens / elapsed


def _waited_s(reader: BlockReader, batch_size: int, way: str, rounds: int = 50) -> float:
    feed, slots = _open_slots(reader, batch_size)
    waited = 0.0
    for step in range(rounds):
        started = time.perf_counter()
        for slot in slots:
            slot.take(step)
        waited += time.perf_counter() - started
        if way == "gathered ahead":
            for slot in slots:
                slot.fill(step)
        time.sleep(ROUND_S)  # as a worker waits for its GPU
    feed.close()
    return waited / rounds


def _open_slots(reader: BlockReader, batch_size: int) -> tuple[Feed, Sequence[ReadAhead]]:
    feed = Feed(reader, micro_batch_size=1)
    trials = [
        TrialConfig.model_validate({"seed": seed, "batch_size": batch_size, "steps": 10**9})
        for seed in range(SLOTS)
    ]
    return feed, [ReadAhead(feed, trial) for trial in trials]


def _write_shards(folder: Path, block_length: int) -> Manifest:
    folder.mkdir()
    draw = np.random.default_rng(0)
    records = []
    for index in range(SHARDS):
        documents = [_document(draw, block_length) for _ in range(DOCUMENTS_PER_SHARD)]
        blocks = build_blocks(documents, block_length, pad_id=0, vocab_size=VOCAB_SIZE)
        path = folder / f"train-{index:05d}.safetensors"
        write_blocks(path, blocks)
        records.append(describe_shard(path, blocks, rows=len(documents)))
    recipe = Recipe(settings={}, tokenizer="", train_files=(), held_out_files=())
    return Manifest(folder, "train", block_length, recipe, tuple(records), Repeats(0, 0))


def _document(draw: np.random.Generator, block_length: int) -> Document:
    # GSM8K's question and answer have 40 to 500 SmolLM2 tokens, 190 in the mean.
    length = int(np.clip(draw.lognormal(5.15, 0.4), 40, block_length))
    has_label = np.arange(length) >= length // 3
    has_label[-1] = False
    ids = draw.integers(0, VOCAB_SIZE, length, dtype=np.int32)
    return Document(ids, has_label, draw.bytes(32))


def _bars(rows: Sequence[Row]) -> dict[str, Bar]:
    slowest = min(row["tokens_per_s"] for row in rows if row["way"] == "gathered ahead")
    return {f"tokens/s on {CORES} cores, the slowest case": Bar(slowest, GOAL_TOKENS_PER_S)}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--block-lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 16, 64])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each of three runs")
    parser.add_argument("--name", default="data_reader")
    return parser.parse_args()


if __name__ == "__main__":
    main()

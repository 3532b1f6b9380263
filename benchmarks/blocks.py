"""Synthetic data: texts of random characters, each of which fills one block with loss everywhere.

    python -m benchmarks.blocks FOLDER MODEL TOKENS

They go through the project's own sharding, so that shards, manifests and labels are the real ones.
"""

import json
import random
import string
import sys
from pathlib import Path

from orchestrator.config import DataConfig
from orchestrator.data.prepare import prepare

# A tokenizer with merges makes fewer tokens than characters of random text, but not this few.
CHARACTERS_PER_TOKEN = 4
TRAIN_BLOCKS = 64
CHARACTERS = string.ascii_letters + string.digits + " "


def write_texts(path: Path, blocks: int, tokens: int, seed: int) -> Path:
    """Each text is cut to one block of `tokens` (overlong: truncate)."""
    draw = random.Random(seed)
    texts = (
        "".join(draw.choices(CHARACTERS, k=tokens * CHARACTERS_PER_TOKEN)) for _ in range(blocks)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def data_config(folder: Path, tokens: int, train_blocks: int, held_out_blocks: int) -> DataConfig:
    """Of texts that are written to `folder`."""
    train = write_texts(folder / f"train-{tokens}.jsonl", train_blocks, tokens, seed=1)
    held_out = write_texts(folder / f"held-out-{tokens}.jsonl", held_out_blocks, tokens, seed=2)
    return DataConfig(
        train=str(train),
        held_out=str(held_out),
        format="text",
        block_length=tokens,
        overlong="truncate",
    )


def prepare_blocks(folder: Path, model: Path, tokens: int, held_out_blocks: int = 1) -> Path:
    """The folder of their manifests; one held-out block where evaluation is not looked at."""
    config = data_config(folder, tokens, TRAIN_BLOCKS, held_out_blocks)
    return prepare(config, model, folder).train.folder


if __name__ == "__main__":
    folder, model, tokens = sys.argv[1:]
    print(prepare_blocks(Path(folder), Path(model), int(tokens)))

"""Synthetic data: texts of random characters, one or some of which fill a block with loss
everywhere.

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
SPECIAL_TOKENS = 2  # of a text, at most
TRAIN_BLOCKS = 64
CHARACTERS = string.ascii_letters + string.digits + " "


def write_texts(path: Path, blocks: int, tokens: int, seed: int, documents: int = 1) -> Path:
    """Each text is cut to one block of `tokens` (overlong: truncate); or each is a part of one, in
    tokens of a character, as those of benchmarks/models.py are."""
    draw = random.Random(seed)
    length = tokens * CHARACTERS_PER_TOKEN if documents == 1 else tokens // documents
    length -= 0 if documents == 1 else SPECIAL_TOKENS
    texts = ("".join(draw.choices(CHARACTERS, k=length)) for _ in range(blocks * documents))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def data_config(
    folder: Path, tokens: int, train_blocks: int, held_out_blocks: int, documents: int = 1
) -> DataConfig:
    """Of texts that are written to `folder`."""
    name = f"{tokens}.jsonl" if documents == 1 else f"{tokens}-{documents}.jsonl"
    train = write_texts(folder / f"train-{name}", train_blocks, tokens, 1, documents)
    held_out = write_texts(folder / f"held-out-{name}", held_out_blocks, tokens, 2, documents)
    return DataConfig(
        train=str(train),
        held_out=str(held_out),
        format="text",
        block_length=tokens,
        overlong="truncate",
    )


def prepare_blocks(
    folder: Path, model: Path, tokens: int, held_out_blocks: int = 1, documents: int = 1
) -> Path:
    """The folder of their manifests; one held-out block where evaluation is not looked at."""
    config = data_config(folder, tokens, TRAIN_BLOCKS, held_out_blocks, documents)
    return prepare(config, model, folder).train.folder


if __name__ == "__main__":
    folder, model, tokens = sys.argv[1:]
    print(prepare_blocks(Path(folder), Path(model), int(tokens)))

"""What the data benchmark sets side by side, each a function that does its whole work once.

Raw: the tokenizers library's batch encoding of the same texts, and nothing else. Usual: what
transformers' examples do (run_clm.py): `datasets.map` to tokenise, and again to concatenate and cut
into blocks. Own: a shard's task, from the file to the file.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from orchestrator.data.formats import row_format
from orchestrator.data.keys import KeyRange
from orchestrator.data.selection import Portion
from orchestrator.data.shards import ShardTask, prepare_shard
from orchestrator.data.slices import read_options
from orchestrator.data.sources import PlanTask, plan_file, read_slice
from orchestrator.data.token_ids import remembering
from orchestrator.data.tokenizing import load_tokenizer
from orchestrator.data_config import DataConfig

BATCH = 1000  # texts in a call, as datasets.map has them by itself

Side = Callable[[], None]


def best_seconds(
    sides: dict[str, Side], rounds: int, before_each: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Of each side, by turns: what else the machine does then meets all of them."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, side in sides.items():
            before_each()
            start = time.perf_counter()
            side()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def raw_sides(tokenizer_dir: Path, texts: Sequence[str]) -> dict[str, Side]:
    tokenizer = _raw_tokenizer(str(tokenizer_dir))
    methods = (tokenizer.encode_batch, tokenizer.encode_batch_fast)
    return {f"raw {method.__name__}": _encoding(method, texts) for method in methods}


def _encoding(method: Any, texts: Sequence[str]) -> Side:
    def encode() -> None:
        for first in range(0, len(texts), BATCH):
            method(texts[first : first + BATCH], add_special_tokens=False)

    return encode


def encode_rows(task: ShardTask) -> None:
    """Raw encoding of a shard's texts, where the shard would be made."""
    (portion,) = task.portions
    rows = read_slice(portion.part, read_options(task.config))
    texts = ["".join(row.values()) for _, row in rows if isinstance(row, dict)]
    _encoding(_raw_tokenizer(task.tokenizer_dir).encode_batch_fast, texts)()


@lru_cache(maxsize=1)
def _raw_tokenizer(folder: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(f"{folder}/tokenizer.json")


def shard_tasks(config: DataConfig, tokenizer_dir: Path, place: Path) -> list[ShardTask]:
    """One for each slice of the training file, with all of its rows."""
    (source,) = config.train_sources
    slices = plan_file(PlanTask(source.path, config.slice_bytes))
    form = row_format(config, source)
    return [
        ShardTask(
            (Portion(part, form, KeyRange()),),
            "train",
            index,
            config,
            str(tokenizer_dir),
            str(place),
        )
        for index, part in enumerate(slices)
    ]


def elsewhere(tasks: Iterable[ShardTask], place: Path) -> list[ShardTask]:
    """The same work in an empty place: what is finished is not done again."""
    shutil.rmtree(place, ignore_errors=True)
    return [replace(task, place=str(place)) for task in tasks]


def forget_pre_tokens(tokenizer_dir: Path) -> None:
    """As in a process that has just started: a second round has seen all the words already."""
    remembering.cache_clear()
    remembering(load_tokenizer(str(tokenizer_dir)))


def own_side(tasks: Sequence[ShardTask], place: Path) -> Side:
    def prepare() -> None:
        for task in elsewhere(tasks, place):
            prepare_shard(task)

    return prepare


def usual_side(
    train: Path,
    tokenizer_dir: Path,
    block_length: int,
    folder: Path,
    num_processes: int | None = None,
) -> Side:
    """The file is read before, into the table that `datasets` maps."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    cache = str(folder / "datasets")
    table = datasets.load_dataset("json", data_files=str(train), split="train", cache_dir=cache)
    settings = {"batched": True, "load_from_cache_file": False, "num_proc": num_processes}

    def tokenize(rows: dict[str, list[str]]) -> Any:
        return tokenizer(["".join(texts) for texts in zip(*rows.values(), strict=True)])

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain(*lists)) for name, lists in rows.items()}
        end = len(joined["input_ids"]) // block_length * block_length
        blocks = {
            name: [values[first : first + block_length] for first in range(0, end, block_length)]
            for name, values in joined.items()
        }
        return blocks | {"labels": blocks["input_ids"].copy()}

    def map_twice() -> None:
        files = [str(folder / f"{name}.arrow") for name in ("tokens", "blocks")]
        tokens = table.map(
            tokenize, remove_columns=table.column_names, cache_file_name=files[0], **settings
        )
        tokens.map(group, cache_file_name=files[1], **settings)

    return map_twice

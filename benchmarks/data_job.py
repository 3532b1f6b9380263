"""What the parts of the data benchmark have in common.

In: what the command line asks for. Out: datasets of that size, and rows of results.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.corpus import write_pairs, write_texts
from benchmarks.recording import Row
from orchestrator.data_config import DataConfig, FormatName

FORMATS: dict[FormatName, Callable[[Path, int, Path | None], int]] = {
    "text": write_texts,
    "prompt_completion": write_pairs,
}


@dataclass(frozen=True)
class Job:
    folder: Path
    tokenizer_dir: Path
    gsm8k: Path | None
    shard_bytes: int
    rounds: int

    def dataset(self, form: FormatName, num_bytes: int) -> tuple[DataConfig, Path, float]:
        """A configuration, its training file and that one's megabytes of text."""
        path = self.folder / f"{form}-{num_bytes}.jsonl"
        megabytes = FORMATS[form](path, num_bytes, self.gsm8k) / 1e6
        config = DataConfig(
            train=str(path), format=form, overlong="split", slice_bytes=self.shard_bytes
        )
        return config, path, megabytes


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def timed_row(side: str, megabytes: float, seconds: float, **facts: Any) -> Row:
    measured = {"megabytes": round(megabytes, 2), "seconds": round(seconds, 3)}
    return {"who": side, **facts, **measured, "mb_per_s": round(megabytes / seconds, 3)}

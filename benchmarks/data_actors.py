"""Preparing data on Ray actors: how their number scales, and how much memory one of them takes."""

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.data_job import Job, num_cores, timed_row
from benchmarks.data_sides import elsewhere, encode_rows, shard_tasks
from benchmarks.recording import Row
from cluster.ray_runtime import ray_cluster
from cluster.sharding import RayTasks
from orchestrator.data.prepare import prepare
from orchestrator.data.shards import ShardTask, prepare_shard

SHARDS_PER_ACTOR = 4
WARM_UP_TIMEOUT_S = 120

SIDES: dict[str, Callable[[ShardTask], object]] = {
    "prepare_shard on actors": prepare_shard,
    "raw encode_batch_fast on actors": encode_rows,
}


def scaling(job: Job) -> list[Row]:
    """As many times the shards for as many times the actors. Raw encoding on the same actors shows
    what the machine's cores have to give when all of them are busy."""
    most = num_cores()
    counts = [*(1 << power for power in range((most - 1).bit_length())), most]
    config, _, megabytes = job.dataset("text", job.shard_bytes * SHARDS_PER_ACTOR * most)
    tasks = shard_tasks(config, job.tokenizer_dir, job.folder)
    best: dict[tuple[str, int], float] = {}
    with ray_cluster(None):
        for number in range(job.rounds):
            for count in counts:
                some = elsewhere(tasks[: SHARDS_PER_ACTOR * count], job.folder / "own")
                with RayTasks(count) as pool:
                    _warm_up(pool, count, tasks[0], job.folder / f"warm-{number}-{count}")
                    for side, function in SIDES.items():
                        start = time.perf_counter()
                        list(pool(function, some))
                        seconds = time.perf_counter() - start
                        best[side, count] = min(best.get((side, count), seconds), seconds)
    return [
        timed_row(side, megabytes * count / most, seconds, format="text", cores=count)
        for (side, count), seconds in best.items()
    ]


def memory(job: Job, num_bytes: int) -> list[Row]:
    """All of a preparation's tasks on one actor."""
    config, _, megabytes = job.dataset("text", num_bytes)
    with ray_cluster(None), RayTasks(1) as pool:
        start = time.perf_counter()
        prepare(config, job.tokenizer_dir, job.folder / "memory", pool)
        seconds = time.perf_counter() - start
        (peak,) = pool(_peak_rss_bytes, [None])
    row = timed_row("prepare", megabytes, seconds, format="text", cores=1)
    return [row | {"actor_peak_rss_gb": round(peak / 1e9, 3)}]


@dataclass(frozen=True)
class _WarmUp:
    task: ShardTask
    folder: Path
    """Where each actor says that it is there."""
    num_actors: int


def _warm_up(pool: RayTasks, count: int, task: ShardTask, folder: Path) -> None:
    """Have every actor start, import, load the tokenizer and make a shard."""
    folder.mkdir()
    list(pool(_be_there, [_WarmUp(task, folder, count)] * count))


def _be_there(warm_up: _WarmUp) -> None:
    own = warm_up.folder / str(os.getpid())
    own.touch()
    (task,) = elsewhere([warm_up.task], warm_up.folder / f"{own.name}-shards")
    for function in SIDES.values():
        function(task)
    # Who is done would take the task of one that is still starting.
    end = time.monotonic() + WARM_UP_TIMEOUT_S
    while len([path for path in warm_up.folder.iterdir() if path.is_file()]) < warm_up.num_actors:
        if time.monotonic() > end:
            raise TimeoutError(f"not all of {warm_up.num_actors} actors have started")
        time.sleep(0.05)


def _peak_rss_bytes(_: None) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

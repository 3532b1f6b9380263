"""Which blocks each worker trains in each step, whoever gathers them and whenever."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from orchestrator.config import TrialConfig
from orchestrator.data.manifest import Manifest
from orchestrator.data.order import step_block_indices
from orchestrator.data.reader import Batch, BlockReader
from orchestrator.errors import DataError
from orchestrator.training.feed import GATHERING_THREADS, STEPS_AHEAD, Feed, ReadAhead
from tests.shards import make_document, write_shards

BLOCK_LENGTH = 4
NUM_BLOCKS = 10


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two shards whose blocks have one document each, so that its number is the block's."""
    documents = [make_document(number, BLOCK_LENGTH) for number in range(NUM_BLOCKS)]
    folder = tmp_path_factory.mktemp("shards")
    return write_shards(folder, [documents[:3], documents[3:]], BLOCK_LENGTH)


def trial_config(batch_size: int = 4, seed: int = 0, steps: int = 12) -> TrialConfig:
    return TrialConfig.model_validate({"batch_size": batch_size, "seed": seed, "steps": steps})


def trained_by(feed: Feed, ahead: ReadAhead, trial: TrialConfig, step: int) -> list[list[int]]:
    """The blocks of each micro-batch of a worker's step."""
    batch = ahead.take(step).batch
    num_micros = feed.share(trial) // feed.micro_batch_size
    parts = [feed.part(batch, micro) for micro in range(num_micros)]
    return [part.document_ids[:, 0].tolist() for part in parts]


@given(data=st.data(), seed=st.integers(0, 1000), attempts=st.integers(1, 4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_block_is_trained_once_per_epoch_whatever_dies_and_however_many_workers_go_on(
    manifest: Manifest, data: st.DataObject, seed: int, attempts: int
) -> None:
    """Each attempt has its own number of workers and micro-batch, and dies after some steps."""
    batch_size = data.draw(st.sampled_from([4, 6, 12]))
    trial = trial_config(batch_size, seed, steps=20)
    stream: list[int] = []
    step = 0
    for attempt in range(attempts):
        world_size = data.draw(divisors(batch_size))
        micro_batch_size = data.draw(divisors(batch_size // world_size))
        last = trial.steps if attempt == attempts - 1 else data.draw(st.integers(step, 20))
        feeds = [
            Feed(BlockReader(manifest), micro_batch_size, world_rank, world_size)
            for world_rank in range(world_size)
        ]
        aheads = [ReadAhead(feed, trial) for feed in feeds]
        for now in range(step, last):
            workers = [
                trained_by(feed, ahead, trial, now)
                for feed, ahead in zip(feeds, aheads, strict=True)
            ]
            for ahead in aheads:
                ahead.fill(now)
            for micros in zip(*workers, strict=True):  # what all train at the same time
                for blocks in zip(*micros, strict=True):
                    stream += blocks
        for feed in feeds:
            feed.close()
        step = last
    whole_epochs = len(stream) // NUM_BLOCKS
    for epoch in range(whole_epochs):
        blocks = stream[epoch * NUM_BLOCKS : (epoch + 1) * NUM_BLOCKS]
        assert sorted(blocks) == list(range(NUM_BLOCKS))
    assert stream == expected_stream(trial)


def divisors(number: int) -> st.SearchStrategy[int]:
    return st.sampled_from([n for n in range(1, number + 1) if number % n == 0])


def expected_stream(trial: TrialConfig) -> list[int]:
    steps = [
        step_block_indices(trial.seed, step, trial.batch_size, NUM_BLOCKS)
        for step in range(trial.steps)
    ]
    return [int(block) for step in steps for block in step]


class SlowReader(BlockReader):
    """Notes what it is asked for and by which thread; answers when it is let."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self.asked: list[tuple[list[int], str]] = []
        self.is_asked = threading.Semaphore(0)
        self.may_answer = threading.Event()

    def blocks(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        self.asked.append((np.asarray(indices).tolist(), threading.current_thread().name))
        self.is_asked.release()
        assert self.may_answer.wait(10)
        return super().blocks(indices)


@pytest.fixture
def reader(manifest: Manifest) -> Iterator[SlowReader]:
    reader = SlowReader(manifest)
    yield reader
    reader.may_answer.set()


def step_of(trial: TrialConfig, step: int) -> list[int]:
    return step_block_indices(trial.seed, step, trial.batch_size, NUM_BLOCKS).tolist()


def test_the_next_steps_are_gathered_by_other_threads_each_once(reader: SlowReader) -> None:
    reader.may_answer.set()
    feed, trial = Feed(reader, micro_batch_size=1), trial_config(steps=100)
    ahead = ReadAhead(feed, trial)
    ahead.fill(0)
    for _ in range(STEPS_AHEAD):
        assert reader.is_asked.acquire(timeout=10)
    ahead.fill(0)
    for step in range(1, STEPS_AHEAD + 1):
        ahead.take(step)
    feed.close()
    steps = range(1, STEPS_AHEAD + 1)
    assert sorted(blocks for blocks, _ in reader.asked) == sorted(step_of(trial, n) for n in steps)
    assert all(thread.startswith("feed") for _, thread in reader.asked)


def test_no_step_after_the_last_is_gathered(reader: SlowReader) -> None:
    reader.may_answer.set()
    feed = Feed(reader, micro_batch_size=1)
    ahead = ReadAhead(feed, trial_config(steps=3))
    for step in range(3):
        ahead.take(step)
        ahead.fill(step)
    feed.close()
    assert len(reader.asked) == 3


def test_of_large_steps_one_is_held_ahead(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path, [[make_document(0, 1024)]], 1024)
    reader = SlowReader(manifest)
    feed, trial = Feed(reader, micro_batch_size=1), trial_config(batch_size=1100, steps=100)
    ahead = ReadAhead(feed, trial)
    ahead.fill(0)
    assert reader.is_asked.acquire(timeout=10)
    reader.may_answer.set()
    ahead.take(1)
    feed.gather_later(trial, 50).result()  # whatever waited before it would have begun by now
    feed.close()
    assert len(reader.asked) == 2


def test_a_trial_that_ends_takes_its_waiting_steps_with_it(reader: SlowReader) -> None:
    feed, trial = Feed(reader, micro_batch_size=1), trial_config(steps=100)
    ahead = ReadAhead(feed, trial)
    ahead.fill(0)
    for _ in range(GATHERING_THREADS):
        assert reader.is_asked.acquire(timeout=10)
    ahead.close()
    reader.may_answer.set()
    feed.gather_later(trial, 50).result()
    feed.close()
    expected = [step_of(trial, n) for n in (1, 2, 50)]
    assert sorted(blocks for blocks, _ in reader.asked) == sorted(expected)


def test_a_shard_found_missing_by_another_thread_is_an_error_of_the_training(
    manifest: Manifest, tmp_path: Path
) -> None:
    reader = SlowReader(replace(manifest, folder=tmp_path))
    feed = Feed(reader, micro_batch_size=1)
    ahead = ReadAhead(feed, trial_config())
    ahead.fill(0)
    assert reader.is_asked.acquire(timeout=10)
    reader.may_answer.set()
    with pytest.raises(DataError, match="missing or damaged"):
        ahead.take(1)
    feed.close()

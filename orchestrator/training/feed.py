"""Which blocks a worker trains in a step: its share of the trial's batch, in micro-batches.

The order of blocks is a function of the trial and the step alone (data/order.py); of a step's
blocks, worker r of W takes every W-th from the r-th on. So the next steps can be gathered by other
threads while this one is trained, and nothing of that is ever saved.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from orchestrator.config import TrialConfig
from orchestrator.data.order import step_block_indices
from orchestrator.data.reader import IGNORED, NO_DOCUMENT, Batch, BlockReader

GATHERING_THREADS = 2
# Of each trial. One step would do where every step took its time; an evaluation, a checkpoint or a
# disk that answers late makes some of them wait.
STEPS_AHEAD = 4
BYTES_AHEAD = 32 << 20  # but one step at least
MOST_NAMED = 8  # blocks, in a message


@dataclass(frozen=True, eq=False)
class StepBlocks:
    """All blocks of an optimizer step: the weight of a label depends on all of them."""

    batch: Batch
    num_labels: int
    num_tokens: int
    indices: tuple[int, ...]
    """In the training shards, from 0."""

    @property
    def words(self) -> str:
        """Which they are, for a person; some of them where they are many."""
        named = ", ".join(str(index) for index in self.indices[:MOST_NAMED])
        more = len(self.indices) - MOST_NAMED
        what = "training block" if len(self.indices) == 1 else "training blocks"
        return f"{what} {named}" + (f" and {more} more" if more > 0 else "")


class Feed:
    """Shared by the slots of a worker's pack."""

    def __init__(
        self, reader: BlockReader, micro_batch_size: int, world_rank: int = 0, world_size: int = 1
    ) -> None:
        self.reader = reader
        self.micro_batch_size = micro_batch_size
        self.world_rank = world_rank
        self.world_size = world_size
        self._threads = ThreadPoolExecutor(GATHERING_THREADS, thread_name_prefix="feed")

    def share(self, trial: TrialConfig) -> int:
        """Blocks of a step that this worker trains; a multiple of the micro-batch."""
        at_once = self.micro_batch_size * self.world_size
        assert trial.batch_size % at_once == 0, (
            f"batch_size={trial.batch_size} is no multiple of micro_batch_size x world_size = "
            f"{at_once}"
        )
        return trial.batch_size // self.world_size

    def places(self, micro: int) -> range:
        """Of micro-batch number `micro` of this worker's share: places in the step's batch."""
        start = self.world_rank + micro * self.micro_batch_size * self.world_size
        stop = start + self.micro_batch_size * self.world_size
        return range(start, stop, self.world_size)

    def part(self, batch: Batch, micro: int) -> Batch:
        places = self.places(micro)
        return batch.part(places.start, places.stop, places.step)

    def gather(self, trial: TrialConfig, step: int) -> StepBlocks:
        indices = step_block_indices(trial.seed, step, trial.batch_size, self.reader.num_blocks)
        batch = self.reader.blocks(indices)
        return StepBlocks(
            batch,
            int(np.count_nonzero(batch.labels != IGNORED)),
            int(np.count_nonzero(batch.document_ids != NO_DOCUMENT)),
            tuple(int(index) for index in indices),
        )

    def gather_later(self, trial: TrialConfig, step: int) -> Future[StepBlocks]:
        return self._threads.submit(self.gather, trial, step)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)


class ReadAhead:
    """The blocks of one trial's steps, of which the next ones are gathered ahead of time."""

    def __init__(self, feed: Feed, trial: TrialConfig) -> None:
        self._feed = feed
        self._trial = trial
        positions = trial.batch_size * feed.reader.manifest.block_length
        step_bytes = positions * 4 * 8  # four arrays of int64
        self._steps_ahead = min(STEPS_AHEAD, max(1, BYTES_AHEAD // step_bytes))
        self._gathering: dict[int, Future[StepBlocks]] = {}

    def take(self, step: int) -> StepBlocks:
        """Each step is taken once.

        Raises:
            DataError: as BlockReader.blocks, in whatever thread it happened.
        """
        later = self._gathering.pop(step, None)
        if later is None or later.cancel():  # not begun yet: it would not be sooner elsewhere
            return self._feed.gather(self._trial, step)
        return later.result()

    def fill(self, step: int) -> None:
        """Begin with the steps after this one."""
        end = min(step + 1 + self._steps_ahead, self._trial.steps)
        for ahead in range(step + 1, end):
            if ahead not in self._gathering:
                self._gathering[ahead] = self._feed.gather_later(self._trial, ahead)

    def close(self) -> None:
        for later in self._gathering.values():
            later.cancel()
        self._gathering.clear()

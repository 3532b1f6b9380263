"""Which blocks a worker trains in a step: its share of the trial's batch, in micro-batches.

The order of blocks is a function of the trial and the step alone (data/order.py); of a step's
blocks, worker r of W takes every W-th from the r-th on.
"""

from dataclasses import dataclass

from orchestrator.config import TrialConfig
from orchestrator.data.order import step_block_indices
from orchestrator.data.reader import Batch, BlockReader


@dataclass(frozen=True)
class Feed:
    reader: BlockReader
    micro_batch_size: int
    world_rank: int = 0
    world_size: int = 1

    def share(self, trial: TrialConfig) -> int:
        """Blocks of a step that this worker trains; a multiple of the micro-batch."""
        at_once = self.micro_batch_size * self.world_size
        assert trial.batch_size % at_once == 0, (
            f"batch_size={trial.batch_size} is no multiple of micro_batch_size x world_size = "
            f"{at_once}"
        )
        return trial.batch_size // self.world_size

    def batch(self, trial: TrialConfig, step: int) -> Batch:
        """All blocks of the step: the weight of a label depends on all of them."""
        indices = step_block_indices(trial.seed, step, trial.batch_size, self.reader.num_blocks)
        return self.reader.blocks(indices)

    def places(self, micro: int) -> range:
        """Of micro-batch number `micro` of this worker's share: places in the step's batch."""
        start = self.world_rank + micro * self.micro_batch_size * self.world_size
        stop = start + self.micro_batch_size * self.world_size
        return range(start, stop, self.world_size)

    def part(self, batch: Batch, micro: int) -> Batch:
        places = self.places(micro)
        return batch.part(places.start, places.stop, places.step)

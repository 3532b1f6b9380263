"""What a pack worker holds and computes, as far as it costs memory or time. Pure, no torch."""

from dataclasses import dataclass

from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.planning.shape import Targets
from orchestrator.records import StepProgram

# A row's value and its gradient are fp32, and fp64 under float64; a lane holds a copy of both in
# the arithmetic's type, and with DoRA in the row's.
MIN_ROW_VALUE_BYTES = 4


@dataclass(frozen=True)
class PackLoad:
    quant: QuantConfig
    dtype_bytes: int
    """Of the arithmetic's type."""
    num_slots: int
    max_rank: int
    target_modules: Targets
    optimizer_bytes: float
    """Per adapter parameter: see memory.OPTIMIZER_BYTES."""
    host_optimizer_bytes: float
    """Where the host steps: see memory.HOST_OPTIMIZER_BYTES."""
    micro_batch_size: int
    """Blocks of each slot that this worker takes through one forward pass."""
    evaluation_batch_size: int
    block_length: int
    gradient_checkpointing: bool
    dequantise_once: bool
    dropout: bool
    step_program: StepProgram
    cuda: bool
    strategy: StrategyConfig = StrategyConfig()
    dora: bool = False
    world_size: int = 1
    """Workers that train the pack together, this one among them."""
    generated_tokens: int = 0
    """Of an answer, after a prompt of at most a block; 0: none is generated."""
    generation_batch_size: int = 1
    """Answers that are generated together."""
    kept_layers: int = 0
    """The base's last ones, which gradient_checkpointing leaves out."""

    @property
    def row_value_bytes(self) -> int:
        """Of an adapter's value in its slot's row."""
        return max(MIN_ROW_VALUE_BYTES, self.dtype_bytes)

    @property
    def lane_value_bytes(self) -> int:
        """Of its copy in a lane, and of its gradient."""
        return self.row_value_bytes if self.dora else self.dtype_bytes

    @property
    def eager(self) -> bool:
        """Whether the base's blocks run without torch.compile."""
        return self.step_program in ("eager", "in_place")

    @property
    def in_place(self) -> bool:
        """Whether layers read the slot's row itself, and gradients are added to it at once."""
        return self.step_program == "in_place"

    @property
    def graph(self) -> bool:
        return self.step_program == "graph"

    @property
    def zero(self) -> bool:
        return self.strategy.kind == "zero"

    @property
    def resident(self) -> bool:
        """Whether a base in codes is kept as the values that these stand for."""
        return self.dequantise_once and self.quant.packed

    @property
    def by_document(self) -> bool:
        """Whether attention makes no mask: see training/attention.py."""
        return self.cuda and self.dtype_bytes == 2 and not self.zero

    def recomputed_layers(self, num_layers: int) -> int:
        """Of so many."""
        return num_layers - self.kept_layers if self.gradient_checkpointing else 0

    def layers_at_once(self, num_layers: int) -> int:
        """Whose activations are there as most is held. The first layers are computed again, one at
        a time, once the backward pass has let go of those that were kept."""
        return max(1, num_layers - self.recomputed_layers(num_layers))

    @property
    def training_tokens(self) -> int:
        """Of one forward pass, of all slots."""
        return self.num_slots * self.micro_batch_size * self.block_length

    @property
    def evaluation_tokens(self) -> int:
        # A constant program has one shape, and a step in place no room to spare: they evaluate as
        # many blocks as they train.
        free = self.step_program == "eager"
        blocks = self.evaluation_batch_size if free else self.micro_batch_size
        return self.num_slots * blocks * self.block_length

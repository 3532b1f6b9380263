"""What a pack may do with its worker, the most wanted first.

In: Premises, which all packs of a sweep share, and one pack's PackWish. Out: Options, and what a
worker holds under each. What the user set is not varied. Pure.

This order decides where nobody can say how long each option takes, and between those that take
equally long: see choice.py. Given up in this order where the memory is short: dequantised values;
blocks in a pass, then slots, as long as a pass keeps MIN_PASS_TOKENS; activations, which are
computed again for about half more work, in as few layers as the memory asks for (choice.py); passes
of that size; the compiled step, for one that copies
neither the adapter nor its gradients. Where something makes room for what was given up before it,
that comes back.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

from orchestrator.config import QuantConfig, Recomputation, ResourcesConfig, StrategyConfig
from orchestrator.planning.gpus import Gpu
from orchestrator.planning.load import PackLoad
from orchestrator.planning.shape import BaseShape, Targets, UnknownShape
from orchestrator.records import Device, StepProgram

# On a CPU, K slots on one base gave 1.7 to 2.0 times the tokens per CPU-second at K = 4 to 8 and
# nothing more beyond; each costs memory for its activations.
MAX_AUTO_SLOTS_CPU = 4
MAX_AUTO_SLOTS_GPU = 16
MAX_SLOTS_UNKNOWN = 4
"""Where the memory is not estimated."""
# A pass of fewer tokens may leave a GPU idle between kernels, which can cost more than recomputing.
MIN_PASS_TOKENS = 2048
# (base parameters, tokens). More tokens in one pass make an H200 no faster. With 1,024 tokens per
# adapter a base of 0.5B gains up to K=16 and one of 8B up to 4 to 8 thousand tokens; at 8,192 per
# adapter it gains nothing. A straight line between; not measured above 8B or on other GPUs.
FULL_CARD = ((1e9, 16_384), (7e9, 8_192))
DTYPE_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Premises:
    """What the planner knows of the sweep, its base and its machines."""

    device: Device
    compute_dtype: str
    """What `auto` means here."""
    shape: BaseShape | UnknownShape
    worker_memory_bytes: int
    """Of the GPU, or of a worker's part of its node; the least there is. 0: unknown."""
    max_rank: int
    target_modules: Targets
    dropout: bool
    optimizer_bytes: float
    """Per adapter parameter, of the largest optimizer in the search space."""
    host_optimizer_bytes: float
    """The same where the host steps."""
    block_length: int
    evaluation_batch_size: int
    resources: ResourcesConfig
    memory_fraction: float = 1.0
    """Of each kind's memory, where workers are of several: what may be used of it."""
    memory_limit_bytes: int | None = None
    """That a pack may take of any worker, whatever it has."""
    max_slots_unknown: int = MAX_SLOTS_UNKNOWN
    """Less once a pack whose memory was not estimated has run out of it."""
    generated_tokens: int = 0
    """Of the longest answer that a trial generates; 0: it generates none."""
    generation_batch_size: int = 1
    """Answers that it generates together."""
    in_turn: bool = False
    """Trials start in the order of their numbers, as a pruner's verdicts wait for those before."""
    ran_out: frozenset[tuple[str, int]] = frozenset()
    """(digest of a PackKey, bytes): workers of no more memory ran out with the least that it takes,
    and larger ones are there to try."""
    less: frozenset[tuple[str, str, float]] = frozenset()
    """(digest of a PackKey, kind, part): such packs ran out of memory on such workers, and are
    planned for this part of it."""
    gpu: Gpu | None = None
    """The workers', where its rates are known."""
    host_memory_bytes: int = 0
    """A GPU worker's part of its node's own memory; the least there is. 0: unknown."""
    reach: float = field(default=1.0, compare=False)
    """Times the length that kinds.longest_for finds, where workers are of several kinds: see
    sweep/reach.py. What a pack takes does not depend on it, and is remembered by these premises."""


class Option(NamedTuple):
    num_slots: int
    micro_batch_size: int
    gradient_checkpointing: bool
    dequantise_once: bool
    in_place: bool = False
    kept_layers: int = 0
    """The last ones, where activations are computed again."""


@dataclass(frozen=True)
class PackWish:
    """What one pack is for."""

    quant: QuantConfig
    strategy: StrategyConfig
    alone: str
    """Not empty for a trial that cannot share: says why."""
    share: int
    """Trials that it will train, at once or one after another."""
    num_slots: int | None
    """As set; None to choose."""
    worker_blocks: int
    """Blocks of a trial's step that fall to one worker."""
    micro_batch_size: int | None
    """As set; None to choose a divisor of `worker_blocks`."""
    gradient_checkpointing: Recomputation | None
    """As set; None to choose."""
    dora: bool = False
    world_size: int = 1
    """Workers that train it together."""
    as_set: str = "as set"
    """By whom these two are, in words."""
    kept_layers: int | None = None
    """Where activations are computed again, as set; None to choose."""

    @property
    def zero(self) -> bool:
        return self.strategy.kind == "zero"

    @property
    def may_keep_layers(self) -> bool:
        """Whether to choose how many."""
        return self.kept_layers is None and self.gradient_checkpointing is not True

    @property
    def can_be_resident(self) -> bool:
        return self.quant.packed and not self.zero

    @property
    def only_eager(self) -> str:
        """Whose code must run between the layers, so that they cannot be compiled."""
        if self.zero:
            return "DeepSpeed"
        return "LLM.int8" if self.quant.llm_int8 else ""


def pack_options(premises: Premises, wish: PackWish) -> list[Option]:
    micros = _micro_batches(premises, wish)
    residences = _residences(premises, wish)
    kept = wish.kept_layers or 0
    options = [
        Option(num_slots, micro, recomputes, resident, kept_layers=kept if recomputes else 0)
        for num_slots, micro, recomputes in _passes(premises, wish, micros)
        for resident in residences
    ]
    if _may_go_in_place(premises, wish):
        recomputes = wish.gradient_checkpointing is not False
        options.append(Option(1, micros[-1], recomputes, residences[-1], True, kept))
    return options


def pack_load(premises: Premises, wish: PackWish, option: Option) -> PackLoad:
    program: StepProgram = "in_place" if option.in_place else step_program(premises, wish)
    return load_of(premises, wish.quant, wish.strategy, wish.dora, wish.world_size, option, program)


def load_of(
    premises: Premises,
    quant: QuantConfig,
    strategy: StrategyConfig,
    dora: bool,
    world_size: int,
    option: Option,
    program: StepProgram,
) -> PackLoad:
    """What each worker of a pack holds and computes."""
    written = quant.compute_dtype
    return PackLoad(
        quant=quant,
        dtype_bytes=DTYPE_BYTES[premises.compute_dtype if written == "auto" else written],
        num_slots=option.num_slots,
        max_rank=premises.max_rank,
        target_modules=premises.target_modules,
        optimizer_bytes=premises.optimizer_bytes,
        host_optimizer_bytes=premises.host_optimizer_bytes,
        micro_batch_size=option.micro_batch_size,
        evaluation_batch_size=premises.evaluation_batch_size,
        block_length=premises.block_length,
        gradient_checkpointing=option.gradient_checkpointing,
        dequantise_once=option.dequantise_once,
        dropout=premises.dropout,
        step_program=program,
        cuda=premises.device == "cuda",
        strategy=strategy,
        dora=dora,
        world_size=world_size,
        generated_tokens=premises.generated_tokens,
        generation_batch_size=premises.generation_batch_size,
        kept_layers=option.kept_layers,
    )


def _may_go_in_place(premises: Premises, wish: PackWish) -> bool:
    """As a last resort."""
    free = premises.device == "cuda" and premises.resources.step_program == "auto"
    return free and not wish.zero and wish.num_slots in (None, 1)


def step_program(premises: Premises, wish: PackWish) -> StepProgram:
    """A worker whose base cannot be recorded in a graph falls back by itself, and says so."""
    wanted = premises.resources.step_program
    if wish.only_eager:
        return "in_place" if wanted == "in_place" and not wish.zero else "eager"
    if wanted == "auto":
        return "graph" if premises.device == "cuda" else "eager"
    return wanted


def full_card_tokens(num_params: int) -> int:
    """Tokens in one pass beyond which a GPU gains nothing, for a base of this size."""
    (small, most), (large, least) = FULL_CARD
    position = (num_params - small) / (large - small)
    return round(most + (least - most) * min(1.0, max(0.0, position)))


def max_slots(premises: Premises, micro_batch_size: int) -> int:
    if premises.device == "cpu":
        return MAX_AUTO_SLOTS_CPU
    filling = _useful_tokens(premises) / (micro_batch_size * premises.block_length)
    return max(1, int(min(MAX_AUTO_SLOTS_GPU, filling)))


def balanced_slots(share: int, most: int) -> list[int]:
    """Numbers of slots that train `share` trials in even waves, the largest up to `most` first: 18
    trials with at most 16 at once are two waves of 9, not 16 and 2."""
    waves = range(math.ceil(share / most), share + 1)
    return sorted({math.ceil(share / count) for count in waves}, reverse=True)


def _slot_counts(premises: Premises, wish: PackWish, micro_batch_size: int) -> list[int]:
    if premises.resources.step_program == "in_place":
        return [1]
    if wish.num_slots is not None:
        return [wish.num_slots]
    return balanced_slots(wish.share, max_slots(premises, micro_batch_size))


def _micro_batches(premises: Premises, wish: PackWish) -> list[int]:
    """Blocks in one pass, from the most of which one trial alone gains something."""
    if wish.micro_batch_size is not None:
        return [wish.micro_batch_size]
    blocks = wish.worker_blocks
    divisors = [count for count in range(blocks, 0, -1) if blocks % count == 0]
    useful = _useful_tokens(premises) / premises.block_length
    return [count for count in divisors if count <= useful] or [1]


def _passes(premises: Premises, wish: PackWish, micros: list[int]) -> list[tuple[int, int, bool]]:
    """(slots, blocks of each in a pass, recomputation): passes that are large enough without
    recomputation, then with it; then smaller ones, the largest first."""
    slots = _slot_counts(premises, wish, micros[0])
    most = slots[0] * micros[0]
    sizes = list(itertools.product(slots, micros))
    if premises.gpu is not None:
        # Slots in place of blocks: where a batch of 7 is too large, 1 block alone may be too small.
        # A batch that divides well needs none, and trains each of its trials sooner.
        sizes += [
            (more, micro)
            for larger, micro in itertools.pairwise(micros)
            if larger > 2 * micro
            for more in _slot_counts(premises, wish, micro)
            if more > slots[0] and more * micro <= most
        ]
    enough = min(MIN_PASS_TOKENS / premises.block_length, most)
    large = [size for size in sizes if size[0] * size[1] >= enough]
    small = [size for size in sizes if size[0] * size[1] < enough]
    small.sort(key=lambda size: -size[0] * size[1])
    order = [
        *((*size, recomputes) for recomputes in (False, True) for size in large),
        *((*size, recomputes) for size in small for recomputes in (False, True)),
    ]
    wanted = wish.gradient_checkpointing
    return [choice for choice in order if wanted is None or choice[2] == bool(wanted)]


def _useful_tokens(premises: Premises) -> float:
    if premises.device == "cpu" or isinstance(premises.shape, UnknownShape):
        return math.inf
    return full_card_tokens(premises.shape.num_params)


def _residences(premises: Premises, wish: PackWish) -> tuple[bool, ...]:
    if not wish.can_be_resident:
        return (False,)
    return _or_as_set(premises.resources.dequantise_once, (True, False))


def _or_as_set(setting: bool | None, choices: tuple[bool, ...]) -> tuple[bool, ...]:
    return choices if setting is None else (setting,)

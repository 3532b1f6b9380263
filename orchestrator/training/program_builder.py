"""Builds a pack's program: of the kind that its base allows, with as many lanes as are needed."""

import logging
from collections.abc import Sequence

import torch

from orchestrator.data.reader import BlockReader
from orchestrator.errors import is_out_of_memory
from orchestrator.planning.lanes import lanes_for
from orchestrator.records import PackSpec
from orchestrator.training.base_model import LoadedBase
from orchestrator.training.program import (
    EagerProgram,
    FixedProgram,
    InPlaceProgram,
    Program,
    RecordedProgram,
    compile_blocks,
    program_kind,
)
from orchestrator.training.slots import Slots

log = logging.getLogger(__name__)


class ProgramBuilder:
    def __init__(
        self, spec: PackSpec, base: LoadedBase, slots: Slots, readers: Sequence[BlockReader]
    ) -> None:
        self._spec = spec
        self._base = base
        self._slots = slots
        self._readers = readers
        self.kind, self.note = program_kind(spec.step_program, base)
        if self.kind in ("compiled", "graph") and not compile_blocks(base.model):
            self.kind, self.note = "eager", "its family's blocks are not marked: none was compiled"

    def resized(
        self, program: Program, occupied: int, rounds_left: int, round_s: float
    ) -> int | None:
        """The number of lanes that the program should have instead; None if it has it."""
        if program.num_lanes is None:
            return None
        wanted, reason = lanes_for(
            occupied, program.num_lanes, self._spec.num_slots, rounds_left, round_s
        )
        if wanted == program.num_lanes:
            return None
        log.info("pack %s: %s", self._spec.pack, reason)
        return wanted

    def build(self, num_lanes: int) -> Program:
        """A program with so many lanes; the caller has let go of one before it."""
        if self.kind == "eager":
            return EagerProgram(self._base, self._slots)
        if self.kind == "in_place":
            return InPlaceProgram(self._base, self._slots, self._spec.micro_batch_size)
        torch.cuda.empty_cache()
        if self.kind == "graph":
            try:
                return RecordedProgram(*self._arguments(num_lanes))
            except RuntimeError as error:  # a recording that fails has no type of its own
                if is_out_of_memory(error):
                    raise
                self.kind = "compiled"
                self.note = f"no CUDA graph: {str(error).splitlines()[0]}"
                log.warning("pack %s: %s", self._spec.pack, self.note)
        return FixedProgram(*self._arguments(num_lanes))

    def _arguments(self, num_lanes: int) -> tuple[LoadedBase, Slots, bool, int, int, int]:
        spec = self._spec
        return (
            self._base,
            self._slots,
            spec.dropout,
            num_lanes,
            spec.micro_batch_size,
            self._readers[0].manifest.block_length,
        )

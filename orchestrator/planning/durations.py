"""How long packs take: the speed model over the plans of one sweep.

In: Premises, the GPU of each kind of worker, and factors where packs were measured. Out: seconds.
Pure, no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from orchestrator.config import StrategyConfig
from orchestrator.planning.gpus import Gpu
from orchestrator.planning.lanes import fewest_lanes
from orchestrator.planning.load import PackLoad
from orchestrator.planning.options import DTYPE_BYTES, Premises
from orchestrator.planning.packs import PackPlan
from orchestrator.planning.shape import BaseShape
from orchestrator.planning.speed import start_time, step_time


@dataclass(frozen=True)
class Durations:
    premises: Premises
    shape: BaseShape
    gpus: Mapping[str, Gpu]
    """By the name of the workers' kind."""
    factor: Callable[[str, str], float] = lambda gpu, base: 1.0
    """Of the closed form's seconds, by the GPU's name and PackPlan.base: see measured.py."""
    _known: dict[tuple[object, ...], float] = field(default_factory=dict)

    def block_s(self, plan: PackPlan, occupied: int) -> float:
        """Seconds for one block of each of the trials in so many slots, on each worker."""
        known = (plan.key, plan.kind.name, plan.world_size, plan.fit, occupied)
        if known not in self._known:
            self._known[known] = self._block_s(plan, occupied)
        return self._known[known] * self.factor(self.gpus[plan.kind.name].name, plan.base)

    def start_s(self, plan: PackPlan) -> float:
        return start_time(self.shape, plan_load(plan, self.premises))

    def tokens_per_s(self, plan: PackPlan) -> float:
        """Of a pack with all slots occupied, on all of its workers."""
        tokens = plan.num_slots * self.premises.block_length * plan.world_size
        return tokens / self.block_s(plan, plan.num_slots)

    def _block_s(self, plan: PackPlan, occupied: int) -> float:
        load = plan_load(plan, self.premises)
        lanes = occupied if load.eager else fewest_lanes(occupied, plan.num_slots)
        time = step_time(self.shape, replace(load, num_slots=lanes), self.gpus[plan.kind.name])
        step_blocks = max(plan.fit.micro_batch_size, (plan.key.batch_size or 0) // plan.world_size)
        return time.pass_s / plan.fit.micro_batch_size + time.step_s / step_blocks


def plan_load(plan: PackPlan, premises: Premises) -> PackLoad:
    """What each worker of the pack holds and computes."""
    chosen, written = plan.fit, plan.key.quant.compute_dtype
    return PackLoad(
        quant=plan.key.quant,
        dtype_bytes=DTYPE_BYTES[premises.compute_dtype if written == "auto" else written],
        num_slots=chosen.num_slots,
        max_rank=premises.max_rank,
        target_modules=premises.target_modules,
        optimizer_bytes=premises.optimizer_bytes,
        host_optimizer_bytes=premises.host_optimizer_bytes,
        micro_batch_size=chosen.micro_batch_size,
        evaluation_batch_size=premises.evaluation_batch_size,
        block_length=premises.block_length,
        gradient_checkpointing=chosen.gradient_checkpointing,
        dequantise_once=chosen.dequantise_once,
        dropout=premises.dropout,
        step_program=chosen.step_program,
        cuda=premises.device == "cuda",
        strategy=StrategyConfig.model_validate(dict(plan.key.strategy)),
        dora=plan.key.dora,
        world_size=plan.world_size,
        generated_tokens=premises.generated_tokens,
        generation_batch_size=premises.generation_batch_size,
        kept_layers=chosen.kept_layers,
    )

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
from orchestrator.planning.options import Option, Premises, load_of
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
    key, chosen = plan.key, plan.fit
    option = Option(
        chosen.num_slots,
        chosen.micro_batch_size,
        chosen.gradient_checkpointing,
        chosen.dequantise_once,
        kept_layers=chosen.kept_layers,
    )
    strategy = StrategyConfig.model_validate(dict(key.strategy))
    return load_of(
        premises, key.quant, strategy, key.dora, plan.world_size, option, chosen.step_program
    )

"""A pack of one slot whose gradients, optimizer states and parameters DeepSpeed's ZeRO keeps.

In: a loaded base with its one slot. Out: an Engine (see engine.py). One DeepSpeed engine serves all
trials of the pack: a second one on the same modules would meet the first one's hooks.

The optimizer that DeepSpeed steps is `_TrialOptimizer`: it clips and steps the optimizer of the
present trial on this worker's flat fp32 partition, which is to ZeRO what a row is to `Slots`. So
both ways share their optimizers, their clipping and their checkpoints.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from orchestrator.config import OptimizerConfig, StrategyConfig
from orchestrator.planning.zero import zero_config
from orchestrator.records import Device
from orchestrator.training.engine import Stepper
from orchestrator.training.optimizers import (
    RowOptimizers,
    States,
    clip_and_step,
    num_state_bytes,
    optimizer_states,
    restore_optimizer,
)
from orchestrator.training.process_group import start_deepspeed
from orchestrator.training.program import Program
from orchestrator.training.quiet import quiet_libraries
from orchestrator.training.replicas import Replicas
from orchestrator.training.slots import Slots

Result = TypeVar("Result")

# DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has renamed.
warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", module="torch")


class ZeroEngine:
    in_step = True

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        program: Program,
        strategy: StrategyConfig,
        micro_batch_size: int,
        device: Device,
        replicas: Replicas,
    ) -> None:
        assert len(slots.rows) == 1, "ZeRO serves one slot"
        deepspeed = start_deepspeed(device)
        slots.give_up_gradients()
        self.program = program
        self._slots = slots
        self._replicas = replicas
        self._stage = cast(int, strategy.stage)
        self._optimizer = _TrialOptimizer(program.lanes.parameters, replicas, slots.rows.device)
        config = zero_config(strategy, slots.rows.shape[1], micro_batch_size, device)
        self._whole = _Whole(model)
        with quiet_libraries():
            if strategy.offload_params != "none":
                _partition_in_place(deepspeed, model, config, device)
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=self._whole,
                optimizer=self._optimizer,
                model_parameters=program.lanes.parameters,
                config=config,
            )
        self._optimizers = RowOptimizers(self._master())

    def forward(self, run: Callable[[], Result]) -> Result:
        self._whole.run = run
        try:
            result: Result = self._engine()
        finally:
            del self._whole.run
        return result

    def backward(self, hidden: Tensor, gradient: Tensor, fresh: Sequence[bool]) -> None:
        # DeepSpeed starts from a scalar; this one's gradient by `hidden` is `gradient`, exactly. It
        # takes the workers' mean, where their sum is wanted.
        loss = (hidden * gradient).sum() * self._replicas.world_size
        self._engine.backward(loss, scale_wrt_gas=False)

    def stepper(self, slot: int, config: OptimizerConfig) -> Stepper:
        self._optimizer.trial = self._optimizers.begin(config)
        self._optimizer.max_norm = config.max_grad_norm
        stepper = ZeroStepper(
            self._optimizer, self._slots, self.program.lanes.parameters, self._replicas, self._stage
        )
        stepper.scatter()
        return stepper

    def step(self, rates: dict[int, float]) -> list[float]:
        (self._optimizer.rate,) = rates.values()
        self._optimizer.norm = math.nan  # stays so if DeepSpeed meets a gradient that is not finite
        self._engine.step()
        return [self._optimizer.norm]

    def close(self) -> None:
        self._engine.destroy()
        # DeepSpeed's caches hold modules and parameters until the process ends: leave them empty.
        for parameter in self._whole.model.parameters():
            if hasattr(parameter, "ds_tensor"):  # the partition of stage 3
                parameter.ds_tensor = None
        del self._whole.model

    def _master(self) -> nn.Parameter:
        """The flat fp32 partition that this process steps."""
        name = "fp32_partitioned_groups_flat"  # stage 3
        if not hasattr(self._zero, name):
            name = "single_partition_of_fp32_groups"  # stages 1 and 2
        (partition,) = getattr(self._zero, name)
        return cast(nn.Parameter, partition)


class ZeroStepper:
    copies = 3  # the layers' parameters, the fp32 partition and its gradient

    def __init__(
        self,
        optimizer: "_TrialOptimizer",
        slots: Slots,
        parameters: list[nn.Parameter],
        replicas: Replicas,
        stage: int,
    ) -> None:
        self.layout = f"partitions of ZeRO-{stage} on {replicas.world_size}"
        self._optimizer = optimizer
        self._slots = slots
        self._parameters = parameters
        self._replicas = replicas

    @torch.no_grad()
    def gather(self) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        for parameter, values in self._parts():
            whole = safe_get_full_fp32_param(parameter)
            # Under stage 3 the parameter itself is empty between uses, and adapters were saved so
            # (deepspeed issue 7900).
            assert whole is not None, "DeepSpeed does not know this adapter parameter"
            assert whole.numel() == values.numel(), f"a gathered adapter has {whole.shape}"
            values.copy_(whole.view_as(values))
        return self._slots.rows[0]

    @torch.no_grad()
    def scatter(self) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        # Nothing to gather below stage 3; there this does nothing.
        with deepspeed.zero.GatheredParameters(self._parameters, modifier_rank=0):
            for parameter, values in self._parts():
                parameter.copy_(values)
        for parameter, values in self._parts():
            safe_set_full_fp32_param(parameter, values)

    def states(self) -> States:
        """All workers' partitions: each tensor is [W, ...]. Only worker 0 has them."""
        tensors, numbers = optimizer_states(self._optimizer.trial)
        gathered = {name: self._replicas.gather(tensor) for name, tensor in tensors.items()}
        return {name: parts for name, parts in gathered.items() if parts is not None}, numbers

    def state_bytes(self) -> int:
        return num_state_bytes(self._optimizer.trial)

    def restore(self, states: States) -> None:
        tensors, numbers = states
        own = {name: tensor[self._replicas.world_rank] for name, tensor in tensors.items()}
        restore_optimizer(self._optimizer.trial, (own, numbers))

    def _parts(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter, and the place of its values in the slot's row."""
        return zip(self._parameters, self._slots.row_views(0), strict=True)


class _Whole(nn.Module):
    """The model as DeepSpeed sees it: its forward pass is whatever is asked for, so that the loop's
    own forward pass, loss and evaluation run between DeepSpeed's hooks."""

    run: Callable[[], Any]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> Any:
        return self.run()


class _TrialOptimizer(torch.optim.Optimizer):
    """Stands between DeepSpeed and the optimizer of the trial in the slot."""

    trial: torch.optim.Optimizer
    max_norm: float | None
    rate: float
    norm: float

    def __init__(
        self, parameters: list[nn.Parameter], replicas: Replicas, device: torch.device
    ) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self._replicas = replicas
        self._device = device  # of sums over workers; the partition may lie on a CPU

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (master,) = self.param_groups[0]["params"]  # DeepSpeed put its flat partition here
        square = torch.linalg.vector_norm(master.grad).to(self._device, torch.float64).square()
        self._replicas.sum(square)
        self.norm = float(square.sqrt())
        if math.isfinite(self.norm):
            clip_and_step(self.trial, master.grad, self.norm, self.max_norm, self.rate)


def _partition_in_place(
    deepspeed: Any, model: nn.Module, config: dict[str, Any], device: Device
) -> None:
    """Let go of parameters one by one, where they are; deepspeed.initialize alone would first move
    all of them to the GPU."""
    offload = config["zero_optimization"]["offload_param"]
    deepspeed.zero.Init(
        module=model,
        config_dict_or_path=config,
        remote_device=offload["device"],
        pin_memory=offload["pin_memory"],
    )
    for buffer in model.buffers():  # these stay, and deepspeed.initialize no longer moves them
        buffer.data = buffer.data.to(device)

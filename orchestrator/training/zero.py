"""A pack of one slot whose gradients, optimizer states and parameters DeepSpeed's ZeRO keeps.

In: a loaded base with its one slot. Out: an Engine (see engine.py). One DeepSpeed engine serves all
trials of the pack: a second one on the same modules would meet the first one's hooks.

The optimizer that DeepSpeed steps is `_TrialOptimizer`: it clips and steps the optimizer of the
present trial on this worker's flat fp32 partition, which is to ZeRO what a row is to `Slots`. So
both ways share their optimizers, their clipping and their checkpoints. With NVMe there are several
partitions, each with an optimizer of its own, in memory one at a time: see partitions.py.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from orchestrator.config import OptimizerConfig, StrategyConfig
from orchestrator.planning.zero import nvme_buffer_bytes, zero_config
from orchestrator.records import Device
from orchestrator.training.base_model import LoadedBase, check_family, probe
from orchestrator.training.deepspeed_ops import load_op
from orchestrator.training.engine import Stepper
from orchestrator.training.optimizers import (
    RowOptimizers,
    States,
    clip_and_step,
    num_state_bytes,
    optimizer_states,
    restore_optimizer,
)
from orchestrator.training.partitions import Partitions
from orchestrator.training.process_group import start_deepspeed
from orchestrator.training.program import Program
from orchestrator.training.quiet import quiet_libraries
from orchestrator.training.replicas import Replicas
from orchestrator.training.slots import Slots
from orchestrator.training.swap_folder import SwapFolder, check_locked_memory

Result = TypeVar("Result")

# DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has renamed.
warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", module="torch")


class ZeroEngine:
    in_step = True

    def __init__(
        self,
        base: LoadedBase,
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
        self._optimizer = _TrialOptimizer(program.lanes.parameters)
        self._within_step = False
        self._folder = None if base.partitioner is None else base.partitioner.swap_folder
        if strategy.offload_optimizer == "nvme":
            load_op("async_io")
            self._folder = self._folder or SwapFolder.of(strategy)
            check_locked_memory(nvme_buffer_bytes(slots.rows.shape[1]))
        if self._folder is not None:
            strategy = self._folder.named_in(strategy)
        config = zero_config(strategy, slots.rows.shape[1], micro_batch_size, device)
        self._whole = _Whole(base.model)
        with quiet_libraries():
            if strategy.offload_params == "nvme":
                _keep_on_host(deepspeed, program.lanes.parameters, config)
            if base.partitioner is not None:  # then deepspeed.initialize moves nothing
                for buffer in base.model.buffers():
                    buffer.data = buffer.data.to(base.device)
            self._engine, zero, _, _ = deepspeed.initialize(
                model=self._whole,
                optimizer=self._optimizer,
                model_parameters=program.lanes.parameters,
                config=config,
            )
        self._partitions = self._optimizer.partitions = Partitions(zero)
        self._optimizers = [RowOptimizers(partition) for partition in self._partitions.tensors]
        if base.partitioner is not None:
            probed = probe(base)  # inside, who looks at a parameter has it gathered for ever
            with ExitStack() as refused:
                refused.callback(self.close)
                self.forward(lambda: check_family(base, probed))
                refused.pop_all()
            self._partitions.forget_order()

    def forward(self, run: Callable[[], Result]) -> Result:
        self._whole.run = run
        try:
            with self._replicas.waiting():
                result: Result = self._engine()
        finally:
            del self._whole.run
        return result

    def backward(self, hidden: Tensor, gradient: Tensor, fresh: Sequence[bool]) -> None:
        # DeepSpeed starts from a scalar; this one's gradient by `hidden` is `gradient`, exactly. It
        # takes the workers' mean, where their sum is wanted.
        loss = (hidden * gradient).sum() * self._replicas.world_size
        self._within_step = True
        with self._replicas.waiting():
            self._engine.backward(loss, scale_wrt_gas=False)

    def stepper(self, slot: int, config: OptimizerConfig) -> Stepper:
        if self._within_step:
            self._drop_gradients()
        self._partitions.forget_states()
        self._optimizer.begin([row.begin(config) for row in self._optimizers], config.max_grad_norm)
        stepper = ZeroStepper(
            self._optimizer, self._slots, self.program.lanes.parameters, self._replicas, self._stage
        )
        stepper.scatter()
        return stepper

    def step(self, rates: dict[int, float]) -> list[float]:
        (self._optimizer.rate,) = rates.values()
        self._optimizer.norm = math.nan  # stays so if DeepSpeed meets a gradient that is not finite
        self._end_step()
        return [self._optimizer.norm]

    def _drop_gradients(self) -> None:
        """Of a trial that was stopped within a step. DeepSpeed adds up gradients in other places at
        each stage, and clears them in a step: so in one that changes nothing."""
        self._optimizer.idle = True
        self._end_step()
        self._optimizer.idle = False

    def _end_step(self) -> None:
        with self._replicas.waiting():
            self._engine.step()
        self._within_step = False

    def close(self) -> None:
        self._engine.destroy()
        # DeepSpeed's caches hold modules and parameters until the process ends: leave them empty.
        for parameter in self._whole.model.parameters():
            if hasattr(parameter, "ds_tensor"):  # the partition of stage 3
                parameter.ds_tensor = None
                _free_buffers(cast(Any, parameter).nvme_swapper)
        del self._whole.model
        if self._folder is not None:
            self._folder.remove()


class ZeroStepper:
    copies = 4  # the row, the layers' parameters, the fp32 partition and its gradient

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
        import deepspeed

        self._optimizer.partitions.settle()
        # Nothing to gather below stage 3; there the context does nothing. One at a time: more may
        # be on NVMe than there are buffers for.
        for parameter, values in self._parts():
            with self._replicas.waiting(), deepspeed.zero.GatheredParameters(parameter):
                # Under stage 3 the parameter itself is empty between uses, and adapters were saved
                # so (deepspeed issue 7900).
                assert parameter.numel() == values.numel(), f"an adapter has {parameter.shape}"
                values.copy_(parameter.view_as(values))
        return self._slots.rows[0]

    @torch.no_grad()
    def scatter(self) -> None:
        import deepspeed

        self._optimizer.partitions.settle()
        for parameter, values in self._parts():
            gathered = deepspeed.zero.GatheredParameters(parameter, modifier_rank=0)
            with self._replicas.waiting(), gathered:
                parameter.copy_(values)
        self._optimizer.partitions.take_parameters()

    def states(self) -> States:
        """All workers' partitions: each tensor is [W, ...]. Only worker 0 has them."""
        gathered: dict[str, Tensor] = {}
        numbers: dict[str, float] = {}
        for number, (partition, optimizer) in enumerate(self._optimizer.parts()):
            with self._optimizer.partitions.at_hand(partition):
                tensors, own = optimizer_states(optimizer)
                for name, tensor in tensors.items():
                    parts = self._replicas.gather(tensor)
                    if parts is not None:  # cloned, for it may lie in a buffer of the swapper's
                        gathered[f"{number}.{name}"] = parts.clone()
            numbers |= {f"{number}.{name}": value for name, value in own.items()}
        return gathered, numbers

    def state_bytes(self) -> int:
        """In memory: what is swapped is not."""
        return sum(num_state_bytes(optimizer) for _, optimizer in self._optimizer.parts())

    def restore(self, states: States) -> None:
        tensors, numbers = states
        for number, (partition, optimizer) in enumerate(self._optimizer.parts()):
            prefix = f"{number}."
            own = {
                name.removeprefix(prefix): parts[self._replicas.world_rank]
                for name, parts in tensors.items()
                if name.startswith(prefix)
            }
            counts = {
                name.removeprefix(prefix): value
                for name, value in numbers.items()
                if name.startswith(prefix)
            }
            with self._optimizer.partitions.at_hand(partition, changed=True):
                restore_optimizer(optimizer, (own, counts))
                self._optimizer.show_states()

    def _parts(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter, and the place of its values in the slot's row."""
        return zip(self._parameters, self._slots.parts(self._slots.rows), strict=True)


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
    """Stands between DeepSpeed and the optimizers of the trial in the slot, one a partition."""

    partitions: Partitions
    rate: float
    norm: float

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self._trial: list[torch.optim.Optimizer] = []
        self._max_norm: float | None = None
        self.idle = False
        """Whether steps change nothing."""

    def begin(self, trial: list[torch.optim.Optimizer], max_norm: float | None) -> None:
        self._trial, self._max_norm = trial, max_norm
        self.show_states()

    def show_states(self) -> None:
        """To DeepSpeed's swapper, which looks for them here; again after they were replaced."""
        if self.partitions.swapped:
            self.state = defaultdict(dict, {part: own.state[part] for part, own in self.parts()})

    def parts(self) -> Iterator[tuple[nn.Parameter, torch.optim.Optimizer]]:
        return zip(self.partitions.tensors, self._trial, strict=True)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.idle:
            return
        (present,) = self.param_groups[0]["params"]  # DeepSpeed put its flat partition here
        (optimizer,) = (own for partition, own in self.parts() if partition is present)
        self.norm = self.partitions.gradient_norm
        clip_and_step(optimizer, present.grad, self.norm, self._max_norm, self.rate)


def _keep_on_host(deepspeed: Any, parameters: list[nn.Parameter], config: dict[str, Any]) -> None:
    """Fp32 adapters, which NVMe's swapper would convert to the base's type."""
    section = config["zero_optimization"]
    host = {"device": "cpu", "pin_memory": section["offload_param"]["pin_memory"]}
    deepspeed.zero.Init(
        module=nn.ParameterList(parameters),
        config_dict_or_path=config | {"zero_optimization": section | {"offload_param": host}},
    )


def _free_buffers(swapper: Any) -> None:
    """DeepSpeed frees the locked memory that it swaps optimizers through, but not this."""
    if swapper is not None and swapper.buffers is not None:
        swapper.aio_read_handle.free_cpu_locked_tensor(swapper.buffers)
        swapper.buffers = None

"""Optimizers by name, learning-rate schedules, and optimizer states as plain tensors.

One optimizer serves one slot: its only parameter is the slot's flat row. That is also what makes
bitsandbytes' paged optimizers page, for they page only tensors of 100,000 elements or more.
"""

import ctypes
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config import OptimizerConfig, ScheduleConfig
from orchestrator.training.deepspeed_ops import load_op
from orchestrator.training.paged import check_room

States = tuple[dict[str, Tensor], dict[str, float]]

# Of CUDA's driver interface (cuda.h): CU_DEVICE_CPU; CUDA_ERROR_INVALID_DEVICE, which is the answer
# where pages cannot move on demand, as on Windows.
HOST, PAGES_NOT_ON_DEMAND = -1, 101


class RowOptimizers:
    """The optimizers of one row, for one trial after another.

    Paged ones begin anew in the memory of the last of their name: bitsandbytes 0.50 has no call to
    free managed memory, and keeps a reference to all of it (GlobalPageManager).
    """

    def __init__(self, row: nn.Parameter) -> None:
        self.row = row
        self._paged: dict[str, torch.optim.Optimizer] = {}

    def begin(self, config: OptimizerConfig) -> torch.optim.Optimizer:
        """As if it were new: without states."""
        if config.name not in self._paged:
            optimizer = OPTIMIZERS[config.name](self.row, config)
            if getattr(optimizer, "is_paged", False):
                self._paged[config.name] = optimizer
            return optimizer
        optimizer = self._paged[config.name]
        optimizer.param_groups[0].update(_common(config))
        for states in optimizer.state.values():
            for name, value in states.items():
                if isinstance(value, Tensor) and not name.startswith("qmap"):
                    value.zero_()
            states["step"] = 0
        return optimizer


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Rate of the optimizer step number `step`, counted from 0, of `steps` in all."""
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    if schedule.kind == "linear":
        return peak * (1 - done)
    if schedule.kind == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak


def clip_and_step(
    optimizer: torch.optim.Optimizer,
    gradient: Tensor,
    norm: float,
    max_norm: float | None,
    rate: float,
) -> None:
    """One step at this learning rate with the gradient, whose norm is `norm`, shortened in place
    to at most `max_norm`."""
    if max_norm is not None:
        factor = max_norm / (norm + 1e-6)  # as torch's clip_grad_norm_
        if factor < 1:
            gradient.mul_(factor)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()


def clips_itself(optimizer: torch.optim.Optimizer, row: Tensor) -> bool:
    """Whether `queue_step` is for it: torch's fused kernels scale a gradient in fp32."""
    return isinstance(optimizer, torch.optim.AdamW) and row.dtype == torch.float32


def clipping(norms: Tensor, max_norms: Tensor) -> tuple[Tensor, Tensor]:
    """By what gradients with these norms are divided, so that they are at most `max_norms` long,
    and 1 where a gradient is not finite, else 0: [k] each, from [k] and [k]."""
    divisors = ((norms + 1e-6) / max_norms).clamp_min(1.0)  # as torch's clip_grad_norm_
    return divisors, (~norms.isfinite()).to(norms.dtype)


def queue_step(
    optimizer: torch.optim.Optimizer, divisor: Tensor, is_lost: Tensor, rate: float
) -> None:
    """`clip_and_step` by numbers that only the GPU knows yet. A gradient that is lost is not
    applied."""
    optimizer.param_groups[0]["lr"] = rate
    # What torch.amp.GradScaler hands to fused optimizers.
    optimizer.grad_scale, optimizer.found_inf = divisor, is_lost  # type: ignore[attr-defined]
    optimizer.step()


def page_out_states(optimizer: torch.optim.Optimizer) -> None:
    """Have paged states leave the GPU now, not when it is full; the next step brings them back.
    Waits until they are gone: the allocator takes memory when it is asked, ahead of the GPU's work.

    Asked of the driver itself: bitsandbytes 0.50's prefetch_tensor(to_cpu=True) calls the host a
    GPU under CUDA 13, and ends the process with "invalid device ordinal".
    """
    paged = [
        value
        for states in optimizer.state.values()
        for value in states.values()
        if getattr(value, "is_paged", False)
    ]
    if not paged:
        return
    driver = ctypes.CDLL("libcuda.so.1")
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    for value in paged:
        place, size = ctypes.c_uint64(value.data_ptr()), ctypes.c_size_t(value.nbytes)
        code = driver.cuMemPrefetchAsync(place, size, ctypes.c_int(HOST), stream)
        if code not in (0, PAGES_NOT_ON_DEMAND):
            raise RuntimeError(f"cuMemPrefetchAsync of optimizer states: error {code}")
    torch.cuda.current_stream().synchronize()


def optimizer_states(optimizer: torch.optim.Optimizer) -> States:
    """The states of the optimizer's only parameter: tensors, and plain numbers."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for states in optimizer.state.values():
        for name, value in states.items():
            if isinstance(value, Tensor):
                tensors[name] = value.detach()
            else:
                numbers[name] = value
    return tensors, numbers


def num_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors, _ = optimizer_states(optimizer)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def restore_optimizer(optimizer: torch.optim.Optimizer, states: States) -> None:
    """Put saved states back where the optimizer itself would have made them.

    bitsandbytes' states are copied into buffers that its own init made: load_state_dict would give
    plain tensors where paged ones belong (bitsandbytes issues 782, 1381).

    Raises:
        TrialFailed: the GPU has no room for paged ones.
    """
    tensors, numbers = states
    if not tensors:  # saved before the first step
        return
    (row,) = optimizer.param_groups[0]["params"]
    if not hasattr(optimizer, "init_state"):  # torch's and DeepSpeed's
        state: dict[str, Any] = {name: tensor.clone() for name, tensor in tensors.items()}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": {0: state | numbers}, "param_groups": groups})
        return
    if not optimizer.state[row]:
        _check_room(optimizer)
        optimizer.init_state(optimizer.param_groups[0], row, 0, 0)
    for name, tensor in tensors.items():
        optimizer.state[row][name].copy_(tensor)
    optimizer.state[row].update(numbers)


def _adamw(row: nn.Parameter, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW([row], fused=True, **_common(config))


def _bitsandbytes(class_name: str) -> Callable[[nn.Parameter, OptimizerConfig], Any]:
    def build(row: nn.Parameter, config: OptimizerConfig) -> Any:
        import bitsandbytes

        optimizer = getattr(bitsandbytes.optim, class_name)([row], **_common(config))
        if optimizer.is_paged:  # it makes its states in its first step
            optimizer.register_step_pre_hook(_check_room)
        return optimizer

    return build


def _check_room(optimizer: Any, *_: Any) -> None:
    """Before states are made: raises TrialFailed where a GPU has no room for paged ones."""
    (row,) = optimizer.param_groups[0]["params"]
    if optimizer.is_paged and not optimizer.state[row]:
        check_room(row, optimizer.args.optim_bits)


def _deepspeed_cpu_adam(row: nn.Parameter, config: OptimizerConfig) -> Any:
    """Steps tensors on the CPU only. Adam with decoupled weight decay, fp32 states."""
    load_op("cpu_adam")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer = DeepSpeedCPUAdam([row], adamw_mode=True, **_common(config))
    optimizer.register_step_pre_hook(_forget_powers)
    return optimizer


def _forget_powers(optimizer: Any, *_: Any) -> None:
    """DeepSpeed's C++ part multiplies up the powers of the betas from step to step, but computes
    them after a gap, such as a resume (csrc/includes/cpu_adam.h, IncrementStep): other last digits.
    Made anew before every step, it always computes them."""
    group = optimizer.param_groups[0]
    numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    optimizer.ds_opt_adam.create_adam(optimizer.opt_id, *numbers, True, False)


def _common(config: OptimizerConfig) -> dict[str, Any]:
    return {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }


OPTIMIZERS: dict[str, Callable[[nn.Parameter, OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _bitsandbytes("AdamW8bit"),
    "paged_adamw_8bit": _bitsandbytes("PagedAdamW8bit"),
    "paged_adamw_32bit": _bitsandbytes("PagedAdamW32bit"),
    "deepspeed_cpu_adam": _deepspeed_cpu_adam,
}
# Each of whose states belongs to one value of the row; 8-bit ones share a maximum over 256.
ELEMENTWISE = frozenset({"adamw", "paged_adamw_32bit", "deepspeed_cpu_adam"})

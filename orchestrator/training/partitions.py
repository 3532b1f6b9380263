"""The flat fp32 partitions that a worker steps, wherever DeepSpeed keeps them.

In: DeepSpeed's ZeRO optimizer. Out: its partitions: one, or with strategy.offload_optimizer: nvme
one for each group of parameters that is swapped in, stepped and swapped out together.

Between uses a swapped partition and its states have no elements: DeepSpeed takes their memory for
the next one (runtime/swap_tensor/optimizer_utils.py). Groups under 1 MiB stay in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Partitions:
    def __init__(self, zero: Any) -> None:
        self._zero = zero
        name = "fp32_partitioned_groups_flat"  # stage 3
        if not hasattr(zero, name):
            name = "single_partition_of_fp32_groups"  # stages 1 and 2
        self.tensors: list[nn.Parameter] = list(getattr(zero, name))
        self._swapper = getattr(zero, "optimizer_swapper", None)
        self._away = {id(tensor) for tensor in self.tensors if not tensor.numel()}

    @property
    def swapped(self) -> bool:
        return self._swapper is not None

    @property
    def gradient_norm(self) -> float:
        """Of all workers' partitions together; only while DeepSpeed steps them."""
        return float(self._zero._global_grad_norm)

    def forget_states(self) -> None:
        """Those of the trial before: its files are not read for the next one."""
        if self._swapper is not None:
            self._swapper.purge_state()

    @contextmanager
    def at_hand(self, partition: Tensor, changed: bool = False) -> Iterator[None]:
        """Inside, the partition and its states are in memory; what is `changed` is written back."""
        if self._swapper is None or id(partition) not in self._away:
            yield
            return
        self._swapper.swap_in_optimizer_state(parameter=partition)
        yield
        if changed:
            self._swapper.swap_out_optimizer_state(parameter=partition)
        else:
            self._swapper.release_swap_buffers(parameter=partition)
        partition.grad = None  # it was read too

    def settle(self) -> None:
        """Put away parameters that stage 3 fetched ahead and nobody used: after a pass without a
        backward pass some are still on their way, and can be neither gathered nor put away."""
        if hasattr(self._zero, "parameter_offload"):
            self._zero.parameter_offload.get_param_coordinator()._clean_inflight_param_registry()

    def forget_order(self) -> None:
        """In which stage 3's last pass used parameters: it would keep those that a like one uses
        again."""
        self._zero.parameter_offload.get_param_coordinator()._invalidate_trace()

    def take_parameters(self) -> None:
        """Take the values of the layers' parameters."""
        if self._swapper is None:
            self._zero.refresh_fp32_params()
            return
        groups = self._zero.fp16_partitioned_groups_flat
        for partition, values in zip(self.tensors, groups, strict=True):
            with self.at_hand(partition, changed=True):
                partition.data.copy_(values)

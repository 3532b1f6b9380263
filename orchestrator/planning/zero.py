"""DeepSpeed's configuration for one pack, as a pure function.

In: the strategy and the adapter's size. Out: the dict for deepspeed.initialize. No torch, no
deepspeed.

What a trial alone decides (optimizer, clipping, accumulation, rate) is not in it, since one engine
serves all trials that pass through a pack; see training/zero.py.
"""

from typing import Any

from orchestrator.config import StrategyConfig

# DeepSpeed's own bucket, 5e8 elements, would cost 1 to 2 GB on the GPU for adapters of a few
# million. This many fp32 elements are 200 MB.
MAX_BUCKET_ELEMENTS = 50_000_000
# Where NVMe holds the optimizer, so many fp32 values, or a whole layer's, are swapped together, in
# NVME_BUFFERS locked buffers on the host: the partition, its gradient and two moments.
NVME_GROUP_ELEMENTS = 2**23
NVME_BUFFERS = 4
FP32_BYTES = 4
# Parameters of one module that may be in memory at once where NVMe holds them.
NVME_PARAM_BUFFERS = 3


def zero_config(
    strategy: StrategyConfig, num_adapter_params: int, micro_batch_size: int, device: str
) -> dict[str, Any]:
    """`device` is cpu or cuda; `strategy.kind` is zero, and its nvme_path this worker's own."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        # backward() only accumulates and step() steps: the slot knows when its step is complete,
        # and its losses are already weighted to add up.
        "managed_gradient_accumulation": False,
        # Each trial clips its own gradient, or does not: by default DeepSpeed would, to 1, before.
        "gradient_clipping": 0.0,
        # The trial's own optimizer steps, also where states are offloaded: DeepSpeed would put its
        # DeepSpeedCPUAdam in the place of any other there.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # No "bf16" section: it would cast the fp32 adapters. Without one DeepSpeed leaves every
        # parameter's type alone, so that fp32 adapters, which need no second master copy in
        # another type, stand on a base of any type.
        "zero_optimization": _zero_optimization(strategy, num_adapter_params, device),
        "steps_per_print": None,
        "log_level": "error",
    }


def nvme_buffer_bytes(num_adapter_params: int) -> int:
    """Of locked memory on the host, where NVMe holds the optimizer."""
    return NVME_BUFFERS * FP32_BYTES * min(num_adapter_params, NVME_GROUP_ELEMENTS)


def _zero_optimization(
    strategy: StrategyConfig, num_adapter_params: int, device: str
) -> dict[str, Any]:
    bucket = min(num_adapter_params, MAX_BUCKET_ELEMENTS)
    bucket += bucket % 2  # DeepSpeed wants an even number
    section: dict[str, Any] = {
        "stage": strategy.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if strategy.stage == 3:
        # One group, so one flat tensor and one call of the optimizer, as a slot's row has. With
        # NVMe the host is to hold a part at a time.
        swapped = strategy.offload_optimizer == "nvme"
        section["sub_group_size"] = NVME_GROUP_ELEMENTS if swapped else num_adapter_params
        # Nothing stays whole between uses. The default keeps what is under 100,000 elements, which
        # is most LoRA matrices.
        section["stage3_param_persistence_threshold"] = 0
    if strategy.offload_optimizer != "none":
        place = _place(strategy.offload_optimizer, strategy, device)
        if strategy.offload_optimizer == "nvme":
            place["buffer_count"] = NVME_BUFFERS
        section["offload_optimizer"] = place
    if strategy.offload_params != "none":
        place = _place(strategy.offload_params, strategy, device)
        if strategy.offload_params == "nvme":
            # Adapters stay on the host, whatever their size: see training/zero.py.
            place["max_in_cpu"] = num_adapter_params
            place["buffer_count"] = NVME_PARAM_BUFFERS
            # What is kept for its next use, or read before its first, keeps a buffer: DeepSpeed's
            # defaults, 1e9 and 5e7 values, run out of them.
            section["stage3_max_reuse_distance"] = 0
            section["stage3_prefetch_bucket_size"] = 0
        section["offload_param"] = place
    return section


def _place(where: str, strategy: StrategyConfig, device: str) -> dict[str, Any]:
    place = {"device": where, "pin_memory": device == "cuda"}
    return place | {"nvme_path": strategy.nvme_path} if where == "nvme" else place

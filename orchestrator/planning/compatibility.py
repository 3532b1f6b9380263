"""Combinations that cannot work, refused before any GPU is taken.

In: a TrialConfig, and how many workers are to share a pack. Out: a list of messages, empty when the
trial can run. Pure.
Each rule names the fields, the reason and its source; versions are those of constraints.txt.
"""

from collections.abc import Callable, Iterator

from orchestrator.config import QuantConfig, TrialConfig

# All that the rules read. Combinations that are equal in these have the same problems.
RULED_FIELDS = ("quant.", "strategy.", "schedule.", "steps", "batch_size", "micro_batch_size")


def problems(trial: TrialConfig, workers_per_pack: int | None = None) -> list[str]:
    """Each names the fields, their values and what to do."""
    found = [message for rule in RULES for message in rule(trial)]
    return found or list(_workers_share_a_step(trial, workers_per_pack or 1))


def _workers_share_a_step(trial: TrialConfig, workers_per_pack: int) -> Iterator[str]:
    if trial.batch_size % (workers_per_pack * (trial.micro_batch_size or 1)):
        yield (
            "resources.workers_per_pack times micro_batch_size must divide batch_size, but got "
            f"resources.workers_per_pack={workers_per_pack}, "
            f"micro_batch_size={trial.micro_batch_size}, batch_size={trial.batch_size}: "
            "set resources.workers_per_pack: 1, or a number that does"
        )


def _micro_batch_divides_batch(trial: TrialConfig) -> Iterator[str]:
    micro = trial.micro_batch_size
    if micro is not None and trial.batch_size % micro:
        yield (
            f"micro_batch_size must divide batch_size, but got micro_batch_size={micro}, "
            f"batch_size={trial.batch_size}"
        )


def _warmup_is_shorter_than_training(trial: TrialConfig) -> Iterator[str]:
    if trial.schedule.warmup_steps >= trial.steps:
        yield (
            "schedule.warmup_steps must be less than steps, but got "
            f"schedule.warmup_steps={trial.schedule.warmup_steps}, steps={trial.steps}"
        )


def _four_bit_fields_need_four_bits(trial: TrialConfig) -> Iterator[str]:
    quant = trial.quant
    if quant.bit_width != 4 and quant.quant_type != QuantConfig().quant_type:
        yield (
            "quant.quant_type is a 4-bit code, but got "
            f"quant.quant_type={quant.quant_type}, quant.bit_width={quant.bit_width}"
        )


def _float64_needs_16_bits(trial: TrialConfig) -> Iterator[str]:
    # bitsandbytes 0.50 dequantises to 32 bits at most.
    if trial.quant.compute_dtype == "float64" and trial.quant.bit_width != 16:
        yield (
            "quant.compute_dtype: float64 needs quant.bit_width: 16, but got "
            f"quant.bit_width={trial.quant.bit_width}"
        )


def _zero_has_a_stage(trial: TrialConfig) -> Iterator[str]:
    strategy = trial.strategy
    if strategy.kind == "zero" and strategy.stage is None:
        yield "strategy.kind: zero needs strategy.stage: 1, 2 or 3"
    if strategy.kind == "replicated" and (
        strategy.stage is not None
        or strategy.offload_optimizer != "none"
        or strategy.offload_params != "none"
    ):
        yield (
            "strategy.stage, offload_optimizer and offload_params need strategy.kind: zero, "
            "but got strategy.kind: replicated"
        )


def _parameter_offload_needs_stage_3(trial: TrialConfig) -> Iterator[str]:
    # DeepSpeed keeps parameters whole below stage 3 (deepspeed.ai, ZeRO configuration).
    strategy = trial.strategy
    if strategy.kind == "zero" and strategy.offload_params != "none" and strategy.stage != 3:
        yield (
            "strategy.offload_params needs strategy.stage: 3, but got "
            f"strategy.offload_params={strategy.offload_params}, strategy.stage={strategy.stage}"
        )


def _int8_weights_cannot_be_offloaded(trial: TrialConfig) -> Iterator[str]:
    # bitsandbytes 0.50 keeps a second reference to int8 weights (Linear8bitLt.state.CB), so they
    # stay on the GPU whatever DeepSpeed does: it would train, and save no memory.
    if trial.strategy.offload_params != "none" and trial.quant.bit_width == 8:
        yield (
            "strategy.offload_params cannot move the weights of quant.bit_width: 8 off the GPU, "
            f"but got strategy.offload_params={trial.strategy.offload_params}: use quant.bit_width "
            "4 or 16, or strategy.offload_params: none"
        )


RULES: tuple[Callable[[TrialConfig], Iterator[str]], ...] = (
    _micro_batch_divides_batch,
    _warmup_is_shorter_than_training,
    _four_bit_fields_need_four_bits,
    _float64_needs_16_bits,
    _zero_has_a_stage,
    _parameter_offload_needs_stage_3,
    _int8_weights_cannot_be_offloaded,
)

"""Combinations that cannot work, refused before any GPU is taken.

In: a TrialConfig, how many workers are to share a pack, and what is known of the base's shape. Out:
a list of messages, empty when it can run. Pure. Each rule has its reason and its source; versions
are those of constraints.txt. What is allowed has run: tests/unit/test_compatibility.py names the
test of every cell. Of what holds for all trials: sweep_rules.py.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from orchestrator.config import QuantConfig, SweepConfig, TrialConfig
from orchestrator.planning.allocation import WIDTHS
from orchestrator.planning.bits import bits_of
from orchestrator.planning.ranks import idle_patterns
from orchestrator.planning.shape import BaseShape, UnknownShape
from orchestrator.planning.unread import has_bits

Config = TypeVar("Config", TrialConfig, SweepConfig)

# All that the rules read. Combinations that are equal in these have the same problems.
RULED_FIELDS = (
    "quant.",
    "strategy.",
    "schedule.",
    "optimizer.name",
    "steps",
    "batch_size",
    "micro_batch_size",
    "adapter.init",
    "adapter.use_dora",
)


def problems(
    trial: TrialConfig,
    workers_per_pack: int | None = None,
    shape: BaseShape | UnknownShape | None = None,
) -> list[str]:
    """Each names the fields, their values and what to do."""
    rules = RULES
    if isinstance(shape, UnknownShape) and shape.conv1d:
        rules += CONV1D_RULES
    found = [message for rule in rules for message in rule.finds(trial)]
    if isinstance(shape, BaseShape):
        targets = [layer.name for layer in shape.targets(trial.adapter.target_modules)]
        found += idle_patterns(trial.adapter, targets)
        if not found:
            found += _loftq_has_layers_in_codes(trial, targets)
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
    if not has_bits(quant, 4) and quant.quant_type != QuantConfig().quant_type:
        yield (
            "quant.quant_type is a 4-bit code, but got "
            f"quant.quant_type={quant.quant_type}, quant.bit_width={quant.bit_width}: leave it "
            "out, or in a search space keep it to 4 bits with search.conditions"
        )


def _float64_needs_16_bits(trial: TrialConfig) -> Iterator[str]:
    if trial.quant.compute_dtype == "float64" and (
        trial.quant.bit_width != 16 or trial.quant.mixed
    ):
        yield (
            "quant.compute_dtype: float64 needs quant.bit_width: 16 for all layers, but got "
            f"quant.bit_width={trial.quant.bit_width}"
            + (", quant.bit_width_pattern" if trial.quant.bit_width_pattern else "")
        )


def _llm_int8_is_for_the_whole_base(trial: TrialConfig) -> Iterator[str]:
    quant = trial.quant
    if quant.mixed and quant.int8_type == "llm_int8":
        yield (
            "quant.int8_type: llm_int8 needs all layers at 8 bits, but got "
            f"quant.bit_width={quant.bit_width} with layers of other bits: set quant.int8_type: "
            "blockwise"
        )


def _auto_measures_4_8_and_16_bits(trial: TrialConfig) -> Iterator[str]:
    quant = trial.quant
    if quant.bit_width == "auto" and not {*quant.bit_width_pattern.values()} <= {*WIDTHS}:
        bits = ", ".join(f"{name}: {bits}" for name, bits in quant.bit_width_pattern.items())
        yield (
            "quant.bit_width: auto weighs what layers lose at 4, 8 and 16 bits, but got "
            f"quant.bit_width_pattern={{{bits}}}: give those layers 4, 8 or 16 bits"
        )


def _block_of_32_is_for_four_bits(trial: TrialConfig) -> Iterator[str]:
    quant = trial.quant
    if quant.block_size == 32 and has_bits(quant, 8) and not quant.llm_int8:
        yield (
            "quant.block_size: 32 is for 4-bit codes only, but got layers of 8 bits: set "
            "quant.block_size: 64 or more"
        )


def _zero_moves_parameters_of_bitsandbytes(trial: TrialConfig) -> Iterator[str]:
    quant, strategy = trial.quant, trial.strategy
    if strategy.kind != "zero" or not quant.packed:
        return
    if quant.mixed or quant.bit_width != 4:
        what = "quant.int8_type: blockwise" if quant.bit_width == 8 else "2 and 3 bits"
        what = "quant.bit_width_pattern or auto" if quant.mixed else what
        yield (
            f"strategy.kind: zero cannot partition the codes of {what}: set strategy.kind: "
            "replicated, or one quant.bit_width for all layers (with 8, int8_type: llm_int8)"
        )
    elif quant.block_size != QuantConfig().block_size:
        yield (
            "strategy.kind: zero needs quant.block_size: 64, but got "
            f"quant.block_size={quant.block_size}"
        )


def _storage_matters_under_zero_only(trial: TrialConfig) -> Iterator[str]:
    storage = trial.quant.storage_dtype
    if storage not in ("auto", "uint8") and trial.strategy.kind != "zero":
        yield (
            "quant.storage_dtype is what DeepSpeed moves 4-bit codes in, but got "
            f"quant.storage_dtype={storage}, strategy.kind={trial.strategy.kind}: set "
            "quant.storage_dtype: auto"
        )


def _pissa_changes_the_base(trial: TrialConfig) -> Iterator[str]:
    if trial.adapter.init != "pissa":
        return
    remedy = "default"
    if _loftq_is_possible(trial):
        remedy = "loftq, which begins with what the codes leave out of the same weights, or default"
    yield (
        "adapter.init: pissa changes the base itself, which the trials of a pack share, but got "
        f"adapter.init=pissa, quant.bit_width={trial.quant.bit_width}: set adapter.init: {remedy}"
    )


def _dora_multiplies_with_the_weights(trial: TrialConfig) -> Iterator[str]:
    if not trial.adapter.use_dora:
        return
    if trial.quant.llm_int8:
        yield (
            "adapter.use_dora needs weights that multiply every row alike, but got quant.bit_width="
            f"{trial.quant.bit_width}, quant.int8_type={trial.quant.int8_type}: set "
            "quant.int8_type: blockwise, or adapter.use_dora: false"
        )
    if trial.strategy.kind == "zero":
        yield (
            "adapter.use_dora needs the whole of each layer's weights, but got strategy.kind="
            f"{trial.strategy.kind}: set strategy.kind: replicated, or adapter.use_dora: false"
        )


def _loftq_makes_up_for_quantisation(trial: TrialConfig) -> Iterator[str]:
    quant, strategy = trial.quant, trial.strategy
    if trial.adapter.init == "loftq" and not _loftq_is_possible(trial):
        pattern = quant.bit_width_pattern
        yield (
            "adapter.init: loftq needs a base in codes and strategy.kind: replicated, but got "
            f"quant.bit_width={quant.bit_width}, "
            + (f"quant.bit_width_pattern={pattern}, " if pattern else "")
            + f"quant.int8_type={quant.int8_type}, "
            f"strategy.kind={strategy.kind}: set adapter.init: default"
        )


def _loftq_is_possible(trial: TrialConfig) -> bool:
    quant = trial.quant
    in_codes = quant.packed and has_bits(quant, 2, 3, 4, 8)
    return in_codes and trial.strategy.kind == "replicated"


def _loftq_has_layers_in_codes(trial: TrialConfig, targets: Iterable[str]) -> Iterator[str]:
    """By the names of the base's layers, which a map may leave at 16 bits one by one."""
    bits = {bits_of(trial.quant, name) for name in targets}
    if trial.adapter.init == "loftq" and bits == {16}:
        yield (
            "adapter.init: loftq needs a base in codes, but got quant.bit_width_pattern="
            f"{trial.quant.bit_width_pattern}, which leaves all layers of adapter.target_modules "
            "at 16 bits: set adapter.init: default, or give some of them fewer bits"
        )


def _zero_has_a_stage(trial: TrialConfig) -> Iterator[str]:
    strategy = trial.strategy
    if strategy.kind == "zero" and strategy.stage is None:
        yield "strategy.kind: zero needs strategy.stage: 1, 2 or 3"
    if strategy.kind == "replicated" and (
        strategy.stage is not None
        or strategy.offload_optimizer != "none"
        or strategy.offload_params != "none"
        or strategy.nvme_path is not None
    ):
        yield (
            "strategy.stage, offload_optimizer, offload_params and nvme_path need strategy.kind: "
            "zero, but got strategy.kind: replicated"
        )


def _cpu_adam_needs_states_off_the_gpu(trial: TrialConfig) -> Iterator[str]:
    strategy = trial.strategy
    if trial.optimizer.name == "deepspeed_cpu_adam" and strategy.offload_optimizer == "none":
        yield (
            "optimizer.name: deepspeed_cpu_adam needs strategy.offload_optimizer: cpu, but got "
            f"strategy.offload_optimizer=none, strategy.kind={strategy.kind}: set "
            "optimizer.name: adamw, or strategy.kind: zero with an offloaded optimizer"
        )


def _parameter_offload_needs_stage_3(trial: TrialConfig) -> Iterator[str]:
    strategy = trial.strategy
    if strategy.kind == "zero" and strategy.offload_params != "none" and strategy.stage != 3:
        yield (
            "strategy.offload_params needs strategy.stage: 3, but got "
            f"strategy.offload_params={strategy.offload_params}, strategy.stage={strategy.stage}"
        )


def _nvme_needs_stage_3(trial: TrialConfig) -> Iterator[str]:
    strategy = trial.strategy
    if strategy.offload_optimizer == "nvme" and strategy.stage in (1, 2):
        yield (
            "strategy.offload_optimizer: nvme needs strategy.stage: 3, but got "
            f"strategy.stage={strategy.stage}: set strategy.offload_optimizer: cpu"
        )


def _nvme_swaps_fp32_states(trial: TrialConfig) -> Iterator[str]:
    name = trial.optimizer.name
    if trial.strategy.offload_optimizer == "nvme" and name not in ("adamw", "deepspeed_cpu_adam"):
        yield (
            "strategy.offload_optimizer: nvme needs optimizer.name: adamw or deepspeed_cpu_adam, "
            f"but got optimizer.name={name}: set one of these, or strategy.offload_optimizer: cpu"
        )


def _nvme_swaps_parameters_in_one_type(trial: TrialConfig) -> Iterator[str]:
    quant = trial.quant
    named = quant.storage_dtype not in ("auto", quant.compute_dtype)
    if trial.strategy.offload_params == "nvme" and has_bits(quant, 4) and named:
        yield (
            "strategy.offload_params: nvme needs quant.storage_dtype: auto, but got "
            f"quant.storage_dtype={quant.storage_dtype}"
        )


def _nvme_path_is_for_nvme(trial: TrialConfig) -> Iterator[str]:
    strategy = trial.strategy
    places = (strategy.offload_optimizer, strategy.offload_params)
    if strategy.kind == "zero" and strategy.nvme_path is not None and "nvme" not in places:
        yield (
            "strategy.nvme_path needs strategy.offload_optimizer or offload_params: nvme, but got "
            f"strategy.nvme_path={strategy.nvme_path}"
        )


def _int8_weights_cannot_be_offloaded(trial: TrialConfig) -> Iterator[str]:
    if trial.strategy.offload_params != "none" and trial.quant.bit_width == 8:
        yield (
            "strategy.offload_params cannot move the weights of quant.bit_width: 8 off the GPU, "
            f"but got strategy.offload_params={trial.strategy.offload_params}: use quant.bit_width "
            "4 or 16, or strategy.offload_params: none"
        )


def _conv1d_needs_layers_of_bitsandbytes(trial: TrialConfig) -> Iterator[str]:
    quant, strategy = trial.quant, trial.strategy
    if not quant.llm_int8 and not (quant.packed and strategy.kind == "zero"):
        yield conv1d_refusal(quant, strategy.kind)


def conv1d_refusal(quant: QuantConfig, strategy: str) -> str:
    return (
        "a base model of GPT-2's kind (transformers' Conv1D in place of linear layers) needs "
        "LLM.int8, or 4 or 8 bits under strategy.kind: zero, but got quant.bit_width="
        f"{quant.bit_width}, quant.int8_type={quant.int8_type}, strategy.kind={strategy}: set "
        "quant.bit_width: 8 and quant.int8_type: llm_int8, or choose another base model"
    )


@dataclass(frozen=True)
class Rule(Generic[Config]):
    finds: Callable[[Config], Iterator[str]]
    reason: str
    source: str

    @property
    def name(self) -> str:
        return self.finds.__name__.strip("_").replace("_", " ")


RULES: tuple[Rule[TrialConfig], ...] = (
    Rule(
        _micro_batch_divides_batch,
        "a step is a whole number of passes, so that each label weighs the same",
        "orchestrator/training/feed.py",
    ),
    Rule(
        _warmup_is_shorter_than_training,
        "the peak learning rate would never be reached",
        "orchestrator/training/optimizers.py",
    ),
    Rule(
        _four_bit_fields_need_four_bits,
        "the field would be read by nobody",
        "orchestrator/training/codes.py",
    ),
    Rule(
        _float64_needs_16_bits,
        "bitsandbytes dequantises to 32 bits at most",
        "bitsandbytes 0.50, functional.dequantize_4bit",
    ),
    Rule(
        _llm_int8_is_for_the_whole_base,
        "it rounds activations too and finds outliers over the whole batch, which no pack, no "
        "compiled step and no graph allows; blockwise layers of the same base do",
        "bitsandbytes 0.50, nn.Linear8bitLt",
    ),
    Rule(
        _auto_measures_4_8_and_16_bits,
        "what a layer loses at 2 and 3 bits is not measured, nor do averages count HQQ's constants",
        "orchestrator/planning/allocation.py",
    ),
    Rule(
        _block_of_32_is_for_four_bits,
        "on GPUs the 8-bit blockwise quantiser takes blocks of 64 and more",
        "bitsandbytes 0.50, backends/cuda/ops.py, quantize_blockwise",
    ),
    Rule(
        _zero_moves_parameters_of_bitsandbytes,
        "our packed layers keep codes in buffers, and DeepSpeed partitions and offloads parameters "
        "alone; transformers makes bitsandbytes' own layers with blocks of 64 and no others",
        "DeepSpeed 0.19, zero/partition_parameters.py; transformers 5.23, BitsAndBytesConfig",
    ),
    Rule(
        _storage_matters_under_zero_only,
        "a replicated base's codes never move: their values would be the same",
        "orchestrator/training/codes.py",
    ),
    Rule(
        _pissa_changes_the_base,
        "it takes the principal part out of the weights, at fewer bits quantises what is left, and "
        "this differs with each rank: trials would not share one base, and one that is loaded "
        "alone from its adapter would have another base than it was trained on",
        "arXiv:2404.02948, section 4; peft 0.21, tuners/lora/layer.py, pissa_init",
    ),
    Rule(
        _dora_multiplies_with_the_weights,
        "each pass needs the product of A's rows with the frozen weights, beside the layer's own "
        "call: LLM.int8 would round these rows and take outlying columns out by all of them; under "
        "ZeRO 4-bit layers are bitsandbytes' own, and stage 3 has the weights on a worker during "
        "the layer's own call only",
        "orchestrator/training/dora.py; bitsandbytes 0.50, nn.Linear8bitLt",
    ),
    Rule(
        _loftq_makes_up_for_quantisation,
        "its first values are the error of the codes, which 16 bits do not have, and which is "
        "taken while our own loader makes them",
        "arXiv:2310.08659; orchestrator/training/loftq.py",
    ),
    Rule(
        _zero_has_a_stage,
        "DeepSpeed's stage 0 partitions nothing: that is kind: replicated",
        "deepspeed.ai, ZeRO configuration",
    ),
    Rule(
        _cpu_adam_needs_states_off_the_gpu,
        "it is written for a CPU's vector instructions, and steps no tensor that lies on a GPU; on "
        "rows that are not offloaded torch's adamw is the same rule without a compiler",
        "DeepSpeed 0.19, ops/adam/cpu_adam.py, DeepSpeedCPUAdam.step",
    ),
    Rule(
        _parameter_offload_needs_stage_3,
        "DeepSpeed keeps parameters whole below stage 3",
        "deepspeed.ai, ZeRO configuration",
    ),
    Rule(
        _nvme_needs_stage_3,
        "below stage 3 DeepSpeed takes nvme for cpu: it would train, keep the states in the host's "
        "memory and write nothing",
        "DeepSpeed 0.19, runtime/zero/stage_1_and_2.py, cpu_offload",
    ),
    Rule(
        _nvme_swaps_fp32_states,
        "DeepSpeed swaps each state as so many fp32 values as the partition has: not 8-bit ones, "
        "nor those in bitsandbytes' managed memory",
        "DeepSpeed 0.19, runtime/swap_tensor/optimizer_utils.py, set_swap_buffers",
    ),
    Rule(
        _nvme_swaps_parameters_in_one_type,
        "DeepSpeed swaps all parameters through buffers of one type, which is the base's: codes "
        "that are packed into another would be taken for numbers and converted",
        "DeepSpeed 0.19, runtime/swap_tensor/partitioned_param_swapper.py",
    ),
    Rule(
        _nvme_path_is_for_nvme,
        "the field would be read by nobody",
        "orchestrator/training/zero.py",
    ),
    Rule(
        _int8_weights_cannot_be_offloaded,
        "bitsandbytes keeps a second reference to int8 weights, so they stay on the GPU whatever "
        "DeepSpeed does: it would train, and save no memory",
        "bitsandbytes 0.50, nn.Linear8bitLt.state.CB",
    ),
)

# For bases of GPT-2's kind alone.
CONV1D_RULES: tuple[Rule[TrialConfig], ...] = (
    Rule(
        _conv1d_needs_layers_of_bitsandbytes,
        "adapters go onto linear layers, and bitsandbytes' take the place of Conv1D; ours cannot, "
        "for the family draws first values for weights that are codes by then",
        "transformers 5.23, integrations/bitsandbytes.py; models/gpt2/modeling_gpt2.py, "
        "_init_weights",
    ),
)

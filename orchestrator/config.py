"""The one typed schema: what a user may write, checked whole before anything heavy is imported.

In: a mapping (from YAML, see loading.py). Out: a frozen SweepConfig. Imports pydantic only.

`trial` is one complete, concrete trial. `search.space` stands apart from it and maps dotted fields
of a trial to choices or ranges; each candidate is made by putting values into the dumped trial and
validating the whole again, so no field is ever "a number or a distribution".
"""

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from orchestrator.data_config import DataConfig
from orchestrator.expressions import check_answer_pattern, check_pattern
from orchestrator.search_config import SearchConfig
from orchestrator.strict import Fraction, NonNegativeInt, PositiveInt, Strict, Switch

FULL_COMMIT_HASH = r"^[0-9a-f]{40}$"

Recomputation = Switch | Literal["selective"]


class BaseModelConfig(Strict):
    source: str = Field(min_length=1)
    """A hub id, a local folder, a .gguf file, or `package:NAME/FILE.gguf` for a GGUF file that an
    installed Python package carries. GGUF is converted to safetensors once and cached."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    trust_remote_code: Switch = False
    """Run code that the model's repository carries. Needs `revision` to be a full commit hash."""

    @model_validator(mode="after")
    def _remote_code_is_pinned(self) -> "BaseModelConfig":
        if self.trust_remote_code and not re.match(FULL_COMMIT_HASH, self.revision or ""):
            raise ValueError(
                "trust_remote_code: true needs revision to be a full 40-digit commit hash, "
                f"but got revision={self.revision!r}"
            )
        return self


class QuantConfig(Strict):
    bit_width: Literal[2, 3, 4, 8, 16, "auto"] = 4
    """Bits per frozen base weight: 2 or 3 (HQQ, needs the extra `hqq`), 4 (quant_type), 8
    (int8_type) or 16 (not quantised). auto: 4, 8 or 16 for each layer, by what the base loses
    there, within average_bits or budget_gib."""

    bit_width_pattern: dict[str, Literal[2, 3, 4, 8, 16]] = {}
    """Bits of single layers: name, ending or regular expression -> bits, as PEFT's rank_pattern. Of
    several that match the longest counts. With bit_width auto, the others are chosen around
    these, of 4, 8 and 16 bits."""

    average_bits: Annotated[float, Field(gt=4, le=16)] | None = None
    """Only with bit_width auto: bits that a weight of a linear layer may take on average, constants
    of the quantisation included."""

    budget_gib: Annotated[float, Field(gt=0)] | None = None
    """Only with bit_width auto: memory that the whole base may take, instead of average_bits."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit code. Only where layers have 4 bits."""

    int8_type: Literal["llm_int8", "blockwise"] | None = None
    """The 8-bit code. llm_int8: activations are rounded too, and products are made in 16 bits on
    GPUs, whatever compute_dtype is; a trial is alone in its pack.
    blockwise: weights only, in packs, compiled and in graphs as 4 bits are. null: llm_int8 for a
    base whose layers all have 8 bits, blockwise where widths differ."""

    double_quant: Switch = True
    """Quantise the quantisation constants too; saves 0.37 bits per weight (QLoRA, section 3). For 4
    bits and blockwise 8."""

    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share a quantisation constant. Not for llm_int8; 32 not where
    layers have 8 bits."""

    storage_dtype: Literal["auto", "uint8", "bfloat16", "float16", "float32"] = "auto"
    """The type that 4-bit codes are packed into under strategy.kind zero. auto: compute_dtype for
    stage 3, which moves parameters about in that type, else uint8."""

    compute_dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    """The arithmetic's type. auto: bfloat16 on GPUs and on CPUs with bfloat16 instructions, else
    float32; the choice is made once per sweep and recorded in its plan. float64, for checking
    results, needs bit_width 16."""

    @field_validator("bit_width_pattern")
    @classmethod
    def _patterns_compile(cls, pattern: dict[str, int]) -> dict[str, int]:
        for expression in pattern:
            check_pattern("bit_width_pattern", expression)
        return pattern

    @model_validator(mode="after")
    def _budget_for_auto(self) -> "QuantConfig":
        given = [name for name in ("average_bits", "budget_gib") if getattr(self, name) is not None]
        if self.bit_width == "auto" and len(given) != 1:
            raise ValueError(
                "bit_width: auto needs average_bits or budget_gib, one of them, but got "
                + (" and ".join(given) or "none")
            )
        return self

    def __hash__(self) -> int:
        # Of a few fields: a decision looks up hundreds of trials by it.
        pattern = frozenset(self.bit_width_pattern.items())
        return hash((self.bit_width, self.quant_type, self.average_bits, self.budget_gib, pattern))

    @property
    def mixed(self) -> bool:
        """Whether layers may differ in their bits."""
        return self.bit_width == "auto" or bool(self.bit_width_pattern)

    @property
    def llm_int8(self) -> bool:
        return self.bit_width == 8 and not self.mixed and self.int8_type != "blockwise"

    @property
    def packed(self) -> bool:
        """Whether layers are kept in codes that are made into values at every use, or once."""
        return not self.llm_int8 and (self.mixed or self.bit_width != 16)

    @property
    def mean_bits(self) -> float:
        """For tables and ties: of a weight on average where auto chose, else bit_width."""
        return (self.average_bits or 4) if self.bit_width == "auto" else self.bit_width

    @property
    def title(self) -> str:
        if self.bit_width == "auto":
            limit = f"{self.budget_gib:g} GiB" if self.budget_gib else f"{self.average_bits:g} bits"
            return f"auto ({limit})"
        name = f"{self.bit_width}-bit"
        if self.bit_width == 4:
            name += f" {self.quant_type}"
        if self.bit_width == 8 and self.int8_type == "blockwise":
            name += " blockwise"
        return f"{name}, mixed" if self.mixed else name


class AdapterConfig(Strict):
    rank: PositiveInt = 16
    """The adapter's rank (PEFT's `r`)."""

    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / rank, or alpha / sqrt(rank) with rslora."""

    dropout: Fraction = 0.0
    """Probability of dropping an input element of the low-rank path."""

    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers that get an adapter: `all-linear` (all but the output head) or name endings
    such as [q_proj, v_proj]."""

    rslora: Switch = False
    """Rank-stabilised scaling (arXiv:2312.03732)."""

    rank_pattern: dict[str, PositiveInt] = {}
    """Ranks of single layers: name, ending or regular expression -> rank, as in PEFT. Of several
    that match the longest counts."""

    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Alphas of single layers, likewise."""

    init: Literal["default", "loftq", "pissa"] = "default"
    """The adapter's first values. default: A random, B zero. loftq: the part of the base's
    quantisation error that the rank can hold (arXiv:2310.08659, one iteration, so that the base
    stays as it is). pissa is refused, see the rules."""

    use_dora: Switch = False
    """Train the length of each row of the adapted weight apart from its direction
    (arXiv:2402.09353). Such trials share packs with each other only. Not with LLM.int8 nor ZeRO."""

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_compile(cls, pattern: dict[str, float]) -> dict[str, float]:
        for expression in pattern:
            check_pattern("rank_pattern or alpha_pattern", expression)
        return pattern

    @model_validator(mode="after")
    def _some_target(self) -> "AdapterConfig":
        if not self.target_modules:
            raise ValueError("target_modules must name at least one module, or be all-linear")
        return self


class OptimizerConfig(Strict):
    name: Literal[
        "adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "deepspeed_cpu_adam"
    ] = "adamw"
    """adamw is torch's, deepspeed_cpu_adam is DeepSpeed's AdamW for states that
    strategy.offload_optimizer keeps off the GPU; the others are bitsandbytes'. On a CPU, paged ones
    do not page."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate, reached at the end of the warm-up."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay (AdamW)."""

    beta1: Fraction = 0.9
    """Decay of the gradient's running mean."""

    beta2: Fraction = 0.999
    """Decay of the squared gradient's running mean."""

    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator, so that it is never zero."""

    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the norm of the trial's own gradient to this; null never clips."""


class ScheduleConfig(Strict):
    kind: Literal["constant", "linear", "cosine"] = "cosine"
    """The learning rate's course after the warm-up; linear and cosine end at zero."""

    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly from zero."""


class StrategyConfig(Strict):
    kind: Literal["replicated", "zero"] = "replicated"
    """replicated: each GPU holds base, adapters and optimizer. zero: a DeepSpeed engine, whose
    parts the workers of a pack share."""

    stage: Literal[1, 2, 3] | None = None
    """ZeRO stage: 1 partitions optimizer states, 2 gradients too, 3 parameters too."""

    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where ZeRO keeps optimizer states. nvme, a local disk, needs stage 3."""

    offload_params: Literal["none", "cpu", "nvme"] = "none"
    """Where ZeRO keeps parameters that are not in use. Needs stage 3."""

    nvme_path: str | None = None
    """Folder on a local disk of each worker's machine, for nvme; null: nvme-swap in the cache."""


class TrialConfig(Strict):
    """One complete, concrete trial."""

    quant: QuantConfig = QuantConfig()
    adapter: AdapterConfig = AdapterConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    strategy: StrategyConfig = StrategyConfig()

    steps: PositiveInt = 100
    """Optimizer steps."""

    batch_size: PositiveInt = 8
    """Blocks in one optimizer step."""

    micro_batch_size: PositiveInt | None = None
    """Blocks in one forward pass; must divide batch_size. null: as many as the memory holds."""

    gradient_checkpointing: Recomputation | None = None
    """Recompute activations in the backward pass, in all layers: less memory, about half more work.
    selective: in as few layers as the memory asks for, at least one. null: the same, and only where
    fewer slots or smaller passes would cost more or not do. On a GPU whose memory or base is not
    known these two mean all layers."""

    seed: NonNegativeInt = 0
    """Decides the adapter's first values, the order of the data and dropout."""


class TaskConfig(Strict):
    """Questions that a trial answers once it is trained to its end: the prompts of held-out
    examples, each answered by the likeliest token every time. Its task_score is the part of the
    answers that are the examples' own, as `orchestrator evaluate --exact-match` compares them."""

    max_examples: PositiveInt = 64
    """Ask at most so many held-out examples, the first ones by content hash."""

    max_new_tokens: PositiveInt = 64
    """Tokens of an answer at most; one that is longer is cut there."""

    batch_size: PositiveInt = 16
    """Questions that a worker answers together, while the other trials of the pack wait: each token
    of all of them is one pass. Fewer take less memory."""

    answer_pattern: str | None = None
    """A regular expression: what is compared is its first match in each answer, or that match's
    group, if it has one; such as '#### (.+)' for GSM8K. Without a match an answer is wrong. null:
    the whole answer. Space around what is compared does not count."""

    @field_validator("answer_pattern")
    @classmethod
    def _pattern_has_one_part(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            check_answer_pattern(pattern)
        return pattern


class EvaluationConfig(Strict):
    every_steps: PositiveInt | None = None
    """Evaluate each time a trial has trained this many steps; null: only before and after."""

    batch_size: PositiveInt = 8
    """Blocks that each slot evaluates in one forward pass. The pass holds this many times the slots
    that are evaluated together."""

    task: TaskConfig | None = None
    """Questions that each trial answers at its end, for the objective task_score or for the gate;
    null: none."""


class ResourcesConfig(Strict):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where the cluster has GPUs, else cpu."""

    num_workers: PositiveInt | None = None
    """Workers that train at once; null: one per GPU, or one per CPU core."""

    cpus_per_worker: PositiveInt = 1
    """CPU cores of one worker, and its threads when it trains on the CPU."""

    slots_per_pack: PositiveInt | None = None
    """Trials that share one base model in one worker; null lets the planner choose."""

    workers_per_pack: PositiveInt | None = None
    """Workers that train one pack together, each with a part of every step's blocks; null: one, or
    on GPUs more where workers would be idle, and under ZeRO as many as hold the base."""

    dequantise_once: Switch | None = None
    """Keep the 4-bit base's values in memory as the arithmetic needs them, instead of making them
    again at every use: the same numbers, sooner. null: where the memory allows."""

    priority: Annotated[int, Field(strict=True)] = 0
    """Among sweeps that are attached to one Ray cluster: a higher one has all the workers that it
    can use before a lower one has any, equal ones have equal shares. Not Kueue's, which is
    `submit --priority`."""

    quantised_cache_gib: Annotated[float, Field(ge=0)] = 0.0
    """Local disk that may keep bases in codes, all together, in GiB. A base is then quantised once
    on a machine, and read back bit for bit; the ones used longest ago make room. 0: none is kept.
    Not for LLM.int8 nor ZeRO, whose layers are bitsandbytes' own."""

    hang_after_s: Annotated[float, Field(gt=0)] | None = 1800.0
    """Seconds after which a pack that reports nothing is taken for hung: its workers are ended and
    its trials go on elsewhere. Training packs report every second; one is given longer while it
    loads, 8 times this, and where its evaluations take long. null: never."""

    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of a GPU's memory that a worker plans with and may take, where others use it too."""

    cost_per_hour: Annotated[float, Field(ge=0)] | None = None
    """Price of one worker, a GPU or its share of CPU cores, for an hour, in any currency. With it
    the report says what each trial cost."""

    step_program: Literal["auto", "eager", "in_place", "compiled", "graph"] = "auto"
    """How a training step runs. compiled: the base's blocks through torch.compile. graph: these
    recorded in a CUDA graph as well. in_place: one trial at a time, eager, without copies of the
    adapter and of its gradients, for a base that barely fits. auto: graph on GPUs, or in_place
    where nothing else fits; eager on CPUs."""


class TrackingConfig(Strict):
    uri: str | None = None
    """MLflow tracking URI, without a password. null: MLFLOW_TRACKING_URI, or SQLite in the runs
    folder."""

    experiment: str | None = None
    """MLflow experiment; null: the sweep's name."""

    @field_validator("uri")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        if uri is not None and has_password(uri):
            raise ValueError(
                "put the password into MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_PASSWORD, not into "
                "a file that is copied to the run folder and MLflow"
            )
        return uri


GateMetric = Literal["token_loss", "example_loss", "task_error"]


class GateConfig(Strict):
    """What a candidate must show to become champion."""

    metric: GateMetric = "token_loss"
    """What is compared with the champion's: token_loss is the mean loss of a token, so that long
    examples count more; example_loss the mean over the examples of each one's own mean loss;
    task_error the part of evaluation.task's questions that is answered wrongly."""

    margin: Annotated[float, Field(ge=0)] = 0.0
    """What the candidate must be better by at least: nats, of task_error a part of 1."""

    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """Of the two-sided interval around the difference, which must lie below -margin. A candidate
    that is not better by `margin` is to pass in at most 1 - confidence of the cases."""

    method: Literal["widest", "percentile", "bca"] = "widest"
    """How the bootstrap makes its interval. Of the two known ways percentile keeps its level better
    where single examples differ much, bca where differences lean to one side; widest takes the
    more cautious end of both."""

    resamples: Annotated[int, Field(strict=True, ge=1000)] = 10_000
    """Times that the held-out examples are drawn anew."""

    min_pairs: Annotated[int, Field(strict=True, ge=2)] = 20
    """Held-out examples, or questions, that a comparison needs at least."""

    seed: NonNegativeInt = 0
    """The same seed and losses give the same interval."""

    other_examples: Literal["reevaluate", "refuse", "promote"] = "reevaluate"
    """What happens when the champion was measured on other held-out examples, or asked other
    questions. reevaluate: measure it on the candidate's, where the base model and the examples are
    at hand and tokenizer and template are the same; else refuse. promote: without a comparison."""

    max_adapter_bytes: PositiveInt | None = None
    """A larger adapter does not become champion."""

    max_peak_memory_bytes: PositiveInt | None = None
    """An adapter whose training took more memory does not become champion."""


class RegistryConfig(Strict):
    register_winner: Switch = True
    """Register the winner's adapter in the MLflow model registry."""

    model_name: str | None = Field(default=None, pattern=r"^[^/:]+$")
    """Registered model; null: the sweep's name."""

    gate: GateConfig = GateConfig()


class SweepConfig(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Names the sweep, its run folders and, unless set otherwise, its experiment and model."""

    base_model: BaseModelConfig
    data: DataConfig
    trial: TrialConfig = TrialConfig()
    search: SearchConfig = SearchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()

    checkpoint_every_steps: PositiveInt = 50
    """Steps between checkpoints of a trial; a lost worker repeats at most these."""

    max_restarts: NonNegativeInt = 3
    """Times a trial is started again after the worker that trained it was lost."""

    runs_dir: str = "runs"
    """Folder for run folders and, by default, the MLflow store."""

    @property
    def experiment_name(self) -> str:
        return self.tracking.experiment or self.name

    @property
    def registered_model_name(self) -> str:
        return self.registry.model_name or self.name


def has_password(uri: str) -> bool:
    """Whether the URI of a server or a database carries a password."""
    if re.search(r"[?&](password|passwd|pwd)=", uri, re.IGNORECASE):
        return True
    if uri.startswith(("http://", "https://")):
        try:
            return bool(urlsplit(uri).password)
        except ValueError:  # such as a broken IPv6 address; what is wrong is said elsewhere
            return "@" in uri
    # As SQLAlchemy reads it: the password of a database may hold slashes.
    return re.match(r"[\w+.-]+://[^:/@]*:[^@]+@", uri) is not None

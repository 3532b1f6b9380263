"""The small frozen records that stages hand to each other: specs, events, directives, results.

They cross process borders (pickled by Ray) and lie in the run folder (as JSON). Imports no torch.
Times are Unix seconds.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from orchestrator.config import EvaluationConfig, TrialConfig
from orchestrator.search_config import Choice
from orchestrator.wording import counted

Device = Literal["cpu", "cuda"]
ComputeDtype = Literal["bfloat16", "float32"]
StepProgram = Literal["eager", "in_place", "compiled", "graph"]


@dataclass(frozen=True)
class BaseModel:
    """A base model on local disk, as transformers reads it."""

    source: str
    """What the configuration said."""
    revision: str | None
    folder: str
    digest: str
    """Of its weights and config files."""
    trust_remote_code: bool = False


@dataclass(frozen=True)
class TrialSpec:
    """One point of the search space."""

    number: int
    params: dict[str, Choice]
    """The searched fields alone, dotted."""
    config: TrialConfig
    notes: dict[str, Any] = field(default_factory=dict)
    """What the sampler wants to know of it later."""
    refused: str = ""
    """Why it cannot be trained, where that shows as it is asked for."""

    def to_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "params": self.params,
            "config": self.config.model_dump(mode="json"),
            "notes": self.notes,
        } | ({"refused": self.refused} if self.refused else {})

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        params = {
            name: tuple(value) if isinstance(value, list) else value  # JSON has no tuples
            for name, value in record["params"].items()
        }
        config = TrialConfig.model_validate(record["config"])
        notes, refused = record.get("notes", {}), record.get("refused", "")
        return cls(record["number"], params, config, notes, refused)


@dataclass(frozen=True)
class SlotTask:
    """One attempt at one trial, as a slot gets it."""

    trial: int
    attempt: int
    config: TrialConfig
    attempt_dir: str
    """The only folder that this attempt may write to; a stale attempt cannot harm a newer one."""
    checkpoint_dirs: tuple[str, ...] = ()
    """Checkpoints of this trial to go on from, the furthest first; the first sound one is used."""
    rungs: tuple[int, ...] = ()
    """Steps at which it is evaluated, beside what the sweep's `evaluation` asks for."""


@dataclass(frozen=True)
class PackSpec:
    """What a pack worker needs to load one base model and open its slots."""

    pack: int
    base_model: BaseModel
    data_place: str
    """Of the shards: a folder, or an fsspec URL."""
    template: str
    """How prompts become text (DataConfig.template), for whoever generates with the adapter."""
    quant: dict[str, Any]
    """QuantConfig, dumped; compute_dtype is concrete."""
    target_modules: tuple[str, ...] | Literal["all-linear"]
    """Union of what the slots' trials target."""
    num_slots: int
    max_rank: int
    micro_batch_size: int
    gradient_checkpointing: bool
    strategy: dict[str, Any]
    """StrategyConfig, dumped."""
    device: Device
    cpus: int
    evaluation: EvaluationConfig
    checkpoint_every_steps: int
    dropout: bool = False
    """Whether any trial of the sweep drops inputs of its adapter."""
    world_size: int = 1
    """Workers that train the pack together, each with a part of every step's blocks."""
    dequantise_once: bool = False
    step_program: StepProgram = "eager"
    memory_fraction: float = 1.0
    """Of its GPU, that a worker may use."""
    accelerator: str = ""
    """Kind of GPU that it was planned for, as Ray calls it; empty for any."""
    loftq: bool = False
    """Whether any trial of the sweep begins with the base's quantisation error."""
    dora: bool = False
    """Whether its trials have magnitudes: all of them, or none."""
    quantised_cache_bytes: int = 0
    """Of local disk, that may keep bases in codes."""
    kept_layers: int = 0
    """The last ones of the base, which gradient_checkpointing leaves out."""
    reading: dict[str, Any] = field(default_factory=dict)
    """How rows became examples (DataConfig.reading)."""


@dataclass(frozen=True)
class Arithmetic:
    """What a pack chose that the last digits of its trials' numbers depend on."""

    world_size: int
    micro_batch_size: int
    gradient_checkpointing: bool
    kept_layers: int = 0
    """The base's last ones, which gradient_checkpointing leaves out."""

    @property
    def pass_blocks(self) -> int:
        """Blocks of a trial that all workers together take through one pass: divides the batch of
        every trial of the pack."""
        return self.world_size * self.micro_batch_size

    def __str__(self) -> str:
        words = f"world_size={self.world_size}, micro_batch_size={self.micro_batch_size}"
        words += ", recomputation" if self.gradient_checkpointing else ""
        return words + (f" but in {counted(self.kept_layers, 'layer')}" if self.kept_layers else "")


@dataclass(frozen=True)
class GroupPlace:
    """A worker's place among those that train one pack together."""

    world_rank: int = 0
    world_size: int = 1
    init_method: str = ""
    """tcp://host:port where they meet; empty for one that is alone."""


ALONE = GroupPlace()


@dataclass(frozen=True)
class PackQueued:
    """The cluster has no room for a pack that was started. From the executor, once; no answer."""

    pack: int
    reason: str


@dataclass(frozen=True)
class PackPlaced:
    """A pack that was queued has its place, and its workers start. From the executor; no answer."""

    pack: int


@dataclass(frozen=True)
class PackReady:
    """The base is loaded. Comes once per start of a worker, before anything else."""

    pack: int
    base_bytes: int
    """Measured bytes of the frozen base at its bit-width."""
    num_base_params: int
    """Weights of the base, whatever they are packed into."""
    baseline_eval_loss: float
    """The base's own loss on the held-out examples, without any adapter."""
    load_s: float
    step_program: StepProgram = "eager"
    """The one that it runs."""
    note: str = ""
    """Why that is not the one it was told to run."""
    evaluation_s: float = 0.0
    """Of `load_s`, what the evaluation of the base alone took."""
    base_note: str = ""


@dataclass(frozen=True)
class TrialOpened:
    """A slot took the trial and is about to train it."""

    trial: int
    attempt: int
    step: int
    """Steps that a checkpoint brought; 0 for a fresh start."""
    refused_checkpoints: tuple[str, ...] = ()
    """Why checkpoints that reached further could not be used."""
    note: str = ""
    """What else the user should know about how it goes on."""
    slot: int = 0
    """Its place in the pack."""
    node: str = ""
    """Name of the machine."""


@dataclass(frozen=True)
class Progress:
    """Mean values of a trial's steps since its last Progress."""

    trial: int
    attempt: int
    time: float
    step: int
    """Steps trained so far."""
    tokens: int
    """Tokens trained so far, padding excluded."""
    train_loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float


@dataclass(frozen=True)
class Evaluated:
    trial: int
    attempt: int
    time: float
    step: int
    tokens: int
    eval_loss: float


@dataclass(frozen=True)
class Checkpointed:
    trial: int
    attempt: int
    step: int
    folder: str


@dataclass(frozen=True)
class Answered:
    """A trial that was trained to its last step has answered so many of the task's questions."""

    trial: int
    attempt: int
    time: float
    num_answered: int
    num_questions: int


@dataclass(frozen=True)
class TrialDone:
    """A trial was trained to its last step, evaluated, and its adapter saved."""

    trial: int
    attempt: int
    time: float
    eval_loss: float
    baseline_eval_loss: float
    train_loss: float | None
    """None where a resume found it trained to its end already."""
    steps: int
    tokens: int
    tokens_per_s: float
    train_s: float
    peak_memory_bytes: int
    """The most that a worker held while the trial was in it: on a GPU tensors, pools of recorded
    graphs, and CUDA's context; on a CPU what its process has held since its start."""
    model_memory_bytes: int
    """Base weights, this trial's adapter, its gradient and optimizer states."""
    num_adapter_params: int
    adapter_bytes: int
    adapter_dir: str
    adapter_digest: str
    task_score: float | None = None
    """Part of the task's questions that it answered rightly; None where the sweep has no task."""


@dataclass(frozen=True)
class TrialStopped:
    """A trial ended without a result; the pack goes on."""

    trial: int
    attempt: int
    time: float
    reason: str
    message: str


@dataclass(frozen=True)
class TrialPruned:
    """The pruner stopped a trial; from the controller, its worker may not know it yet."""

    trial: int
    time: float
    rung: int
    """Steps at which it was compared."""
    eval_loss: float
    """There."""
    reason: str


@dataclass(frozen=True)
class PackLost:
    """The worker is gone, with the trials in its slots. From the executor."""

    pack: int
    reason: str
    """worker_lost, also of one that hangs or cannot reach its shards; or what it raised:
    out_of_memory | disk_full | data_error | raised."""
    message: str
    may_pass: bool = False
    """Whether it raised none of the project's errors: the machine may have been at fault."""
    unreachable: bool = False
    """Whether shards or a base that are elsewhere could not be read."""


@dataclass(frozen=True)
class PackLeft:
    """The worker saved its slots and ended, as it was told to."""

    pack: int


Event = (
    PackQueued
    | PackPlaced
    | PackReady
    | TrialOpened
    | Progress
    | Evaluated
    | Checkpointed
    | Answered
    | TrialDone
    | TrialStopped
    | TrialPruned
    | PackLost
    | PackLeft
)


@dataclass(frozen=True)
class Assign:
    """Train this task in a free slot."""

    task: SlotTask


@dataclass(frozen=True)
class Leave:
    """End the worker; save checkpoints first when asked."""

    save: bool


@dataclass(frozen=True)
class Prune:
    """Close the trial's slot and keep nothing of it; no answer is due. The trial may be over."""

    trial: int


Directive = Assign | Leave | Prune


@dataclass(frozen=True)
class TrialResult:
    """The final state of a trial; written once, never changed."""

    number: int
    state: Literal["finished", "pruned", "failed"]
    attempt: int
    time: float
    reason: str = ""
    message: str = ""
    eval_loss: float | None = None
    """Of a pruned trial, at the rung where it was stopped."""
    baseline_eval_loss: float | None = None
    train_loss: float | None = None
    steps: int = 0
    """That eval_loss is of. A pruned trial may have trained further until the verdict came."""
    tokens: int = 0
    """Trained in all."""
    tokens_per_s: float = 0.0
    train_s: float = 0.0
    peak_memory_bytes: int = 0
    """Of a trial that was refused for a constraint this, and the adapter's size, are expected."""
    model_memory_bytes: int = 0
    num_adapter_params: int = 0
    adapter_bytes: int = 0
    adapter_dir: str = ""
    """Relative to the run folder."""
    adapter_digest: str = ""
    task_score: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        return cls(**{one.name: record[one.name] for one in fields(cls) if one.name in record})


@dataclass(frozen=True)
class Decision:
    """What the controller chose to do and why; one line of decisions.jsonl."""

    time: float
    action: str
    """choose_reach | start | share | start_pack | pack_queued | pack_ready | release_pack |
    yield_pack | give_up_pack | assign | resume_trial | retry_trial | plan_less_memory |
    split_pack | learn_speed | keep_trial | stop_trial | end_trial | select_winner | extend."""
    subject: str
    reason: str
    facts: dict[str, Any] = field(default_factory=dict)
    """What a resume goes by: of a verdict the trial, its rung and the loss there; of less memory
    the part that plans may take; of a split pack its trials and the slots of their next packs."""

    def to_json(self) -> dict[str, Any]:
        record = asdict(self)
        return record if self.facts else {k: v for k, v in record.items() if k != "facts"}


@dataclass(frozen=True)
class PackStanding:
    """A pack as the controller knows it."""

    pack: int
    num_slots: int
    trials: tuple[int, ...]
    """Those in its slots."""
    expected_memory_bytes: int
    """That the planner expects each of its workers to need; 0: unknown."""


@dataclass(frozen=True)
class Standing:
    """How far the sweep is; the controller tells it whenever it has changed."""

    num_waiting: int
    num_finished: int
    num_pruned: int
    num_failed: int
    packs: tuple[PackStanding, ...]
    left_s: float | None = field(default=None, compare=False)
    """Seconds until all trials are trained, if no more are pruned; None: not known."""


Notice = Event | Decision | Standing
"""What whoever watches a sweep is told."""


@dataclass(frozen=True)
class Finding:
    """What an examination of a machine or a cluster found."""

    subject: str
    state: Literal["ok", "note", "broken"]
    text: str
    """With the remedy, if there is something to do."""


@dataclass(frozen=True)
class PackEvent:
    """What a pack or one of its slots did; one line of packs.jsonl."""

    time: float
    what: str
    """start | ready | opened | closed | ended | measured."""
    pack: int
    base: str | None = None
    """start: title of the base at its bit-width; measured: as the pack holds it."""
    num_slots: int | None = None
    world_size: int | None = None
    expected_bytes: int | None = None
    """start: peak memory of one worker as planned; absent where it was not estimated."""
    trial: int | None = None
    """opened, closed."""
    attempt: int | None = None
    slot: int | None = None
    node: str | None = None
    peak_bytes: int | None = None
    """closed: of the worker up to then, as measured."""
    gpu: str | None = None
    """measured: name of its workers' GPUs."""
    tokens: int | None = None
    """measured: that all its slots trained in `measured_s`, padding excluded."""
    expected_s: float | None = None
    """measured: what planning/speed.py gives for the same blocks, uncorrected."""
    measured_s: float | None = None
    """measured: since the pack began, without its start, evaluations and first reports."""

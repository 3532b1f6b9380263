"""The frozen base model: loaded once per pack at its bits, quantised by bitsandbytes.

In: a BaseModel record and a QuantConfig. Out: a model whose base parameters are frozen, its decoder
and its output head. This is the one place where `bit_width` becomes a library's own words.
"""

import logging
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.errors import (
    BaseModelError,
    BaseModelUnreachable,
    is_disk_full,
    is_unreachable,
)
from orchestrator.records import BaseModel, Device
from orchestrator.training.attention import (
    BY_DOCUMENT,
    NotByDocument,
    document_extents,
    set_attention,
    why_not_by_document,
)
from orchestrator.training.base_size import note_of_experts, num_bytes_of, num_values, whole_shape
from orchestrator.training.frozen import keep_values
from orchestrator.training.model_source import check_unquantised, local_folder
from orchestrator.training.quiet import quiet_libraries
from orchestrator.wording import counted

if TYPE_CHECKING:
    from orchestrator.training.partitioner import Partitioner
    from orchestrator.training.quantised_cache import QuantisedCache
    from orchestrator.training.quantiser import OnLayer

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

PROBE_TOKENS = 8
# Largest change that a document's hidden states may take from its neighbour's. Measured on some
# forty families on a CPU (transformers 5.23): dense ones that keep documents apart change by
# exactly 0, for both passes have the same shapes; mixtures of experts by 1e-7 in float32. Those
# that leak change by 1e-3 to 1.4 with random weights, which leak least (only Falcon-H1 by less than
# 1e-2). SmolLM2's own weights leak 0.5 where positions do not start again.
MAX_LEAK = {torch.bfloat16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-4}
# Rounding makes 1e-3 in bfloat16 (Gemma 2's capping); leaving out Cohere's factor of 1/16 makes 15.
MAX_LOGITS_ERROR = 1e-2
# Two kernels in bfloat16 differ by some 1e-2 after 32 blocks; attention that is not the same by 1.
MAX_ATTENTION_ERROR = 0.1
# Uniform noise on a router's input. PhiMoE's router_jitter_noise is none: it counts in eval mode.
JITTER = frozenset({"jitter_noise", "input_jitter_noise", "moe_jitter_eps"})


@dataclass(frozen=True)
class LoadedBase:
    model: nn.Module
    num_params: int
    num_bytes: int
    device: torch.device
    """Where it computes."""
    dtype: torch.dtype
    """In what it computes."""
    why_not_by_document: str
    """Why its attention needs transformers' masks; empty where it goes by documents' extents."""
    own_attention: str = ""
    """The one that it came with, where it goes by documents' extents."""
    note: str = ""
    """What its user should know of it; mostly empty."""
    partitioner: "Partitioner | None" = None
    """Of a base that ZeRO-3 has partitioned: it computes inside ZeroEngine.forward alone."""

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of what is added up: adapter rows, losses, factors."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def on_device(self, array: NDArray[Any]) -> Tensor:
        """Queued like a kernel on a GPU."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def hidden(
        self, input_ids: Tensor, position_ids: Tensor, extents: Tensor | None = None
    ) -> Tensor:
        """Last hidden states, [B, S, H]. Positions that start again at 0 start a new document;
        attention does not cross it. `extents` are attention.document_extents of the positions,
        made of them here if left out."""
        decoder = self.model.get_decoder()  # type: ignore[operator]
        output: Tensor = decoder(**self.inputs(input_ids, position_ids, extents)).last_hidden_state
        return output

    def inputs(
        self, input_ids: Tensor, position_ids: Tensor, extents: Tensor | None = None
    ) -> dict[str, Any]:
        """What the model's own forward takes for packed blocks."""
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": None}
        if self.why_not_by_document:
            return inputs | {"use_cache": False}
        if extents is None:
            extents = self.on_device(document_extents(position_ids.cpu().numpy()))
        return inputs | {"use_cache": False, "extents": extents}

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden states [n, H]."""
        config: Any = self.model.config
        logits: Tensor = self.model.get_output_embeddings()(hidden)  # type: ignore[operator]
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if divisor := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits


def load_base_model(
    base: BaseModel,
    quant: QuantConfig,
    device: Device,
    strategy: StrategyConfig,
    dequantise_once: bool = False,
    on_layer: "OnLayer | None" = None,
    cache_bytes: int = 0,
) -> LoadedBase:
    """`quant.compute_dtype` must be concrete. With `dequantise_once` packed layers are kept as the
    values that their codes stand for. `on_layer` sees each as it is quantised. Codes are kept on
    local disk, all bases together in `cache_bytes`.

    Raises:
        ConfigError: a key of `bit_width_pattern` matches no layer.
        BaseModelError: the folder holds no causal language model that transformers can load, or one
            that lacks weights, is quantised already or of a family that cannot be trained on packed
            documents.
        BaseModelUnreachable: the hub, or the disk that machines share, does not give it now.
    """
    folder = local_folder(base)
    check_unquantised(Path(folder), base.source)
    cache = _cache(base, folder, quant, device, strategy, cache_bytes)
    partitioner = _partitioner(quant, device, strategy)
    quantization = _quantization_config(quant, strategy, on_layer, cache, partitioner)
    taking = nullcontext() if partitioner is None else partitioner.taking()
    try:
        with quiet_libraries(), loading_alone(), taking:
            from transformers import AutoModelForCausalLM

            # No attn_implementation: SDPA where the class supports it, else its eager attention.
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=DTYPES[quant.compute_dtype],
                quantization_config=quantization,
                device_map={"": "cpu" if device == "cpu" or partitioner is not None else 0},
                trust_remote_code=base.trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
            )
            _check_whole(base, found["missing_keys"])
    except RuntimeError as error:
        if (failed := getattr(quantization, "failed", None)) is None:
            raise
        raise failed from error
    except (AttributeError, ImportError, KeyError, OSError, SafetensorError, ValueError) as error:
        # AttributeError: a family that draws first values for weights that are codes by now.
        if is_disk_full(error):
            raise
        kind = BaseModelUnreachable if is_unreachable(error) else BaseModelError
        raise kind(f"{base.source}: transformers cannot load it: {error}") from error
    if cache is not None:
        log.info("%s in codes: %s", base.source, cache.note)
    return made_ready(model, quant, device, strategy, dequantise_once, partitioner)


def _check_whole(base: BaseModel, missing: Collection[str]) -> None:
    """transformers draws random values for weights that the files lack, and goes on."""
    if missing:
        raise BaseModelError(
            f"{base.source}: its files lack {counted(len(missing), 'weight')} of the model, such "
            f"as {min(missing)}: get the whole base model again"
        )


def made_ready(
    model: nn.Module,
    quant: QuantConfig,
    device: Device,
    strategy: StrategyConfig,
    dequantise_once: bool = False,
    partitioner: "Partitioner | None" = None,
) -> LoadedBase:
    """A model that has its weights, frozen, and tried on packed documents; a partitioned one is
    still to be tried, when all of its workers have loaded it.

    Raises:
        BaseModelError: it is of a family that cannot be trained on them.
    """
    loaded = _prepare(model, device, DTYPES[quant.compute_dtype])
    if dequantise_once:
        keep_values(model)
    if partitioner is None:
        check_family(loaded, probe(loaded))
    loaded = replace(loaded, partitioner=partitioner)
    return _with_fastest_attention(loaded, strategy)


@contextmanager
def loading_alone() -> Iterator[None]:
    """One base at a time is read and quantised on a machine, whoever else wants to: the workers of
    all its GPUs together would fill its memory and read the same files at once."""
    # In the machine's own temporary folder: a cache may be on a disk that machines share.
    place = Path(tempfile.gettempdir()) / f"qlora-orchestrator-{os.getuid()}"
    place.mkdir(exist_ok=True)
    with FileLock(place / "loading.lock"):
        yield


def _prepare(model: nn.Module, device: Device, dtype: torch.dtype) -> LoadedBase:
    """Freeze the model, and keep its quantised weights as they are for ever."""
    model.requires_grad_(False)
    for module in model.modules():
        # On CPUs with AVX512-BF16 an eval-mode forward repacks 4-bit weights with rounded
        # constants, and the way back loses more (bitsandbytes 0.50.2): loss 15.36 -> 19.06.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if hasattr(module, "init_8bit_state"):
            module.register_forward_hook(_let_go_of_input)
    _remove_randomness(model)
    model.train()
    num_params, num_bytes = num_values(model), num_bytes_of(model)
    note = note_of_experts(model, num_params)
    return LoadedBase(
        model, num_params, num_bytes, _place(device), dtype, "not tried yet", note=note
    )


def _let_go_of_input(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    """LLM.int8 keeps its input, and the outliers in it, for the gradient of weights that are frozen
    here; and as attributes, which recomputation does not reach (bitsandbytes 0.50, MatMul8bitLt,
    on CPUs MatMul8bitFp; bitsandbytes issue 1927)."""
    node: Any = output.grad_fn
    for name, nothing in (("tensors", (None, None, None)), ("A", None)):
        if hasattr(node, name):
            setattr(node, name, nothing)


def _remove_randomness(model: nn.Module) -> None:
    """The base's own dropout draws from the process's generator: a trial in a pack would not be the
    trial alone, nor a resumed one the undisturbed one. Adapters have their own, which is seeded."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(getattr(holder, "__dict__", {}).items()):
                if isinstance(value, float) and ("drop" in name or name in JITTER):
                    setattr(holder, name, 0.0)


@torch.no_grad()
def check_family(base: LoadedBase, probed: tuple[Tensor, Tensor, Tensor]) -> None:
    """Refuse a model for which `LoadedBase` would compute something else than the model does, by
    what `probe` gave.

    Raises:
        BaseModelError: names the family.
    """
    config: Any = base.model.config
    family = f"base model family {config.model_type!r}"
    block, changed, position_ids = probed
    with _probing(base.model):
        try:
            hidden = base.hidden(block, position_ids)
            hidden_changed = base.hidden(changed, position_ids)
            logits = base.model(**base.inputs(block, position_ids)).logits
            own_logits = base.head(hidden)
            draws = _draws_in_training(base, block, position_ids)
        except (AttributeError, TypeError) as error:
            raise BaseModelError(
                f"{family}: it does not take position_ids and give hidden states as others do: "
                f"{error}: choose another base model"
            ) from error
    second = slice(PROBE_TOKENS, None)
    leak = difference(hidden_changed[0, second], hidden[0, second])
    if leak > max_leak(hidden.dtype):
        raise BaseModelError(
            f"{family}: documents that share a block are not kept apart (a neighbour changes "
            f"hidden states by {leak:.2g} of their size): choose another base model, such as "
            "Llama, Qwen3 or Gemma 3"
        )
    if draws:  # PhiMoE its experts
        raise BaseModelError(
            f"{family}: in training it draws something at random, which no resumed trial could "
            "repeat: choose another base model"
        )
    error_size = difference(own_logits[0], logits[0])
    if error_size > MAX_LOGITS_ERROR:
        raise BaseModelError(
            f"{family}: its output head does more than is known here (logits differ by "
            f"{error_size:.2g} of their size): choose another base model"
        )


def _draws_in_training(base: LoadedBase, block: Tensor, position_ids: Tensor) -> bool:
    """Whether a pass moves the process's generators, which stay as they are. What it draws may well
    change nothing in so small a pass."""
    base.model.train()
    gpu = [base.device] if base.device.type == "cuda" else []

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, gpu)]

    with torch.random.fork_rng(gpu):
        before = states()
        base.hidden(block, position_ids)
        return not all(map(torch.equal, before, states()))


@torch.no_grad()
def _with_fastest_attention(base: LoadedBase, strategy: StrategyConfig) -> LoadedBase:
    """The base with attention by documents' extents, where that gives what its own gives."""
    why_not = why_not_by_document(base.model, base.device, base.dtype)
    if strategy.kind == "zero":
        why_not = "under ZeRO the base may lie on the CPU"
    if why_not:
        return replace(base, why_not_by_document=why_not)
    block, _, position_ids = probe(base)
    faster = replace(base, why_not_by_document="")
    with _probing(base.model):
        expected = base.hidden(block, position_ids)
        own = set_attention(base.model, BY_DOCUMENT)
        try:
            change = difference(faster.hidden(block, position_ids)[0], expected[0])
        except (NotByDocument, RuntimeError, TypeError) as error:
            why_not = str(error).splitlines()[0]
        else:
            if not change < MAX_ATTENTION_ERROR:
                why_not = f"attention by document: hidden states differ by {change:.2g}"
    if why_not:
        set_attention(base.model, own)
        return replace(base, why_not_by_document=why_not)
    return replace(faster, own_attention=own)


def probe(base: LoadedBase) -> tuple[Tensor, Tensor, Tensor]:
    """A block of two documents, it with another first one, and the positions: [1, 16] each."""
    embeddings = base.model.get_input_embeddings().weight  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(whole_shape(embeddings)[0], (3, PROBE_TOKENS), generator=generator)
    one, other, document = words.to(embeddings.device)
    position_ids = torch.arange(PROBE_TOKENS, device=embeddings.device).repeat(2)[None]
    return torch.cat([one, document])[None], torch.cat([other, document])[None], position_ids


@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    """Eval mode until the end, or until it is changed, and each token's result independent of the
    other tokens under LLM.int8 too."""
    # Above its threshold, one token's outlier takes that feature out of all tokens' int8 product:
    # on SmolLM2 a neighbour then changes hidden states by 0.07, without it by 0.
    states = [module.state for module in model.modules() if hasattr(module, "init_8bit_state")]
    thresholds = [state.threshold for state in states]  # type: ignore[union-attr]
    for state in states:
        state.threshold = 0.0  # type: ignore[union-attr]
    model.eval()
    try:
        with quiet_libraries():
            yield
    finally:
        model.train()
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold  # type: ignore[union-attr]


def max_leak(dtype: torch.dtype) -> float:
    return MAX_LEAK.get(dtype, MAX_LEAK[torch.bfloat16])


def difference(changed: Tensor, original: Tensor) -> float:
    """Of two [n, D]: the largest change of a row, as a part of the row's length."""
    change = (changed.double() - original.double()).norm(dim=-1)
    return float((change / original.double().norm(dim=-1).clamp_min(1e-30)).max())


def enable_recomputation(model: nn.Module, kept_layers: int = 0) -> None:
    """Gradient checkpointing: keep each block's input, compute the rest again when needed. The last
    `kept_layers` blocks keep all: the backward pass lets go of them before it needs room again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    # Nothing random is left in a block, and reading a generator's state ends a graph's recording.
    model.gradient_checkpointing_enable(  # type: ignore[operator]
        gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
    )
    blocks = [block for block in model.modules() if isinstance(block, GradientCheckpointingLayer)]
    for block in blocks[max(0, len(blocks) - kept_layers) :]:
        block.gradient_checkpointing = False


def keep_embedding_on_host(model: nn.Module) -> None:
    """Look words up on the CPU, and bring what is found to where it was asked for. Does nothing if
    the output head has the same weights."""
    embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    if embedding.weight is head.weight or embedding.weight.device.type == "cpu":
        return
    place = embedding.weight.device
    weight = embedding.to("cpu").weight.detach()
    # No parameter any more: transformers takes a model to be where its first one is, and moves
    # prompts there.
    del embedding.weight
    embedding.register_buffer("weight", weight)
    embedding.register_forward_pre_hook(lambda _, inputs: (inputs[0].cpu(), *inputs[1:]))
    embedding.register_forward_hook(lambda _, inputs, found: found.to(place, non_blocking=True))


def _partitioner(
    quant: QuantConfig, device: Device, strategy: StrategyConfig
) -> "Partitioner | None":
    """For ZeRO-3, but not of LLM.int8's layers: bitsandbytes keeps their codes whole all the same
    (Linear8bitLt.init_8bit_state)."""
    if not (strategy.kind == "zero" and strategy.stage == 3) or quant.llm_int8:
        return None
    from orchestrator.training.partitioner import Partitioner

    return Partitioner(strategy, DTYPES[quant.compute_dtype], device, _place(device))


def _cache(
    base: BaseModel,
    folder: str,
    quant: QuantConfig,
    device: Device,
    strategy: StrategyConfig,
    max_bytes: int,
) -> "QuantisedCache | None":
    """For our own layers alone, not for LLM.int8's nor those that DeepSpeed moves."""
    if not (max_bytes and quant.packed and strategy.kind == "replicated"):
        return None
    from orchestrator.training.quantised_cache import QuantisedCache

    return QuantisedCache(base, folder, quant, _place(device), max_bytes)


def _place(device: Device) -> torch.device:
    return torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")


def _quantization_config(
    quant: QuantConfig,
    strategy: StrategyConfig,
    on_layer: "OnLayer | None",
    cache: "QuantisedCache | None",
    partitioner: "Partitioner | None",
) -> Any:
    if quant.packed and strategy.kind == "replicated":
        from orchestrator.training.quantiser import LayerByLayer

        return LayerByLayer(quant, on_layer, cache)
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {}
    if quant.packed:  # DeepSpeed moves bitsandbytes' own parameters
        compute_dtype = DTYPES[quant.compute_dtype]
        # ZeRO-3 moves parameters about in the base's type, into which 4-bit codes are packed.
        storage: str = quant.compute_dtype if strategy.stage == 3 else "uint8"
        if quant.storage_dtype != "auto":
            storage = quant.storage_dtype
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quant.quant_type,
            "bnb_4bit_use_double_quant": quant.double_quant,
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_quant_storage": storage,
        }
    elif quant.llm_int8:
        options = {"load_in_8bit": True}
    if partitioner is not None:
        from orchestrator.training.partitioner import ReadInParts

        return ReadInParts(partitioner, **options)
    return BitsAndBytesConfig(**options) if options else None

"""An adapter as an MLflow model that generates: `mlflow.pyfunc.load_model(...).predict([...])`.

MLflow stores this very file with the model ("models from code"), so nothing is pickled and the
model loads where `orchestrator` is not installed. Therefore it imports mlflow and its pandas only,
and torch, transformers and peft inside functions. `orchestrator generate` uses it too.

In: a PEFT folder whose orchestrator.json names the base model. Out: texts. Adapter and base are
loaded only if they have the digests that orchestrator.json gives them.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from pandas import DataFrame

RECORD = "orchestrator.json"
WEIGHTS = "adapter_model.safetensors"
BASE_FILES = (".safetensors", ".bin", ".gguf", ".json", ".model", ".jinja", ".py")
BASE_MODEL_VARIABLE = "ORCHESTRATOR_BASE_MODEL"
MAX_NEW_TOKENS = 128
NESTED_BLOCK = 256  # constants that share a constant of their own


class DamagedFiles(ValueError):
    """Files do not have the digests that they were saved or trained with."""


class AdapterModel(PythonModel):
    def load_context(self, context: Any) -> None:
        self._model, self._tokenizer = load(Path(context.artifacts["adapter"]))

    def predict(self, context: Any, model_input: DataFrame, params: Any = None) -> list[str]:
        """One text per prompt: of the table's column `prompt`, or its first. MLflow makes the table
        where its caller gave a list."""
        name = "prompt" if "prompt" in model_input.columns else model_input.columns[0]
        prompts = [str(prompt) for prompt in model_input[name]]
        return generate(self._model, self._tokenizer, prompts, **(params or {}))


def load(adapter_dir: Path) -> tuple[Any, Any]:
    """The adapter on its base model at the bit-width it was trained with, and the tokenizer.

    The tokenizer has a chat template exactly if prompts went through it in training.

    Raises:
        DamagedFiles: the adapter is not the one that was saved, or the base model another one.
        FileNotFoundError: the base model is not on this machine.
    """
    verify_adapter(adapter_dir)
    from transformers import AutoTokenizer

    record = json.loads((adapter_dir / RECORD).read_text())
    base = record["base_model"]
    source = base_source(base)
    model = load_base(record, source)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=base["trust_remote_code"])
    end_where_taught(model, tokenizer)
    if record["template"] == "plain":
        tokenizer.chat_template = None
    return with_adapter(model, adapter_dir).eval(), tokenizer


def end_where_taught(model: Any, tokenizer: Any) -> None:
    """Let texts end with the tokens that end them in training, beside the base's own: the
    tokenizer's, and the one with which the chat template closes a turn. A base that was not taught
    to chat often ends texts with another one (Qwen2.5: <|endoftext|>, its turns <|im_end|>)."""
    own = model.generation_config.eos_token_id
    found = {*(own if isinstance(own, list) else [own])}
    found |= {tokenizer.eos_token_id, _closing_token(tokenizer)}
    model.generation_config.eos_token_id = sorted(found - {None}) or None


def _closing_token(tokenizer: Any) -> int | None:
    """Of the assistant's turn, where it is a token of its own."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        # A line end after it belongs to the next turn.
        text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
    except (TemplateError, ValueError):  # it wants other turns, or is one of several without names
        return None
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[-1] if ids and ids[-1] in tokenizer.added_tokens_decoder else None


def with_adapter(model: Any, adapter_dir: Path) -> Any:
    """By PEFT, which loads what it finds a place for, and warns of the rest.

    Raises:
        DamagedFiles: it has put the adapter's tensors elsewhere than they were trained.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    adapted = PeftModel.from_pretrained(model, str(adapter_dir))
    with safe_open(adapter_dir / WEIGHTS, framework="pt") as file:
        saved = set(file.keys())
    loaded = set(get_peft_model_state_dict(adapted))
    if loaded != saved:
        raise DamagedFiles(
            f"{adapter_dir}: PEFT has loaded {len(saved & loaded)} of its {len(saved)} tensors, "
            f"and {len(loaded - saved)} others are as they began, so this is not what was trained: "
            "use the version of PEFT that it was trained with"
        )
    return adapted


def load_base(record: dict[str, Any], source: str) -> Any:
    """The base with the very values that the adapter of this record was trained on."""
    import torch
    from transformers import AutoModelForCausalLM

    quant = record["quant"]
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=getattr(torch, record["compute_dtype"]),
        quantization_config=_quantization_config(record),
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        trust_remote_code=record["base_model"]["trust_remote_code"],
    )
    for module in model.modules():
        # An eval-mode forward otherwise rewrites 4-bit weights with rounded constants on CPUs with
        # AVX512-BF16 (bitsandbytes 0.50.2).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if not _has_own_layers(quant):
        _round_as_trained(model, quant)
    return model


def verify_adapter(adapter_dir: Path) -> None:
    """Raises DamagedFiles, before anything of the adapter is loaded."""
    digests: dict[str, str] = json.loads((adapter_dir / RECORD).read_text()).get("files", {})
    if WEIGHTS not in digests:
        raise DamagedFiles(
            f"{adapter_dir / RECORD} has no digest of {WEIGHTS}: train the adapter anew, or take a "
            "folder that was saved by this version"
        )
    for name, digest in digests.items():
        path = adapter_dir / name
        found = _file_digest(path) if path.is_file() else "nothing"
        if found != digest:
            raise DamagedFiles(
                f"{path} is damaged: its digest is {found[:12]}, saved was {digest[:12]}: fetch "
                "the adapter again"
            )


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stream: bool = False,
) -> list[str]:
    """The text that follows each prompt. Temperature 0 takes the likeliest token each time, as
    scores do; above it the base's own generation_config.json holds beside temperature and top_p.

    `stream` writes the text to standard output as it comes.
    """
    # One at a time: padding a batch changes bfloat16's last bits, and so greedy texts.
    sampling = temperature, top_p, stream
    return [
        continued(model, tokenizer, [encode(tokenizer, prompt)], max_new_tokens, *sampling)[0]
        for prompt in prompts
    ]


def reply(
    model: Any,
    tokenizer: Any,
    messages: Sequence[dict[str, str]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stream: bool = False,
) -> str:
    """The assistant's next turn. The tokenizer must have a chat template."""
    ids = _encode_messages(tokenizer, messages)
    return continued(model, tokenizer, [ids], max_new_tokens, temperature, top_p, stream)[0]


def base_source(base: dict[str, Any]) -> str:
    """Folder of the base model, or what the user says stands for it on this machine; verified,
    where it is a folder that was trained on by its content.

    Raises:
        DamagedFiles: it holds other files than those that the adapter was trained on.
        FileNotFoundError: it is not there.
    """
    source = os.environ.get(BASE_MODEL_VARIABLE) or _recorded_folder(base)
    digest = str(base["digest"])
    # A hub's snapshot is named after its commit, which the hub client has verified.
    if Path(source).is_dir() and not digest.startswith("commit:"):
        found = base_digest(Path(source))
        if found != digest:
            raise DamagedFiles(
                f"{source} is not the base model that the adapter was trained on ({base['source']}"
                f", digest {digest[:12]}): its digest is {found[:12]}: restore it, or set "
                f"{BASE_MODEL_VARIABLE} to a copy"
            )
    return source


def base_digest(folder: Path) -> str:
    """As training takes it: of all files that decide the model."""
    files = sorted(path for path in folder.iterdir() if path.suffix in BASE_FILES)
    content = json.dumps([(path.name, _file_digest(path)) for path in files])
    return hashlib.sha256(content.encode()).hexdigest()


def continued(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stream: bool = False,
) -> list[str]:
    """The text that follows each prompt's tokens, of all prompts in the same passes, as `generate`
    has it. Only one alone can be streamed."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import TextStreamer

    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    else:
        model = _by_probability_alone(model)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    rows = [torch.tensor(ids, device=model.device) for ids in prompts]
    # On the left, with any token, which is masked: transformers counts positions from the first
    # token that is not.
    input_ids = pad_sequence(rows, batch_first=True, padding_side="left")
    masks = [torch.ones_like(row) for row in rows]
    # Not inference mode, whose tensors no gradient may come by later: the model may be in training.
    with torch.no_grad():
        output = model.generate(
            input_ids=input_ids,
            attention_mask=pad_sequence(masks, batch_first=True, padding_side="left"),
            max_new_tokens=int(max_new_tokens),
            pad_token_id=tokenizer.eos_token_id,
            streamer=streamer if stream else None,
            **sampling,
        )
    texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
    return [str(text) for text in texts]


def _by_probability_alone(model: Any) -> Any:
    """The model without its base's penalties, suppressed tokens and least lengths.

    transformers 5.23 fills whatever a call leaves out from the model's own settings, also what the
    call's GenerationConfig does. So it is another object, with the same weights, whose settings
    hold nothing but the tokens that end and fill a text; others may be using the model.
    """
    from transformers import GenerationConfig

    # PEFT's wrapper gives its base the wrapper's settings; for LoRA it does nothing else.
    alone = copy.copy(model.get_base_model() if hasattr(model, "get_base_model") else model)
    own = model.generation_config
    tokens = {name: getattr(own, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    alone.generation_config = GenerationConfig(**tokens)
    return alone


def _recorded_folder(base: dict[str, Any]) -> str:
    folder = str(base["folder"])
    if not Path(folder).is_dir():
        revision = f" at revision {base['revision']}" if base["revision"] else ""
        raise FileNotFoundError(
            f"the adapter's base model is not in {folder} on this machine (it came from "
            f"{base['source']}{revision}, digest {base['digest'][:12]}): copy that folder here, or "
            f"set {BASE_MODEL_VARIABLE} to a folder or hub id that holds the same weights"
        )
    return folder


def _quantization_config(record: dict[str, Any]) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    quant = record["quant"]
    if not _has_own_layers(quant):
        return None
    if quant["bit_width"] == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant["quant_type"],
            bnb_4bit_use_double_quant=quant["double_quant"],
            bnb_4bit_compute_dtype=getattr(torch, record["compute_dtype"]),
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quant["bit_width"] == 8 else None


def _has_own_layers(quant: dict[str, Any]) -> bool:
    """Whether transformers makes bitsandbytes' own layers of these bits, which take few bytes."""
    if quant.get("bit_width_pattern") or quant["bit_width"] == "auto":
        return False
    if quant["bit_width"] == 8:
        return bool(quant.get("int8_type") != "blockwise")
    if quant["bit_width"] == 4:
        return bool(quant.get("block_size", 64) == 64)
    return bool(quant["bit_width"] == 16)


def _round_as_trained(model: Any, quant: dict[str, Any]) -> None:
    """Weights become the values that their codes stand for: the same numbers, in 16 bits."""
    import torch
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    # As in training, what text does not pass through is left alone.
    inside = set(map(id, model.get_decoder().modules()))
    with torch.no_grad():
        for name, module in model.named_modules():
            linear = type(module) is torch.nn.Linear and id(module) in inside
            if linear and should_convert_module(name, kept):
                weight = module.weight
                weight.copy_(_rounded(weight.data.contiguous(), _bits_of(quant, name), quant))


def _bits_of(quant: dict[str, Any], name: str) -> int:
    """As training has it: of the patterns that match the longest counts."""
    pattern = quant.get("bit_width_pattern") or {}
    found = [key for key in pattern if re.fullmatch(rf"(.*\.)?({key})", name)]
    if not found:
        return int(quant["bit_width"])
    return int(pattern[max(found, key=lambda key: (len(key), key))])


def _rounded(weight: Any, bits: int, quant: dict[str, Any]) -> Any:
    from bitsandbytes import functional as bnb

    block = quant.get("block_size", 64)
    if bits == 16:
        return weight
    if bits < 4:
        return _rounded_by_hqq(weight, bits, block)
    if bits == 4:
        codes, state = bnb.quantize_4bit(weight, blocksize=block, quant_type=quant["quant_type"])
    else:
        code = bnb.create_linear_map().to(weight.device)
        codes, state = bnb.quantize_blockwise(weight, code=code, blocksize=block)
    if quant["double_quant"]:
        mean = state.absmax.mean()
        nested, inner = bnb.quantize_blockwise(state.absmax - mean, blocksize=NESTED_BLOCK)
        state.absmax = bnb.dequantize_blockwise(nested, inner) + mean
    if bits == 4:
        return bnb.dequantize_4bit(codes, state)
    return bnb.dequantize_blockwise(codes, state)


def _rounded_by_hqq(weight: Any, bits: int, block: int) -> Any:
    from hqq.core.quantize import Quantizer

    place = str(weight.device)
    codes, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=block, axis=1, bitpack=False, device=place
    )
    scale, zero = (meta[name].half().float() for name in ("scale", "zero"))
    return ((codes.float() - zero) * scale).to(weight.dtype).view_as(weight)


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens that a prompt had in training: no end token, the tokenizer's own beginning."""
    beginning: list[int] = []
    if tokenizer.chat_template:
        return _encode_messages(tokenizer, [{"role": "user", "content": prompt}])
    if tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        beginning = [tokenizer.bos_token_id]
    return [*beginning, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]


def _encode_messages(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


set_model(AdapterModel())

"""An adapter as an MLflow model that generates: `mlflow.pyfunc.load_model(...).predict([...])`.

MLflow stores this very file with the model ("models from code"), so nothing is pickled and the
model loads where `orchestrator` is not installed. Therefore it imports mlflow and its pandas only,
and torch, transformers and peft inside functions. `orchestrator generate` uses it too.

In: a PEFT folder whose orchestrator.json names the base model. Out: texts.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from pandas import DataFrame

RECORD = "orchestrator.json"
BASE_MODEL_VARIABLE = "ORCHESTRATOR_BASE_MODEL"
MAX_NEW_TOKENS = 128


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
        FileNotFoundError: the base model is not on this machine.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = json.loads((adapter_dir / RECORD).read_text())
    base = record["base_model"]
    source = _base_source(base)
    trust = base["trust_remote_code"]
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=getattr(torch, record["compute_dtype"]),
        quantization_config=_quantization_config(record),
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        trust_remote_code=trust,
    )
    for module in model.modules():
        # An eval-mode forward otherwise rewrites 4-bit weights with rounded constants on CPUs with
        # AVX512-BF16 (bitsandbytes 0.50.2).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust)
    if record["template"] == "plain":
        tokenizer.chat_template = None
    return PeftModel.from_pretrained(model, str(adapter_dir)).eval(), tokenizer


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
    """The text that follows each prompt. Temperature 0 takes the likeliest token each time.

    `stream` writes the text to standard output as it comes.
    """
    import torch
    from transformers import TextStreamer

    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    texts = []
    for prompt in prompts:
        # One at a time: padding a batch changes bfloat16's last bits, and so greedy texts.
        input_ids = torch.tensor([_encode(tokenizer, prompt)], device=model.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=int(max_new_tokens),
                pad_token_id=tokenizer.eos_token_id,
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
                if stream
                else None,
                **sampling,
            )
        answer = output[0, input_ids.shape[1] :]
        texts.append(str(tokenizer.decode(answer, skip_special_tokens=True)))
    return texts


def _base_source(base: dict[str, Any]) -> str:
    """Folder of the base model, or what the user says stands for it on this machine."""
    if replacement := os.environ.get(BASE_MODEL_VARIABLE):
        return replacement
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
    if quant["bit_width"] == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant["quant_type"],
            bnb_4bit_use_double_quant=quant["double_quant"],
            bnb_4bit_compute_dtype=getattr(torch, record["compute_dtype"]),
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quant["bit_width"] == 8 else None


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens that a prompt had in training: no end token, the tokenizer's own beginning."""
    beginning: list[int] = []
    if tokenizer.chat_template:
        message = {"role": "user", "content": prompt}
        prompt = tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True
        )
    elif tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        beginning = [tokenizer.bos_token_id]
    return [*beginning, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]


set_model(AdapterModel())

"""Base models with random weights, by the name of a shape.

    python -m benchmarks.models 0.5b FOLDER

Speed does not depend on what the weights are, so a benchmark needs no download. Saved in bf16 with
a tokenizer of bytes, as `orchestrator` and transformers read it.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
MAX_POSITIONS = 16384


@dataclass(frozen=True)
class Shape:
    """A Llama's."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def num_linear_params(self) -> int:
        """Weights of all linear layers but the output head."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2, 512, tied=True),
    "small": Shape(512, 1408, 4, 8, 4, 4096, tied=True),
    "0.1b": Shape(576, 1536, 30, 9, 3, 49_152, tied=True),  # SmolLM2-135M
    "0.5b": Shape(896, 4864, 24, 14, 2, 151_936, tied=True),  # Qwen2.5-0.5B
    "1.5b": Shape(1536, 8960, 28, 12, 2, 151_936, tied=True),  # Qwen2.5-1.5B
    "3b": Shape(3072, 8192, 28, 24, 8, 128_256, tied=True),  # Llama-3.2-3B
    "8b": Shape(4096, 14336, 32, 32, 8, 128_256, tied=False),  # Llama-3-8B
    "70b": Shape(8192, 28672, 80, 64, 8, 128_256, tied=False),  # Llama-3-70B
}


def build(name: str, folder: Path) -> None:
    """Nothing is done if the folder has a whole model; on a GPU, 8B takes some 30 s."""
    if (folder / "config.json").exists() and (folder / "tokenizer.json").exists():
        return
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(llama_config(SHAPES[name]), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")
    save_tokenizer(folder)  # last: it vouches for the weights


def llama_config(shape: Shape) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def save_tokenizer(folder: Path) -> None:
    """One token per byte of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = SPECIAL_TOKENS + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>"
    ).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    build(options.shape, options.folder)

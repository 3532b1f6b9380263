"""Tiny stand-ins made on the spot, so that no test downloads anything."""

from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{m.role}}|>{{m.content}}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def make_tokenizer(folder: Path) -> Path:
    """A tokenizer of 261 tokens, five special ones and all bytes, so one token per byte of text.

    Saved in `folder` as transformers saves it. `<|end|>` ends a text and a turn.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = SPECIAL_TOKENS + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=SPECIAL_TOKENS[2:],
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def make_base_model(
    folder: Path, seed: int = 0, hidden_size: int = 64, tied: bool = True, num_layers: int = 2
) -> Path:
    """A Llama of few layers with random weights, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return make_tokenizer(folder)


def question_rows(count: int) -> list[dict[str, str]]:
    """Sums that a tiny model can begin to learn."""
    return [
        {"prompt": f"What is {n} plus {n % 7}?", "completion": f"It is {n + n % 7}."}
        for n in range(count)
    ]

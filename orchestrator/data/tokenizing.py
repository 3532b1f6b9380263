"""Tokenise a shard's examples in one call and label what has loss.

In: examples, each with its place, key and segments. Out: documents of token ids and labels, and
counts of what was cut or left out. transformers is imported inside functions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.config import DataConfig
from orchestrator.data.formats import Segment, Tokenizer
from orchestrator.errors import BaseModelError, DataError
from orchestrator.files import file_digest, record_digest

IGNORED = -100  # PyTorch's cross entropy leaves this label out

# Whatever of these a folder has decides how its tokenizer cuts text and renders messages.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


@dataclass(frozen=True)
class Example:
    place: str
    """File and line, for messages."""
    key: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True, eq=False)
class Document:
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    """The token to predict at each position, which is the next one; IGNORED where it has no loss
    and at the last position."""
    key: str


@dataclass(frozen=True, eq=False)
class Tokenized:
    documents: list[Document]
    truncated: int
    dropped: int
    without_loss: int


@lru_cache(maxsize=2)
def load_tokenizer(folder: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{folder}: the tokenizer cannot be loaded: {error}") from error


def tokenizer_digest(folder: Path) -> str:
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        raise BaseModelError(
            f"{folder}: a base model's folder must hold a tokenizer, but has none of "
            f"{', '.join(TOKENIZER_FILES)}"
        )
    return record_digest({name: file_digest(folder / name) for name in present})


def tokenize(examples: Sequence[Example], tokenizer: Tokenizer, config: DataConfig) -> Tokenized:
    """Documents of at most `config.block_length` tokens, in the order of the examples.

    Raises:
        DataError: an example is longer and `config.overlong` is error.
    """
    block_length = config.block_length
    documents: list[Document] = []
    truncated = dropped = without_loss = 0
    for example, (ids, has_loss) in zip(examples, _encode(examples, tokenizer), strict=True):
        if len(ids) > block_length:
            if config.overlong == "error":
                raise _too_long(example, len(ids), block_length)
            if config.overlong == "drop":
                dropped += 1
                continue
            truncated += 1
            ids, has_loss = ids[:block_length], has_loss[:block_length]
        labels = _shifted_labels(ids, has_loss)
        if np.any(labels != IGNORED):
            documents.append(Document(ids, labels, example.key))
        else:
            without_loss += 1
    return Tokenized(documents, truncated, dropped, without_loss)


def _encode(
    examples: Sequence[Example], tokenizer: Tokenizer
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    # Segments are tokenised apart, so that no token reaches over the border of a prompt: this is
    # also how the tokens stand when the model generates. One call is fastest.
    texts = [segment.text for example in examples for segment in example.segments]
    encoded = iter(_token_ids(texts, tokenizer))
    for example in examples:
        pieces = [(next(encoded), segment.has_loss) for segment in example.segments]
        ids = [token for tokens, _ in pieces for token in tokens]
        has_loss = [flag for tokens, flag in pieces for _ in tokens]
        yield np.array(ids, dtype=np.int32), np.array(has_loss, dtype=np.bool_)


def _token_ids(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    if not texts:
        return []
    encoding = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def _shifted_labels(ids: NDArray[np.int32], has_loss: NDArray[np.bool_]) -> NDArray[np.int32]:
    labels = np.full_like(ids, IGNORED)
    labels[:-1] = np.where(has_loss[1:], ids[1:], IGNORED)
    return labels


def _too_long(example: Example, num_tokens: int, block_length: int) -> DataError:
    return DataError(
        f"{example.place}: example has {num_tokens} tokens, more than "
        f"data.block_length={block_length}: raise block_length, "
        "or set data.overlong: truncate or drop"
    )

"""Tokenise examples in batches and mark what has loss.

In: examples, each with its place, key and segments. Out: documents of token ids, and counts of what
was cut or left out. transformers and tokenizers are imported inside functions.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.continuations import Continuations, continuations
from orchestrator.data.formats import Segment, Tokenizer
from orchestrator.data.token_ids import TokenIds, fastest_way
from orchestrator.data_config import Overlong
from orchestrator.errors import BaseModelError, DataError
from orchestrator.files import file_digest, record_digest
from orchestrator.garbage import without_collections

# The tokenizer takes about 50 times a batch's text for it, and 130 times that of one long example.
BATCH_CHARS = 1 << 19
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
MORE_TEMPLATES = "additional_chat_templates/*.jinja"


class Example(NamedTuple):
    place: Callable[[], str]
    """File and line, for messages; lines are counted only then."""
    key: bytes
    segments: tuple[Segment, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Document:
    input_ids: NDArray[np.int32]
    has_label: NDArray[np.bool_]
    """Of each position: the model is to predict the token after it, which is its label."""
    key: bytes


@dataclass(frozen=True, eq=False)
class Tokenized:
    documents: list[Document]
    truncated: int
    split: int
    """Examples, not the documents that became of them."""
    dropped: int
    without_loss: int
    """Documents that were left out, since they have no label."""
    way: str | None
    """How token ids were found; none without an example."""


@lru_cache(maxsize=2)
def load_tokenizer(folder: str) -> Tokenizer:
    with without_collections():
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{folder}: the tokenizer cannot be loaded: {error}") from error


def tokenizer_digest(folder: Path) -> str:
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    templates = [path.relative_to(folder).as_posix() for path in folder.glob(MORE_TEMPLATES)]
    if not present:
        raise BaseModelError(
            f"{folder}: a base model's folder must hold a tokenizer, but has none of "
            f"{', '.join(TOKENIZER_FILES)}"
        )
    return record_digest({name: file_digest(folder / name) for name in present + templates})


class _Piece(NamedTuple):
    """What becomes a document: positions of a batch's tokens."""

    start: int
    end: int
    key: bytes


def tokenize(
    examples: Iterable[Example], tokenizer: Tokenizer, block_length: int, overlong: Overlong
) -> Tokenized:
    """Documents of at most `block_length` tokens, in the order of the examples.

    Raises:
        DataError: an example is longer and `overlong` is error.
    """
    batches = _batches(examples)
    first = next(batches, [])
    token_ids, way = fastest_way(tokenizer, [part.text for item in first for part in item.segments])
    continued = continuations(tokenizer, token_ids)
    documents: list[Document] = []
    counts = dict.fromkeys(("truncate", "split", "drop"), 0)
    without_loss = 0
    with without_collections():
        for batch in chain([first], batches):
            ids, has_loss, borders = _encode(batch, token_ids, continued)
            pieces: list[_Piece] = []
            for example, start, end in zip(batch, borders, borders[1:], strict=False):
                if end - start <= block_length:
                    pieces.append(_Piece(start, end, example.key))
                elif overlong == "error":
                    raise _too_long(example, end - start, block_length)
                else:
                    counts[overlong] += 1
                    pieces += _cut(example.key, start, end, block_length, overlong)
            found = _labelled(pieces, ids, has_loss)
            without_loss += len(pieces) - len(found)
            documents += found
    return Tokenized(
        documents, counts["truncate"], counts["split"], counts["drop"], without_loss, way
    )


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    batch: list[Example] = []
    num_chars = 0
    for example in examples:
        batch.append(example)
        num_chars += sum([len(segment.text) for segment in example.segments])
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _encode(
    batch: Sequence[Example], token_ids: TokenIds, continued: Continuations | None
) -> tuple[NDArray[np.int32], NDArray[np.bool_], list[int]]:
    """All tokens of the batch, whether each has loss, and where the examples begin and end."""
    # Each segment has tokens of its own, so that none reaches over the border of a prompt: this is
    # also how the tokens stand when the model generates.
    texts, flags = [], []
    for example in batch:
        for segment in example.segments:
            texts.append(segment.text)
            flags.append(segment.has_loss)
    found = array("I")
    ends = [0]
    for ids in (
        continued.token_ids(example.segments for example in batch)
        if continued
        else token_ids(texts)
    ):
        found += ids
        ends.append(len(found))
    segment_ends = np.array(ends)
    num_segments = np.cumsum([0, *(len(example.segments) for example in batch)])
    return (
        np.frombuffer(found, dtype=np.uint32).view(np.int32),
        np.repeat(np.array(flags, dtype=np.bool_), np.diff(segment_ends)),
        segment_ends[num_segments].tolist(),
    )


def _cut(key: bytes, start: int, end: int, length: int, overlong: str) -> list[_Piece]:
    """What is kept of an example that is longer than `length`."""
    if overlong == "drop":
        return []
    if overlong == "truncate":
        return [_Piece(start, start + length, key)]
    return [
        _Piece(first, min(first + length, end), _piece_key(key, number))
        for number, first in enumerate(range(start, end, length))
    ]


def _piece_key(key: bytes, number: int) -> bytes:
    return sha256(key + number.to_bytes(8, "little")).digest() if number else key


def _labelled(
    pieces: Sequence[_Piece], ids: NDArray[np.int32], has_loss: NDArray[np.bool_]
) -> list[Document]:
    """Those of the pieces that have a label."""
    has_label = np.zeros_like(has_loss)
    has_label[:-1] = has_loss[1:]
    starts = np.array([piece.start for piece in pieces], dtype=np.int64)
    ends = np.array([piece.end for piece in pieces], dtype=np.int64)
    # The last position has none: the token after it is another document's, or was cut off.
    has_label[ends[ends > starts] - 1] = False
    before = np.concatenate(([0], np.cumsum(has_label)))
    num_labels = (before[ends] - before[starts]).tolist()
    return [
        Document(ids[start:end], has_label[start:end], key)
        for (start, end, key), count in zip(pieces, num_labels, strict=True)
        if count
    ]


def _too_long(example: Example, num_tokens: int, block_length: int) -> DataError:
    return DataError(
        f"{example.place()}: example has {num_tokens} tokens, more than "
        f"data.block_length={block_length}: raise block_length, "
        "or set data.overlong: truncate, split or drop"
    )

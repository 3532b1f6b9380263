"""Tokenise a segment as the continuation of the text before it.

Some tokenizers (Llama 2's, Mistral 7B's, TinyLlama's) write a blank before each text, so a segment
that is tokenised alone begins with a token that the base model never saw there. For those each
segment is tokenised after a few characters whose tokens are then taken off again.

In: a tokenizer, the function that gives its token ids, segments. Out: token ids of each segment; no
token reaches over a border, as none does when the model writes after a prompt.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from orchestrator.data.formats import Segment, Tokenizer
from orchestrator.data.token_ids import Ids, TokenIds

# Characters that few vocabularies have at the beginning or within a longer token.
SEPARATORS = "\n\t\x01\ue000~^`"
PROBE = "hello"


def continuations(tokenizer: Tokenizer, token_ids: TokenIds) -> "Continuations | None":
    """None where a text has the same tokens alone as after another, as with byte-level ones."""
    (alone,) = token_ids([PROBE])
    usable = []
    for separator in SEPARATORS:
        before, together = token_ids([separator, separator + PROBE])
        if before and tokenizer.unk_token_id not in before and _begins(together, before):
            if together[len(before) :] == alone:
                return None
            usable.append(separator)
    if not usable:
        return None
    vocabulary = tokenizer.get_vocab()
    safe = (separator for separator in usable if _ends_tokens(separator, vocabulary))
    return Continuations(tokenizer, token_ids, next(safe, usable[0]))


class Continuations:
    def __init__(self, tokenizer: Tokenizer, token_ids: TokenIds, separator: str) -> None:
        self._token_ids = token_ids
        self._separator = separator
        self._begin_token = tokenizer.bos_token
        added: list[Any] = [
            token
            for token in tokenizer.added_tokens_decoder.values()
            if not (token.special and tokenizer.split_special_tokens)
        ]
        self._added = tuple(token.content for token in added)
        self._added_with_blanks = tuple(token.content for token in added if token.rstrip)
        self._ids_before: dict[str, Ids] = {"": array("I")}

    def token_ids(self, examples: Iterable[Sequence[Segment]]) -> Iterator[Ids]:
        """Of all segments, one after another."""
        pairs = [pair for segments in examples for pair in self._with_contexts(segments)]
        found = self._token_ids([context + text for context, text in pairs])
        for (context, text), ids in zip(pairs, found, strict=True):
            before = self._context_ids(context)
            if _begins(ids, before):
                yield ids[len(before) :]
            else:  # the text's first character changes the one before it, as an accent may
                yield from self._token_ids([text])

    def _with_contexts(self, segments: Sequence[Segment]) -> Iterator[tuple[str, str]]:
        before = ""
        for text, _ in segments:
            # A prompt after a begin token that stands alone is tokenised alone when it is served.
            is_first = before in ("", self._begin_token)
            yield "" if is_first else self._context(before), text
            before = text if text.strip() else before + text

    def _context(self, before: str) -> str:
        """After an added token some tokenizers begin a text anew, after all else none does."""
        for names, text in (
            (self._added, before),
            (self._added_with_blanks, before.rstrip()),
        ):
            if text.endswith(names):
                longest = max(len(name) for name in names if text.endswith(name))
                return before[len(text) - longest :]
        return self._separator

    def _context_ids(self, context: str) -> Ids:
        if context not in self._ids_before:
            (self._ids_before[context],) = self._token_ids([context])
        return self._ids_before[context]


def _begins(ids: Ids, before: Ids) -> bool:
    return ids[: len(before)] == before


def _ends_tokens(separator: str, vocabulary: Iterable[str]) -> bool:
    """No token goes on after it."""
    from tokenizers.pre_tokenizers import ByteLevel

    ((written, _),) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(separator)
    last = (separator[-1], written[-1])
    return not any(char in token[:-1] for token in vocabulary for char in last)

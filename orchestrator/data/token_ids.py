"""Token ids of texts: by the tokenizers library, or the same ids in a fraction of the time, by
remembering those of each pre-token.

A byte-level BPE cuts text into pre-tokens (words, more or less) and encodes each of them by itself.
Most of them were seen before. So here Python's regex engines cut, and only pre-tokens that are not
remembered go to the library's own model, so that merges and their order are the library's affair.
Texts that may be cut in another way go to the library whole, and so do all texts of tokenizers of
another form.

In: a tokenizer, and some texts to try it on. Out: a function that gives token ids, and which it is,
and why. transformers and tokenizers are imported inside functions.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple, TypeAlias

from orchestrator.data.formats import Tokenizer
from orchestrator.data.pretokens import PreTokens, published_pattern, state

Ids: TypeAlias = "array[int]"  # of type code I
TokenIds = Callable[[list[str]], Iterable[Ids]]

# At about 200 bytes each. A shard of 8 MiB of English has some 25,000 of them.
REMEMBERED = 1 << 18
LONGEST_REMEMBERED = 64  # characters
# The library remembers 10,000 words by itself; ten times as many make it 8 % faster.
REMEMBERED_BY_LIBRARY = 100_000
# Of a shard's own text, encoded in both ways first: 10 ms.
SAMPLE_CHARS = 1 << 14

# One of each class that patterns tell apart; all strings of three of them are tried.
CLASSES = "as\u0301\u4e2d1\u00b2 \n\r\t\u00a0'!<"
HARD_TEXTS = (
    "I'll say WE'VE 'REally don't, o'clock 'S '\u017f \u212a'\u212a''s",
    "0 12 345 6789 1,234.5 \u0663\u0664 \u2167 1a2b  33",
    "  two\n\n\n  lines \r\n\r\n\ttab \t\n end  \n",
    "\u00a0\u2003x\u3000\u2028y\x85z\x1c\x1d\x00\x0b\x0c\x7f\ufeff",
    "e\u0301 \u0958 \uac00 \u1112\u1161\u11ab \u0e01\u0e33 \u0915\u094d\u0937\u093f \ufb01 \u2126",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1ef\U0001f1f5\u2764\ufe0f\U0001f3fd",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002 \u0645\u0631\u062d\u0628\u0627\u061f",
    "x" * 3000 + "!" * 300 + " " * 300 + "\n" * 300 + "\u00e9" * 300 + "1" * 300,
    "\U0010ffff\ue000\ufffd\u0378",
)
BESIDE_ADDED = (("a", " "), (" ", "a"), ("<", ">"), ("\n", "1"))


class Way(NamedTuple):
    token_ids: TokenIds
    description: str


def fastest_way(tokenizer: Tokenizer, sample: Sequence[str]) -> Way:
    """The sample is encoded in both ways before the faster one is trusted with the rest."""
    from_library = _library_ids(tokenizer)
    known = (
        "split_special_tokens is set" if tokenizer.split_special_tokens else remembering(tokenizer)
    )
    if isinstance(known, str):
        why_not = known
    elif (text := _first_difference(known, from_library, _begin(sample))) is not None:
        why_not = _differs(text)
    else:
        return Way(known, "remembered for each pre-token")
    _remember_words(tokenizer)
    return Way(from_library, f"from the tokenizers library alone, since {why_not}")


class RememberedIds:
    """Ids of texts under a tokenizer of a known form."""

    def __init__(self, backend: Any, pattern: str, capacity: int = REMEMBERED) -> None:
        self._backend = backend
        self._pre_tokens = PreTokens(backend.pre_tokenizer, pattern)
        self._remembered = _Memory(backend.model, capacity)
        self._normalized = backend.normalizer.normalize_str if backend.normalizer else None
        decoder = backend.get_added_tokens_decoder()
        added = [(i, token) for i, token in decoder.items() if token.content]
        self._added = {token.content: array("I", [i]).tobytes() for i, token in added}
        self._parts, self._normalized_parts = (
            _splitter([token.content for _, token in added if token.normalized == normalized])
            for normalized in (False, True)
        )

    def __call__(self, texts: list[str]) -> Iterable[Ids]:
        return map(self._ids, texts)

    def _ids(self, text: str) -> Ids:
        found: list[bytes] = []
        for i, part in enumerate(self._parts(text)):  # text and added token by turns
            if i % 2:
                found.append(self._added[part])
                continue
            if self._normalized and not part.isascii():
                part = self._normalized(part)
            for j, piece in enumerate(self._normalized_parts(part)):
                if j % 2:
                    found.append(self._added[piece])
                    continue
                pre_tokens = self._pre_tokens(piece)
                if pre_tokens is None:
                    return array("I", self._backend.encode(text, add_special_tokens=False).ids)
                found += map(self._remembered.__getitem__, pre_tokens)
        return array("I", b"".join(found))


class _Memory(dict[str, bytes]):
    """Ids of pre-tokens. When it is full all are forgotten: the frequent ones soon come again."""

    def __init__(self, model: Any, capacity: int) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        super().__init__()
        self._model = model
        self._capacity = capacity
        self._char_of_byte = bytes_to_unicode()

    def __missing__(self, pre_token: str) -> bytes:
        # The vocabulary has a character for each byte.
        chars = pre_token.encode().decode("latin-1").translate(self._char_of_byte)
        ids = array("I", [token.id for token in self._model.tokenize(chars)]).tobytes()
        if len(pre_token) <= LONGEST_REMEMBERED:
            if len(self) >= self._capacity:
                self.clear()
            self[pre_token] = ids
        return ids


def _splitter(names: list[str]) -> Callable[[str], list[str]]:
    """Cuts text at the longest of the names that begins first."""
    if not names:
        return lambda text: [text]
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})").split


@lru_cache(maxsize=2)
def remembering(tokenizer: Tokenizer) -> RememberedIds | str:
    """What has remembered none yet, after a trial with hard texts; or why there is nothing."""
    if not _is_backend_alone(tokenizer):
        return "its class prepares texts by itself"
    backend: Any = tokenizer.backend_tokenizer
    pattern, why_not = _known_form(backend)
    if pattern is None:
        return why_not
    found = RememberedIds(backend, pattern)
    contents = [token.content for token in backend.get_added_tokens_decoder().values()]
    beside = (f"{before}{name}{after}" for name in contents for before, after in BESIDE_ADDED)
    texts = [*map("".join, product(CLASSES, repeat=3)), *HARD_TEXTS, *beside, "".join(contents)]
    text = _first_difference(found, _library_ids(tokenizer), texts)
    return found if text is None else _differs(text)


def _known_form(backend: Any) -> tuple[str | None, str]:
    """The pattern that cuts text into pre-tokens, or why that is not known."""
    from tokenizers.models import BPE

    normalizer, pre_tokenizer = state(backend.normalizer), state(backend.pre_tokenizer)
    added = backend.get_added_tokens_decoder().values()
    pattern = published_pattern(pre_tokenizer) if pre_tokenizer else None
    if not isinstance(backend.model, BPE) or backend.model.dropout:
        return None, "its model is no BPE, or has dropout"
    if normalizer not in (None, {"type": "NFC"}):
        return None, f"its normalizer {normalizer['type']} is not NFC"
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return None, "some of its added tokens take blanks or whole words alone"
    if normalizer and any(token.normalized and not token.content.isascii() for token in added):
        return None, "some of its added tokens are normalized"
    if pattern is None:
        return None, "its pre-tokenizer is none of the known ones"
    return pattern, ""


def _begin(texts: Iterable[str]) -> list[str]:
    """The first characters of all of them."""
    begin, left = [], SAMPLE_CHARS
    for text in texts:
        if left <= 0:
            break
        begin.append(text[:left])
        left -= len(text)
    return begin


def _differs(text: str) -> str:
    return f"the ids of {text[:40]!r} would be others"


def _first_difference(found: TokenIds, expected: TokenIds, texts: list[str]) -> str | None:
    for text, ids, others in zip(texts, found(texts), expected(texts), strict=True):
        if ids != others:
            return text
    return None


def _is_backend_alone(tokenizer: Tokenizer) -> bool:
    from transformers import PreTrainedTokenizerFast

    # Some classes prepare the text first, in a method of their own.
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus
    )


def _library_ids(tokenizer: Tokenizer) -> TokenIds:
    if _is_backend_alone(tokenizer):
        backend: Any = tokenizer.backend_tokenizer
        # As the tokenizer's own call has it.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
        return lambda texts: (
            array("I", encoding.ids)
            for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
        )
    return lambda texts: (
        array("I", ids)
        for ids in tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
    )


def _remember_words(tokenizer: Tokenizer) -> None:
    from tokenizers.models import BPE, Unigram

    if tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.model, (BPE, Unigram)):
        tokenizer.backend_tokenizer.model._resize_cache(REMEMBERED_BY_LIBRARY)

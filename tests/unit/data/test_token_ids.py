"""Remembered ids against the tokenizers library's, for tokenizers trained here in each form that is
known."""

import json
import sys
from collections.abc import Callable, Iterator
from itertools import chain, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from orchestrator.data.formats import Tokenizer
from orchestrator.data.pretokens import GPT2, LLAMA3, PROBE, QWEN2, PreTokens, published_pattern
from orchestrator.data.token_ids import HARD_TEXTS, RememberedIds, fastest_way, remembering

TEXTS = [
    *HARD_TEXTS,
    "The quick brown fox doesn't jump over 12 lazy dogs, and they've slept since 1984.\n\n" * 3,
    "    def words(self):\n        return [word for word in self.text.split() if word]\n" * 3,
    "Gr\u00f6\u00dfe \u00e9t\u00e9 se\u00f1or \u0434\u043e\u0431\u0440\u044b\u0439 \u4f60\u597d"
    * 3,
]
SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>", "<|im_start|>user")

ByteLevel = pre_tokenizers.ByteLevel


def _byte_level_after(first: Any, use_regex: bool = False) -> Any:
    return pre_tokenizers.Sequence([first, ByteLevel(add_prefix_space=False, use_regex=use_regex)])


def _split(pattern: str) -> Any:
    return _byte_level_after(pre_tokenizers.Split(Regex(pattern), "isolated"))


def _backend(pre_tokenizer: Any, normalizer: Any = None, **model: Any) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    for name, value in model.items():
        setattr(backend.model, name, value)
    if normalizer:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    # GPT-NeoX has runs of blanks.
    backend.add_tokens([AddedToken(" " * n, normalized=True) for n in (2, 4)])
    return backend


def _tokenizer(backend: Backend, kind: Any = PreTrainedTokenizerFast, **more: Any) -> Tokenizer:
    return kind(tokenizer_object=backend, eos_token="<|end|>", **more)


KNOWN = {
    "GPT-2": lambda: _backend(ByteLevel(add_prefix_space=False)),
    "SmolLM": lambda: _backend(_byte_level_after(pre_tokenizers.Digits(True), use_regex=True)),
    "Llama 3": lambda: _backend(_split(LLAMA3), ignore_merges=True),
    "Qwen 2": lambda: _backend(_split(QWEN2), normalizers.NFC()),
}
BACKENDS = {name: make() for name, make in KNOWN.items()}


def _library(name: str, texts: list[str]) -> list[list[int]]:
    found = BACKENDS[name].encode_batch(texts, add_special_tokens=False)
    return [encoding.ids for encoding in found]


def _remembered(name: str, capacity: int = 20) -> Callable[[list[str]], list[list[int]]]:
    backend = BACKENDS[name]
    pattern = published_pattern(json.loads(backend.pre_tokenizer.__getstate__()))
    assert pattern is not None
    ids = RememberedIds(backend, pattern, capacity)
    return lambda texts: [found.tolist() for found in ids(texts)]


REMEMBERED = {name: _remembered(name) for name in KNOWN}
PIECES = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [*SPECIAL, *TEXTS, "<|im_", "end|>", "   ", "\r\n", "'LL", "e\u0301", "\u017f"]
    ),
    st.text("abs' \n\r\t1\u0661!\u00e9\u0301\u4e2d\u00a0\u2028", max_size=30),
    st.integers(min_value=0).map(str),
)


@pytest.mark.parametrize("name", KNOWN)
def test_published_forms_are_remembered(name: str) -> None:
    way = fastest_way(_tokenizer(BACKENDS[name]), TEXTS)
    assert way.description == "remembered for each pre-token"
    assert [ids.tolist() for ids in way.token_ids(TEXTS)] == _library(name, TEXTS)


@pytest.mark.parametrize("name", KNOWN)
@settings(max_examples=300)
@given(texts=st.lists(st.lists(PIECES, max_size=6).map("".join), max_size=3))
def test_remembered_ids_are_the_librarys(name: str, texts: list[str]) -> None:
    # Few are remembered, so that they are forgotten again and again.
    assert REMEMBERED[name](texts) == _library(name, texts)


@pytest.mark.parametrize("name", KNOWN)
def test_all_short_texts_of_all_classes_of_characters_are_cut_alike(name: str) -> None:
    texts = [*map("".join, product("as1 \n\t'!\u00e9\u00a0", repeat=4))]
    assert REMEMBERED[name](texts) == _library(name, texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_every_character_has_the_librarys_ids_in_all_surroundings(name: str) -> None:
    # Of those from 0x40000 on, private or of no version yet, each hundredth.
    ranges = range(0xD800), range(0xE000, 0x40000), range(0x40000, sys.maxunicode + 1, 100)
    codes = [*chain.from_iterable(ranges)]
    for first in range(0, len(codes), 10_000):
        texts = [PROBE.format(chr(code)) for code in codes[first : first + 10_000]]
        assert REMEMBERED[name](texts) == _library(name, texts)


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3, QWEN2])
def test_texts_with_characters_of_another_unicode_table_are_not_cut(pattern: str) -> None:
    """A library in whose table only Latin has letters."""
    cut = PreTokens(_split(pattern.replace(r"\p{L}", r"\p{Latin}")), pattern)
    assert cut("\u00e9t\u00e9!") == ["\u00e9t\u00e9", "!"]
    assert cut("\u00e9t\u00e9 \u03b1") is None


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize(
    "unit", ["a", "ab", "1", " ", " \n", "!", "'", "\u00e9", "\u4e2d", "<|im_"]
)
def test_a_text_of_half_a_million_characters_without_a_border_is_no_trouble(
    name: str, unit: str
) -> None:
    text = unit * (500_000 // len(unit)) + "x"
    assert REMEMBERED[name]([text]) == _library(name, [text])


@pytest.mark.parametrize("name", KNOWN)
def test_half_a_surrogate_is_refused_as_the_library_does(name: str) -> None:
    for encode in (REMEMBERED[name], lambda texts: _library(name, texts)):
        with pytest.raises((TypeError, UnicodeEncodeError)):
            encode(["a\ud800b"])


class TokenizerThatPrepares(PreTrainedTokenizerFast):
    def _encode_plus(self, text: list[str], **more: Any) -> Any:
        return super()._encode_plus([item.lower() for item in text], **more)


def _adding(token: AddedToken) -> Tokenizer:
    backend = _backend(ByteLevel(add_prefix_space=False))
    backend.add_tokens([token])
    return _tokenizer(backend)


def _unigram() -> Backend:
    backend = Backend(models.Unigram([("a", -1.0), ("<|end|>", -1.0)], unk_id=0))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return backend


def _others() -> Iterator[tuple[str, Callable[[], Tokenizer], str]]:
    gpt2 = ByteLevel(add_prefix_space=False)
    of = _tokenizer
    yield "class", lambda: of(_backend(gpt2), TokenizerThatPrepares), "prepares texts by itself"
    yield "split", lambda: of(_backend(gpt2), split_special_tokens=True), "split_special_tokens"
    yield "model", lambda: of(_unigram()), "its model is no BPE"
    yield "dropout", lambda: of(_backend(gpt2, dropout=0.1)), "or has dropout"
    yield "NFKC", lambda: of(_backend(gpt2, normalizers.NFKC())), "NFKC is not NFC"
    yield "prefix", lambda: of(_backend(ByteLevel(add_prefix_space=True))), "its pre-tokenizer"
    yield "regex", lambda: of(_backend(_split(r"\w+|\W+"))), "its pre-tokenizer"
    yield "strip", lambda: _adding(AddedToken("<x>", rstrip=True)), "take blanks"
    yield "word", lambda: _adding(AddedToken("x", single_word=True)), "whole words alone"


@pytest.mark.parametrize(
    ("make", "why_not"), [pytest.param(*rest, id=name) for name, *rest in _others()]
)
def test_other_forms_are_left_to_the_library(make: Callable[[], Tokenizer], why_not: str) -> None:
    way = fastest_way(make(), [])
    assert way.description.startswith("from the tokenizers library alone, since ")
    assert why_not in way.description


def test_a_sample_with_other_ids_leaves_all_to_the_library() -> None:
    tokenizer = _tokenizer(_backend(ByteLevel(add_prefix_space=False)))
    assert isinstance(remembering(tokenizer), RememberedIds)
    backend = tokenizer.backend_tokenizer
    backend.add_tokens(["zebra"])  # after the remembering began
    assert fastest_way(tokenizer, ["horse"]).description == "remembered for each pre-token"
    way = fastest_way(tokenizer, ["horse", "a zebra"])
    assert way.description.endswith("since the ids of 'a zebra' would be others")
    expected = backend.encode("a zebra", add_special_tokens=False).ids
    assert [ids.tolist() for ids in way.token_ids(["a zebra"])] == [expected]

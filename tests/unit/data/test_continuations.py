"""Tokenizers that write a blank before each text, made by hand."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from orchestrator.data.continuations import continuations
from orchestrator.data.formats import RowFormat, Segment, Tokenizer, segments
from orchestrator.data.tokenizing import Example, tokenize
from orchestrator.data_config import FieldNames

# As Mistral 7B's.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MERGES = [("\u2581", "h"), ("h", "e"), ("Q", "A"), ("\u2581", "4")]


def _tokenizer(prefix: str, merges: list[tuple[str, str]]) -> Tokenizer:
    words = ["<unk>", "<s>", "</s>", "<|x|>", "\u2581", "\u0120", "\u010a", *string.printable]
    words += [a + b for a, b in merges]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    if prefix == "normalizer":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    elif prefix == "byte_level":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    backend.decoder = decoders.Metaspace()
    special = [AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>")]
    taking_blanks = AddedToken("<|x|>", special=True, normalized=False, rstrip=True)
    backend.add_special_tokens([*special, taking_blanks])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


PREFIXES = ("normalizer", "always", "first", "byte_level")
TOKENIZERS = {prefix: _tokenizer(prefix, []) for prefix in PREFIXES}
MERGING = {prefix: _tokenizer(prefix, MERGES) for prefix in PREFIXES}


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _document(tokenizer: Tokenizer, parts: tuple[Segment, ...]) -> tuple[list[int], list[int]]:
    """All token ids, and those that are learned."""
    example = Example(lambda: "data.jsonl:1", bytes(32), parts)
    (document,) = tokenize([example], tokenizer, 1000, "error").documents
    ids = document.input_ids.tolist()
    return ids, [ids[t + 1] for t, has in enumerate(document.has_label) if has]


@pytest.mark.parametrize("prefix", PREFIXES)
@settings(max_examples=100)
@given(st.lists(st.sampled_from(["", " ", "a", " he", "\n", "QA ", "b</s>", "c<|x|>", "<|x|> \n"])))
def test_segments_have_the_tokens_of_the_joined_text(prefix: str, texts: list[str]) -> None:
    tokenizer = TOKENIZERS[prefix]
    texts = ["first", *texts, "last"]
    parts = tuple(Segment(text, has_loss=True) for text in texts)
    assert _document(tokenizer, parts)[0] == _ids(tokenizer, "".join(texts))


@pytest.mark.parametrize("tokenizers", [TOKENIZERS, MERGING])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_chat_has_the_tokens_of_the_rendered_text(
    prefix: str, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[prefix]
    turns = [("user", "hi"), ("assistant", "he"), ("user", "b"), ("assistant", "he")]
    messages = [{"role": role, "content": content} for role, content in turns]
    form = RowFormat("chat", "plain", FieldNames())
    ids, learned = _document(tokenizer, segments({"messages": messages}, form, tokenizer))
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    answer = _ids(tokenizer, "[/INST] he</s>")[len(_ids(tokenizer, "[/INST]")) :]
    assert learned == answer * 2


@pytest.mark.parametrize("prefix", PREFIXES)
def test_completion_has_the_tokens_that_are_generated_after_the_prompt(prefix: str) -> None:
    tokenizer = MERGING[prefix]
    form = RowFormat("prompt_completion", "plain", FieldNames())
    parts = segments({"prompt": "Q", "completion": "A4"}, form, tokenizer)
    ids, learned = _document(tokenizer, parts)
    # "QA" is a token too, but a prompt's last token is chosen before the answer is known.
    assert ids == _ids(tokenizer, "Q") + learned
    assert tokenizer.convert_ids_to_tokens(learned) == ["A", "4", "</s>"]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prompt_after_a_begin_token_is_tokenised_as_when_it_is_served(prefix: str) -> None:
    tokenizer = MERGING[prefix]
    parts = (
        Segment("<s>", has_loss=False),
        Segment("he", has_loss=False),
        Segment("4", has_loss=True),
    )
    ids, learned = _document(tokenizer, parts)
    assert ids == [tokenizer.bos_token_id, *_ids(tokenizer, "he"), *learned]
    assert tokenizer.convert_ids_to_tokens(learned) == ["4"]


def test_special_tokens_that_are_text_begin_nothing_anew() -> None:
    tokenizer = _tokenizer("always", [])
    tokenizer.split_special_tokens = True
    texts = ("a", "</s>", "b")
    ids, _ = _document(tokenizer, tuple(Segment(text, has_loss=True) for text in texts))
    assert tokenizer.convert_ids_to_tokens(ids) == ["\u2581", *"a</s>b"]


def test_tokenizer_without_a_prefix_needs_no_context(tokenizer: Tokenizer) -> None:
    plain = _tokenizer("never", MERGES)
    for each in (tokenizer, plain):
        assert continuations(each, lambda texts, each=each: [_ids(each, t) for t in texts]) is None

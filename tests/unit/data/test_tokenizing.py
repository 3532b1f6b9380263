import gc
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from orchestrator.data.formats import Segment, Tokenizer
from orchestrator.data.tokenizing import (
    BATCH_CHARS,
    Document,
    Example,
    Tokenized,
    load_tokenizer,
    tokenize,
    tokenizer_digest,
)
from orchestrator.data_config import Overlong
from orchestrator.errors import BaseModelError, DataError

KEY = bytes(32)


def _example(*texts: tuple[str, bool], key: bytes = KEY) -> Example:
    return Example(lambda: "data.jsonl:7", key, tuple(Segment(text, loss) for text, loss in texts))


def _tokenize(
    tokenizer: Tokenizer, *examples: Example, overlong: Overlong = "error", block_length: int = 8
) -> Tokenized:
    return tokenize(iter(examples), tokenizer, block_length, overlong)


def _labels(document: Document) -> list[int | None]:
    ids = [*document.input_ids.tolist()[1:], None]
    return [ids[t] if has else None for t, has in enumerate(document.has_label)]


def test_labels_are_the_next_token_where_that_has_loss(tokenizer: Tokenizer) -> None:
    example = _example(("ab", False), ("cd<|end|>", True), ("ef", False))
    (document,) = _tokenize(tokenizer, example).documents
    a, b, c, d, end, e, f = document.input_ids.tolist()
    assert tokenizer.decode([a, b, c, d, end, e, f]) == "abcd<|end|>ef"
    assert _labels(document) == [None, c, d, end, None, None, None]
    assert end == tokenizer.eos_token_id
    assert (document.input_ids.dtype, document.has_label.dtype) == (np.int32, np.bool_)


def test_documents_keep_the_order_of_the_examples(tokenizer: Tokenizer) -> None:
    examples = [_example((text, False), ("!", True)) for text in ("a", "bcd", "ef")]
    found = _tokenize(tokenizer, *examples).documents
    assert [tokenizer.decode(document.input_ids) for document in found] == ["a!", "bcd!", "ef!"]


def test_too_long_example_is_an_error_that_names_the_choices(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError) as caught:
        _tokenize(tokenizer, _example(("123456789", True)))
    assert str(caught.value) == (
        "data.jsonl:7: example has 9 tokens, more than data.block_length=8: "
        "raise block_length, or set data.overlong: truncate, split or drop"
    )


def test_garbage_is_collected_again_after_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError):
        _tokenize(tokenizer, _example(("123456789", True)))
    assert gc.isenabled()


def test_too_long_example_is_truncated_or_dropped_and_counted(tokenizer: Tokenizer) -> None:
    examples = [_example(("123456789", True)), _example(("12345678", True))]
    cut = _tokenize(tokenizer, *examples, overlong="truncate")
    assert [len(document.input_ids) for document in cut.documents] == [8, 8]
    assert [document.has_label.tolist() for document in cut.documents] == [[True] * 7 + [False]] * 2
    assert (cut.truncated, cut.split, cut.dropped) == (1, 0, 0)
    kept = _tokenize(tokenizer, *examples, overlong="drop")
    assert len(kept.documents) == 1
    assert (kept.truncated, kept.split, kept.dropped) == (0, 0, 1)


def test_too_long_example_is_split_into_documents_with_keys_of_their_own(
    tokenizer: Tokenizer,
) -> None:
    found = _tokenize(tokenizer, _example(("1234567890abcdefgh", True)), overlong="split")
    texts = [tokenizer.decode(document.input_ids) for document in found.documents]
    assert texts == ["12345678", "90abcdef", "gh"]
    assert [document.has_label.sum() for document in found.documents] == [7, 7, 1]
    assert not any(document.has_label[-1] for document in found.documents)
    first, second, third = (document.key for document in found.documents)
    assert first == KEY
    assert second == sha256(KEY + (1).to_bytes(8, "little")).digest()
    assert len({first, second, third}) == 3
    assert (found.split, found.truncated, found.without_loss) == (1, 0, 0)


def test_pieces_without_a_label_are_left_out_and_counted(tokenizer: Tokenizer) -> None:
    example = _example(("1234567812345678", False), ("x12345678y", True))
    found = _tokenize(tokenizer, example, overlong="split")
    # The first two have no loss; the last one's only labels are those within it.
    assert [tokenizer.decode(d.input_ids) for d in found.documents] == ["x1234567", "8y"]
    assert found.without_loss == 2
    assert found.documents[0].key == sha256(KEY + (2).to_bytes(8, "little")).digest()


def test_example_without_loss_is_left_out_and_counted(tokenizer: Tokenizer) -> None:
    cut_before_loss = _example(("12345678", False), ("x", True))
    only_first_token = _example(("x", True), ("y", False))
    found = _tokenize(tokenizer, cut_before_loss, _example(), only_first_token, overlong="truncate")
    assert found.documents == []
    assert (found.truncated, found.without_loss) == (1, 3)


def test_no_examples_make_no_documents(tokenizer: Tokenizer) -> None:
    assert _tokenize(tokenizer).documents == []


def test_many_batches_make_the_same_documents_as_each_example_alone(tokenizer: Tokenizer) -> None:
    long = "ab " * (BATCH_CHARS // 5)
    examples = [
        _example((long[:size], size % 2 == 0), ("!?", True), key=size.to_bytes(32, "big"))
        for size in (1, len(long), 2, len(long) // 2, len(long) - 7, 3, 0)
    ]
    settings: dict[str, Any] = {"overlong": "split", "block_length": BATCH_CHARS // 2}
    together = _tokenize(tokenizer, *examples, **settings)
    alone = [_tokenize(tokenizer, example, **settings) for example in examples]
    assert together.split == sum(found.split for found in alone) > 0
    expected = [document for found in alone for document in found.documents]
    for document, other in zip(together.documents, expected, strict=True):
        assert np.array_equal(document.input_ids, other.input_ids)
        assert np.array_equal(document.has_label, other.has_label)
        assert document.key == other.key


class TokenizerThatPrepares(PreTrainedTokenizerFast):
    """Some classes prepare texts before the backend sees them."""

    def _encode_plus(self, text: list[str], **settings: Any) -> Any:
        return super()._encode_plus([item.lower() for item in text], **settings)


def _backend() -> Backend:
    """With all that could go wrong beside the model: it changes text, adds tokens, cuts and pads,
    and its special tokens take the blanks beside them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: index for index, word in enumerate([*alphabet, "ab", "aba", "\u0120a"])}
    merges = [("a", "b"), ("ab", "a"), ("\u0120", "a")]
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.add_special_tokens(["<s>", "</s>"])
    ends = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    backend.enable_truncation(3)
    backend.enable_padding(length=20)
    return backend


def _tokenizers() -> Iterator[tuple[str, Tokenizer]]:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    yield "fast", PreTrainedTokenizerFast(tokenizer_object=_backend(), **names)
    yield (
        "special tokens are text",
        PreTrainedTokenizerFast(tokenizer_object=_backend(), split_special_tokens=True, **names),
    )
    yield "prepares texts", TokenizerThatPrepares(tokenizer_object=_backend(), **names)


TOKENIZERS = dict(_tokenizers())


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=50)
@given(
    texts=st.lists(
        st.text(max_size=20)
        | st.lists(st.sampled_from("a b A \ufb01 <s> </s>".split())).map("".join),
        min_size=1,
        max_size=5,
    )
)
def test_tokens_are_those_of_the_tokenizers_own_call(name: str, texts: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    examples = [_example((text, True)) for text in texts]
    # Another call leaves its settings.
    tokenizer(["x"], padding="max_length", truncation=True, max_length=4)
    tokenizer.backend_tokenizer.encode_special_tokens = not tokenizer.split_special_tokens
    found = _tokenize(tokenizer, *examples, block_length=1000)
    labelled = [ids for ids in expected if len(ids) > 1]
    assert [document.input_ids.tolist() for document in found.documents] == labelled
    assert found.without_loss == len(expected) - len(labelled)


def test_digest_changes_with_the_chat_template(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    before = tokenizer_digest(tmp_path)
    (tmp_path / "weights.bin").write_text("not the tokenizer's")
    assert tokenizer_digest(tmp_path) == before
    (tmp_path / "chat_template.jinja").write_text("x")
    assert tokenizer_digest(tmp_path) != before


def test_digest_changes_with_a_further_chat_template(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    digests = [tokenizer_digest(tmp_path)]
    (tmp_path / "additional_chat_templates").mkdir()
    template = tmp_path / "additional_chat_templates" / "tool_use.jinja"
    for text in ("a", "b"):
        template.write_text(text)
        digests.append(tokenizer_digest(tmp_path))
    template.rename(template.with_name("rag.jinja"))
    assert len({*digests, tokenizer_digest(tmp_path)}) == 4


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="must hold a tokenizer"):
        tokenizer_digest(tmp_path)
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))

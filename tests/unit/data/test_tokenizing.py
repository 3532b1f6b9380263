from pathlib import Path

import pytest

from orchestrator.config import DataConfig
from orchestrator.data.formats import Segment, Tokenizer
from orchestrator.data.tokenizing import (
    IGNORED,
    Example,
    load_tokenizer,
    tokenize,
    tokenizer_digest,
)
from orchestrator.errors import BaseModelError, DataError


def _example(*texts: tuple[str, bool]) -> Example:
    return Example("data.jsonl:7", "k", tuple(Segment(text, loss) for text, loss in texts))


def _config(overlong: str = "error", block_length: int = 8) -> DataConfig:
    content = {"train": "x", "overlong": overlong, "block_length": block_length}
    return DataConfig.model_validate(content)


def test_labels_are_the_next_token_where_that_has_loss(tokenizer: Tokenizer) -> None:
    example = _example(("ab", False), ("cd<|end|>", True), ("ef", False))
    (document,) = tokenize([example], tokenizer, _config()).documents
    a, b, c, d, end, e, f = document.input_ids.tolist()
    assert tokenizer.decode([a, b, c, d, end, e, f]) == "abcd<|end|>ef"
    assert document.labels.tolist() == [IGNORED, c, d, end, IGNORED, IGNORED, IGNORED]
    assert end == tokenizer.eos_token_id


def test_documents_keep_the_order_of_the_examples(tokenizer: Tokenizer) -> None:
    examples = [_example((text, False), ("!", True)) for text in ("a", "bcd", "ef")]
    found = tokenize(examples, tokenizer, _config()).documents
    assert [tokenizer.decode(document.input_ids) for document in found] == ["a!", "bcd!", "ef!"]


def test_too_long_example_is_an_error_that_names_the_choices(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError) as caught:
        tokenize([_example(("123456789", True))], tokenizer, _config())
    assert str(caught.value) == (
        "data.jsonl:7: example has 9 tokens, more than data.block_length=8: "
        "raise block_length, or set data.overlong: truncate or drop"
    )


def test_too_long_example_is_truncated_or_dropped_and_counted(tokenizer: Tokenizer) -> None:
    examples = [_example(("123456789", True)), _example(("12345678", True))]
    cut = tokenize(examples, tokenizer, _config("truncate"))
    assert [len(document.input_ids) for document in cut.documents] == [8, 8]
    assert cut.documents[0].labels[-1] == IGNORED
    assert (cut.truncated, cut.dropped) == (1, 0)
    kept = tokenize(examples, tokenizer, _config("drop"))
    assert len(kept.documents) == 1
    assert (kept.truncated, kept.dropped) == (0, 1)


def test_example_without_loss_is_left_out_and_counted(tokenizer: Tokenizer) -> None:
    cut_before_loss = _example(("12345678", False), ("x", True))
    found = tokenize([cut_before_loss, _example()], tokenizer, _config("truncate"))
    assert found.documents == []
    assert (found.truncated, found.without_loss) == (1, 2)


def test_digest_changes_with_the_chat_template(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    before = tokenizer_digest(tmp_path)
    (tmp_path / "weights.bin").write_text("not the tokenizer's")
    assert tokenizer_digest(tmp_path) == before
    (tmp_path / "chat_template.jinja").write_text("x")
    assert tokenizer_digest(tmp_path) != before


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="must hold a tokenizer"):
        tokenizer_digest(tmp_path)
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))

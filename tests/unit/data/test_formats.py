import hashlib
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.formats import (
    FORMATS,
    RowFormat,
    Segment,
    Tokenizer,
    example_key,
    row_format,
    segments,
)
from orchestrator.data.slices import RowProblem
from orchestrator.data_config import DataConfig, FieldNames, FormatName


def _format(name: FormatName = "prompt_completion", **settings: Any) -> RowFormat:
    config = DataConfig.model_validate({"train": "x", "format": name, **settings})
    return row_format(config, config.train_sources[0])


def test_each_format_of_the_schema_is_known() -> None:
    assert set(FORMATS) == set(get_args(FormatName))


def test_a_sources_own_format_goes_before_that_of_the_data() -> None:
    own = {"path": "a", "format": "text", "fields": {"text": "body"}}
    config = DataConfig.model_validate({"train": ["b", own], "template": "plain", "format": "chat"})
    first, second = (row_format(config, source) for source in config.train_sources)
    assert first == RowFormat("chat", "plain", FieldNames())
    assert second == RowFormat("text", "plain", FieldNames(text="body"))


def test_loss_is_on_the_completion_and_its_end(tokenizer: Tokenizer) -> None:
    row = {"prompt": "2+2=", "completion": "4"}
    assert segments(row, _format(), tokenizer) == (
        Segment("2+2=", has_loss=False),
        Segment("4<|end|>", has_loss=True),
    )


def test_columns_may_have_other_names(tokenizer: Tokenizer) -> None:
    form = _format(fields={"prompt": "question", "completion": "answer"})
    found = segments({"question": "q", "answer": "a"}, form, tokenizer)
    assert [segment.text for segment in found] == ["q", "a<|end|>"]


def test_loss_is_on_all_of_a_text(tokenizer: Tokenizer) -> None:
    found = segments({"text": "hello"}, _format("text"), tokenizer)
    assert found == (Segment("hello<|end|>", has_loss=True),)


class TokenizerThatBegins:
    """As Llama's: it puts <s> before any text by itself."""

    bos_token = "<s>"
    bos_token_id = 1
    eos_token: str | None = "</s>"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1]}


@pytest.mark.parametrize("text", ["", " \n"])
def test_text_that_only_begins_and_ends_is_refused(text: str) -> None:
    with pytest.raises(RowProblem, match="'text' must not be empty"):
        segments({"text": text}, _format("text"), TokenizerThatBegins())


class TokenizerWithoutEnd(TokenizerThatBegins):
    eos_token = None


def test_a_text_begins_as_the_tokenizer_begins_it() -> None:
    found = segments({"text": "hello"}, _format("text"), TokenizerThatBegins())
    assert found == (Segment("<s>", has_loss=False), Segment("hello</s>", has_loss=True))


def test_template_chat_makes_two_turns_of_prompt_and_completion(tokenizer: Tokenizer) -> None:
    row = {"prompt": "hi", "completion": "ho"}
    assert segments(row, _format(template="chat"), tokenizer) == (
        Segment("<|user|>hi<|end|><|assistant|>", has_loss=False),
        Segment("ho<|end|>", has_loss=True),
    )


def test_instruction_gets_alpacas_headings(tokenizer: Tokenizer) -> None:
    row = {"instruction": "Add {these}.", "input": "1 and 2", "output": "3"}
    prompt, answer = segments(row, _format("instruction"), tokenizer)
    assert answer == Segment("3<|end|>", has_loss=True)
    assert prompt == Segment(
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {these}.\n\n### Input:\n1 and 2\n\n### Response:\n",
        has_loss=False,
    )


@pytest.mark.parametrize("given_input", [{}, {"input": ""}, {"input": None}])
def test_instruction_without_input_has_no_heading_for_it(
    tokenizer: Tokenizer, given_input: dict[str, Any]
) -> None:
    row = {"instruction": "Say hi.", "output": "hi"} | given_input
    prompt, _ = segments(row, _format("instruction"), tokenizer)
    assert prompt.text == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay hi.\n\n### Response:\n"
    )
    asked, _ = segments(row, _format("instruction", template="chat"), tokenizer)
    assert asked.text == "<|user|>Say hi.<|end|><|assistant|>"


def test_instruction_as_a_chat_has_its_input_after_a_blank_line(tokenizer: Tokenizer) -> None:
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    assert segments(row, _format("instruction", template="chat"), tokenizer) == (
        Segment("<|user|>Add.\n\n1, 2<|end|><|assistant|>", has_loss=False),
        Segment("3<|end|>", has_loss=True),
    )


def test_tokenizer_without_an_end_is_refused() -> None:
    row = {"prompt": "p", "completion": "c"}
    with pytest.raises(RowProblem, match="end-of-text token"):
        segments(row, _format(), TokenizerWithoutEnd())


NESTED: list[Any] = []
for _ in range(900):
    NESTED = [NESTED]

BAD_ROWS: list[tuple[dict[str, Any], FormatName, str]] = [
    (
        {"question": "q", "answer": "a"},
        "prompt_completion",
        "there is no column 'prompt', only 'question', 'answer': set data.fields.prompt",
    ),
    ({}, "text", "there is no column 'text', only an empty row: set data.fields.text"),
    (
        {"prompt": "p", "completion": 5},
        "prompt_completion",
        "'completion' must be text, but got int 5",
    ),
    (
        {"prompt": None, "completion": "c"},
        "prompt_completion",
        "must be text, but got NoneType None",
    ),
    ({"prompt": "p", "completion": ""}, "prompt_completion", "'completion' must not be empty"),
    ({"prompt": "p", "completion": " \n"}, "prompt_completion", "'completion' must not be empty"),
    ({"text": ""}, "text", "'text' must not be empty"),
    ({"text": "a\ud800"}, "text", "character 2 is half of a surrogate pair"),
    ({"text": ["x" * 100]}, "text", r"got list \['x+\.\.\."),
    ({"text": NESTED}, "text", r"must be text, but got list \[\[\[\.\.\.\]\]\]"),
    ({"instruction": "i"}, "instruction", "there is no column 'output'"),
    ({"output": "o"}, "instruction", "there is no column 'instruction'"),
    ({"instruction": "i", "output": ""}, "instruction", "'output' must not be empty"),
    (
        {"instruction": "i", "input": {"a": 1}, "output": "o"},
        "instruction",
        r"'input' must be text, but got dict \{'a': 1\}",
    ),
]


@pytest.mark.parametrize(("row", "name", "message"), BAD_ROWS)
def test_bad_row_is_refused_with_the_remedy(
    tokenizer: Tokenizer, row: dict[str, Any], name: FormatName, message: str
) -> None:
    with pytest.raises(RowProblem, match=message):
        segments(row, _format(name), tokenizer)
    with pytest.raises(RowProblem, match=message):
        example_key(row, _format(name))


def test_key_is_of_the_used_columns_values_alone() -> None:
    key = example_key({"prompt": "p", "completion": "c"}, _format())
    assert len(key) == 32
    assert example_key({"id": 7, "completion": "c", "prompt": "p"}, _format()) == key
    renamed = _format(fields={"prompt": "question"})
    assert example_key({"question": "p", "completion": "c"}, renamed) == key
    assert example_key({"prompt": "p", "completion": "C"}, _format()) != key


def test_runs_of_white_space_do_not_change_the_key() -> None:
    assert _text_key(" a\t\r\n  b c\n") == _text_key("a b c")
    assert _text_key("ab c") != _text_key("a b c")
    assert _text_key("a\u00a0b") != _text_key("a b")


def test_key_is_the_same_in_every_version() -> None:
    row = {"prompt": "What is\n2 + 2?", "completion": "  4 "}
    written = hashlib.sha256(b"What is 2 + 2?\n4").digest()
    assert example_key(row, _format()) == written


@given(st.lists(st.text(alphabet="ab \n\t\x0b\u00e9", max_size=9), min_size=4, max_size=4))
def test_two_rows_have_one_key_only_if_they_have_the_same_words(texts: list[str]) -> None:
    rows = [{"instruction": a, "output": f"x{b}"} for a, b in (texts[:2], texts[2:])]
    keys = {example_key(row, _format("instruction")) for row in rows}
    words = {tuple(tuple(row[name].encode().split()) for name in row) for row in rows}
    assert len(keys) == len(words)


def _text_key(text: str) -> bytes:
    return example_key({"text": text}, _format("text"))

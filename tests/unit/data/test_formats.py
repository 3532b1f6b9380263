from copy import copy
from typing import Any, get_args

import pytest

from orchestrator.config import DataConfig
from orchestrator.data.formats import FORMATS, RowProblem, Segment, Tokenizer, segments

CHAT = DataConfig(train="x", format="chat")


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    changed = copy(tokenizer)
    changed.chat_template = template
    return changed


def test_each_format_of_the_schema_is_known() -> None:
    assert set(FORMATS) == set(get_args(DataConfig.model_fields["format"].annotation))


def test_loss_is_on_the_completion_and_its_end(tokenizer: Tokenizer) -> None:
    row = {"prompt": "2+2=", "completion": "4"}
    assert segments(row, DataConfig(train="x"), tokenizer) == (
        Segment("2+2=", has_loss=False),
        Segment("4<|end|>", has_loss=True),
    )


def test_columns_may_have_other_names(tokenizer: Tokenizer) -> None:
    config = DataConfig.model_validate(
        {"train": "x", "fields": {"prompt": "question", "completion": "answer"}}
    )
    found = segments({"question": "q", "answer": "a"}, config, tokenizer)
    assert [segment.text for segment in found] == ["q", "a<|end|>"]


def test_loss_is_on_all_of_a_text(tokenizer: Tokenizer) -> None:
    found = segments({"text": "hello"}, DataConfig(train="x", format="text"), tokenizer)
    assert found == (Segment("hello<|end|>", has_loss=True),)


class TokenizerThatBegins:
    """As Llama's: it puts <s> before any text by itself."""

    bos_token = "<s>"
    bos_token_id = 1
    eos_token: str | None = "</s>"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1]}


class TokenizerWithoutEnd(TokenizerThatBegins):
    eos_token = None


def test_a_text_begins_as_the_tokenizer_begins_it() -> None:
    config = DataConfig(train="x", format="text")
    found = segments({"text": "hello"}, config, TokenizerThatBegins())
    assert found == (Segment("<s>", has_loss=False), Segment("hello</s>", has_loss=True))


def test_template_chat_makes_two_turns_of_prompt_and_completion(tokenizer: Tokenizer) -> None:
    config = DataConfig(train="x", template="chat")
    assert segments({"prompt": "hi", "completion": "ho"}, config, tokenizer) == (
        Segment("<|user|>hi<|end|><|assistant|>", has_loss=False),
        Segment("ho<|end|>", has_loss=True),
    )


def test_loss_is_on_assistant_turns_only(tokenizer: Tokenizer) -> None:
    turns = ["system", "user", "assistant", "user", "assistant", "user"]
    messages = [_message(role, str(index)) for index, role in enumerate(turns)]
    found = segments({"messages": messages}, CHAT, tokenizer)
    assert found == (
        Segment("<|system|>0<|end|><|user|>1<|end|><|assistant|>", has_loss=False),
        Segment("2<|end|>", has_loss=True),
        Segment("<|user|>3<|end|><|assistant|>", has_loss=False),
        Segment("4<|end|>", has_loss=True),
    )


def test_line_end_after_a_turn_has_no_loss(tokenizer: Tokenizer) -> None:
    template = "{% for m in messages %}[{{m.role}}]{{m.content}}<|end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    messages = [_message(role, "x") for role in ("user", "assistant", "user", "assistant")]
    found = segments({"messages": messages}, CHAT, _with_template(tokenizer, template))
    assert [segment.text for segment in found if segment.has_loss] == ["x<|end|>"] * 2
    assert found[2].text == "\n[user]x<|end|>\n[assistant]"


def test_opening_turn_of_the_assistant_has_no_loss(tokenizer: Tokenizer) -> None:
    messages = [_message(role, role) for role in ("assistant", "user", "assistant")]
    found = segments({"messages": messages}, CHAT, tokenizer)
    assert [segment.text for segment in found if segment.has_loss] == ["assistant<|end|>"]
    assert "<|assistant|>assistant<|end|>" in found[0].text


def test_chat_without_assistant_has_no_segments(tokenizer: Tokenizer) -> None:
    assert segments({"messages": [_message("user", "hi")]}, CHAT, tokenizer) == ()


ANY_CHAT = {"messages": [_message("user", "hi"), _message("assistant", "ho")]}
BAD_TEMPLATES = [
    (None, "must have a chat template, but it has none: use template: plain"),
    (
        "{{ messages | length }}{% for m in messages %}{{m.content}}{% endfor %}",
        "rewrites the text",
    ),
    ("{{ raise_exception('no system role') }}", r"refuses these messages \(no system role\)"),
]


@pytest.mark.parametrize(("template", "message"), BAD_TEMPLATES)
def test_unusable_chat_template_is_refused(
    tokenizer: Tokenizer, template: str | None, message: str
) -> None:
    with pytest.raises(RowProblem, match=message) as caught:
        segments(ANY_CHAT, CHAT, _with_template(tokenizer, template))
    assert "another base model" in str(caught.value)


def test_tokenizer_without_an_end_is_refused() -> None:
    row = {"prompt": "p", "completion": "c"}
    with pytest.raises(RowProblem, match="end-of-text token"):
        segments(row, DataConfig(train="x"), TokenizerWithoutEnd())


BAD_ROWS: list[tuple[dict[str, Any], str, str]] = [
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
    ({"text": "a\ud800"}, "text", "character 2 is half of a surrogate pair"),
    ({"text": ["x" * 100]}, "text", r"got list \['x+\.\.\."),
    ({"messages": "hi"}, "chat", "must be a list of at least one message, but got str 'hi'"),
    ({"messages": []}, "chat", r"must be a list of at least one message, but got list \[\]"),
    ({"messages": ["hi"]}, "chat", r"messages\[0\] must be an object, but got str 'hi'"),
    (
        {"messages": [{"from": "human", "value": "hi"}]},
        "chat",
        r"messages\[0\] must have 'role' as text, but got NoneType None \(it has: from, value\)",
    ),
    (
        {"messages": [_message("user", "a"), {"role": "assistant", "content": None}]},
        "chat",
        r"messages\[1\] must have 'content' as text",
    ),
]


@pytest.mark.parametrize(("row", "form", "message"), BAD_ROWS)
def test_bad_row_is_refused_with_the_remedy(
    tokenizer: Tokenizer, row: dict[str, Any], form: str, message: str
) -> None:
    with pytest.raises(RowProblem, match=message):
        segments(row, DataConfig.model_validate({"train": "x", "format": form}), tokenizer)

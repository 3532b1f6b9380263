import json
from copy import copy
from itertools import accumulate
from typing import Any

import pytest

from orchestrator.data.formats import RowFormat, Segment, Tokenizer, example_key, segments
from orchestrator.data.slices import RowProblem
from orchestrator.data_config import FieldNames

CHAT = RowFormat("chat", "plain", FieldNames())
SHAREGPT = FieldNames(messages="conversations", role="from", content="value")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 3's does.
TRIMMING = CHATML.replace("m.content", "m.content | trim")
# As Qwen 3's does: reasoning is kept in the last turn alone.
REASONING = (
    "{% for m in messages %}[{{ m.role }}]{% set parts = m.content.split('</think>') %}"
    "{% if loop.last and parts | length > 1 %}{{ parts[0] }}</think>{% endif %}{{ parts[-1] }}|"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CALLING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{% if m.content is defined %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}|{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _exchanges(*answers: str) -> dict[str, Any]:
    pairs = ((_message("user", "why?"), _message("assistant", answer)) for answer in answers)
    return {"messages": [message for pair in pairs for message in pair]}


def _with_template(tokenizer: Tokenizer, template: Any) -> Tokenizer:
    changed = copy(tokenizer)
    changed.chat_template = template
    return changed


def _learned(found: tuple[Segment, ...]) -> list[str]:
    return [segment.text for segment in found if segment.has_loss]


def test_loss_is_on_assistant_turns_only(tokenizer: Tokenizer) -> None:
    turns = ["system", "user", "assistant", "user", "assistant", "user"]
    messages = [_message(role, str(index)) for index, role in enumerate(turns)]
    assert segments({"messages": messages}, CHAT, tokenizer) == (
        Segment("<|system|>0<|end|><|user|>1<|end|><|assistant|>", has_loss=False),
        Segment("2<|end|>", has_loss=True),
        Segment("<|user|>3<|end|><|assistant|>", has_loss=False),
        Segment("4<|end|>", has_loss=True),
    )


@pytest.mark.parametrize("template", [CHATML, TRIMMING, CALLING, REASONING])
@pytest.mark.parametrize(
    "texts", [("a", "b", "c"), (" a\n", "\n\nb ", "c  "), ("{{a}}", "\\", '"')]
)
def test_turns_are_what_the_tokenizer_renders_one_after_another(
    tokenizer: Tokenizer, template: str, texts: tuple[str, ...]
) -> None:
    changed = _with_template(tokenizer, template)
    row = _exchanges(*texts)
    found = segments(row, CHAT, changed)
    assert [segment.has_loss for segment in found] == [False, True] * 3
    borders = list(accumulate(segment.text for segment in found))
    for i in range(3):
        asked, answered = (
            changed.apply_chat_template(row["messages"][:end], tokenize=False, **settings)
            for end, settings in (
                (2 * i + 1, {"add_generation_prompt": True}),
                (2 * i + 2, {"add_generation_prompt": False}),
            )
        )
        assert borders[2 * i] == asked
        assert borders[2 * i + 1] == asked + answered.removeprefix(asked).rstrip()


def test_line_end_after_a_turn_has_no_loss(tokenizer: Tokenizer) -> None:
    found = segments(_exchanges("x", "y"), CHAT, _with_template(tokenizer, CHATML))
    assert _learned(found) == ["x<|im_end|>", "y<|im_end|>"]
    assert found[2].text == "\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"


def test_opening_turn_of_the_assistant_has_no_loss(tokenizer: Tokenizer) -> None:
    messages = [_message(role, role) for role in ("assistant", "user", "assistant")]
    found = segments({"messages": messages}, CHAT, tokenizer)
    assert _learned(found) == ["assistant<|end|>"]
    assert "<|assistant|>assistant<|end|>" in found[0].text


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_chat_in_which_nobody_answers_has_no_segments(tokenizer: Tokenizer, role: str) -> None:
    assert segments({"messages": [_message(role, "hi")]}, CHAT, tokenizer) == ()


def test_sharegpt_is_read_by_its_own_names(tokenizer: Tokenizer) -> None:
    turns = [("system", "s"), ("human", "q"), ("gpt", "a")]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    found = segments(row, RowFormat("chat", "plain", SHAREGPT), tokenizer)
    assert [segment.text for segment in found] == [
        "<|system|>s<|end|><|user|>q<|end|><|assistant|>",
        "a<|end|>",
    ]


def test_parts_of_text_are_joined(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2", "image": None}]
    messages = [_message("user", parts), _message("assistant", "4")]
    asked, _ = segments({"messages": messages}, CHAT, tokenizer)
    assert asked.text == "<|user|>2+2<|end|><|assistant|>"


def test_tool_calls_and_tools_go_through_the_template(tokenizer: Tokenizer) -> None:
    messages = [_message("user", "?"), CALL, _message("tool", "2"), _message("assistant", "two")]
    expected = (
        Segment('[{"name": "f"}][user]?|[assistant]', has_loss=False),
        Segment('{"name": "f", "arguments": {"x": 1}}|', has_loss=True),
        Segment("[tool]2|[assistant]", has_loss=False),
        Segment("two|", has_loss=True),
    )
    calling = _with_template(tokenizer, {"default": CHATML, "tool_use": CALLING})
    for tools in ([{"name": "f"}], '[{"name": "f"}]'):
        assert segments({"messages": messages, "tools": tools}, CHAT, calling) == expected


def test_what_a_table_fills_with_null_is_not_there(tokenizer: Tokenizer) -> None:
    filled = [
        message | {"tool_calls": [], "name": None} for message in _exchanges("a", "b")["messages"]
    ]
    row = {"messages": filled, "tools": None}
    assert segments(row, CHAT, tokenizer) == segments(_exchanges("a", "b"), CHAT, tokenizer)
    assert example_key(row, CHAT) == example_key(_exchanges("a", "b"), CHAT)


def test_reasoning_of_the_only_answer_is_learned(tokenizer: Tokenizer) -> None:
    changed = _with_template(tokenizer, REASONING)
    assert _learned(segments(_exchanges("hm</think>a"), CHAT, changed)) == ["hm</think>a|"]


def test_last_turn_alone_is_learned_where_a_template_rewrites_earlier_ones(
    tokenizer: Tokenizer,
) -> None:
    changed = _with_template(tokenizer, REASONING)
    assert segments(_exchanges("hm</think>a", "so</think>b"), CHAT, changed) == (
        Segment("[user]why?|[assistant]a|[user]why?|[assistant]", has_loss=False),
        Segment("so</think>b|", has_loss=True),
    )
    # Nothing is rewritten where nobody reasons.
    assert _learned(segments(_exchanges("a", "b"), CHAT, changed)) == ["a|", "b|"]


@pytest.mark.parametrize("template", [CHATML, REASONING])
def test_turn_of_weight_0_has_no_loss(tokenizer: Tokenizer, template: str) -> None:
    changed = _with_template(tokenizer, template)
    plain = _exchanges("a", "b", "c")
    weights: list[Any] = [None, 0, 1, 1.0, None, 0]
    weighted = {
        "messages": [m | {"weight": w} for m, w in zip(plain["messages"], weights, strict=True)]
    }
    found = segments(weighted, CHAT, changed)
    expected = segments(plain, CHAT, changed)[:4]
    assert [segment.text for segment in found] == [segment.text for segment in expected]
    assert [segment.has_loss for segment in found] == [False, False, False, True]
    assert example_key(weighted, CHAT) != example_key(plain, CHAT)
    learned = {"messages": [message | {"weight": 1} for message in plain["messages"]]}
    assert segments(learned, CHAT, changed) == segments(plain, CHAT, changed)
    assert example_key(learned, CHAT) == example_key(plain, CHAT)


def test_turn_of_weight_0_that_ends_the_chat_is_not_the_one_to_learn(tokenizer: Tokenizer) -> None:
    changed = _with_template(tokenizer, REASONING)
    messages = _exchanges("hm</think>a", "so</think>b", "c")["messages"]
    messages[5]["weight"] = 0
    assert _learned(segments({"messages": messages}, CHAT, changed)) == ["so</think>b|"]
    for message in messages:
        message["weight"] = 0
    assert segments({"messages": messages}, CHAT, changed) == ()


def _calling(call: Any) -> dict[str, Any]:
    return {"messages": [_message("user", "?"), CALL | {"tool_calls": [call]}]}


@pytest.mark.parametrize(
    "call",
    [
        {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {
            "type": "function",
            "index": None,
            "function": {"name": "f", "arguments": {"x": 1, "y": None}},
        },
    ],
)
def test_arguments_of_a_call_are_an_object_without_nulls(
    tokenizer: Tokenizer, call: dict[str, Any]
) -> None:
    calling = _with_template(tokenizer, CALLING)
    expected = ['{"name": "f", "arguments": {"x": 1}}|']
    assert _learned(segments(_calling(call), CHAT, calling)) == expected
    assert example_key(_calling(call), CHAT) == example_key(
        {"messages": [_message("user", "?"), CALL]}, CHAT
    )


@pytest.mark.parametrize("arguments", ["no JSON", "[1]", '"x"', "[" * 100_000])
def test_arguments_that_are_no_object_stay_text(tokenizer: Tokenizer, arguments: str) -> None:
    calling = _with_template(tokenizer, CALLING)
    row = _calling({"function": {"name": "f", "arguments": arguments}})
    (learned,) = _learned(segments(row, CHAT, calling))
    assert json.loads(learned.removesuffix("|"))["arguments"] == arguments


def test_arguments_beside_the_name_and_of_a_function_call_are_read_too(
    tokenizer: Tokenizer,
) -> None:
    both = "{% for m in messages %}[{{ m.tool_calls or m.function_call or m.role }}]{% endfor %}"
    function = {"name": "f", "arguments": '{"x": null}'}
    for call in ({"tool_calls": [function]}, {"tool_calls": None, "function_call": function}):
        row = {"messages": [_message("user", "?"), CALL | call]}
        (learned,) = _learned(segments(row, CHAT, _with_template(tokenizer, both)))
        assert "'arguments': {'x': None}" in learned


def test_tools_of_a_table_have_no_nulls(tokenizer: Tokenizer) -> None:
    calling = _with_template(tokenizer, CALLING)
    row = _exchanges("a") | {"tools": [{"name": "f", "x": {"y": None, "z": [{"w": None}]}}]}
    asked, _ = segments(row, CHAT, calling)
    assert asked.text.startswith('[{"name": "f", "x": {"z": [{}]}}][user]')


def test_the_day_of_the_preparation_does_not_matter(tokenizer: Tokenizer) -> None:
    dated = _with_template(tokenizer, "{{ strftime_now('%d %b %Y') }}\n" + CHATML)
    asked, _ = segments(_exchanges("a"), CHAT, dated)
    assert asked.text.startswith("26 Jul 2024\n<|im_start|>user")


BAD_TEMPLATES = [
    (None, "must have a chat template, but it has none: use template: plain"),
    (
        "{{ messages | length }}{% for m in messages %}{{m.content}}{% endfor %}",
        r"rewrites the text before messages\[1\]",
    ),
    ("{{ raise_exception('no system role') }}", r"refuses these messages \(no system role\)"),
    ("{{ messages[0].content + 5 }}", r"refuses these messages \(can only concatenate str"),
]


@pytest.mark.parametrize(("template", "message"), BAD_TEMPLATES)
def test_unusable_chat_template_is_refused(
    tokenizer: Tokenizer, template: str | None, message: str
) -> None:
    with pytest.raises(RowProblem, match=message) as caught:
        segments(_exchanges("ho"), CHAT, _with_template(tokenizer, template))
    assert "another base model" in str(caught.value)


BAD_MESSAGES: list[tuple[Any, str]] = [
    ("hi", "column 'messages' must be a list of at least one message, but got str 'hi'"),
    ([], r"must be a list of at least one message, but got list \[\]"),
    ({"role": ["user"], "content": ["hi"]}, "must be a list of at least one message, but got dict"),
    (["hi"], r"messages\[0\] must be an object, but got str 'hi'"),
    (
        [{"from": "human", "value": "hi"}],
        r"messages\[0\] must have 'role' as text, but got NoneType None \(it has: from, value\)"
        ": correct it, or set data.fields.role",
    ),
    ([_message("usr", "a")], r"messages\[0\].role must be one of system, .*, but got str 'usr'"),
    (
        [_message("user", "a"), _message("assistant", None)],
        r"messages\[1\] must have 'content' as text",
    ),
    ([_message("user", 5)], r"messages\[0\] must have 'content' as text, but got int 5"),
    (
        [_message("user", [{"type": "image_url", "image_url": "x"}])],
        r"messages\[0\].content\[0\] must be .* only text can be learned",
    ),
    ([_message("user", ["a"])], r"messages\[0\].content\[0\] must be .* but got str 'a'"),
    ([_message("user", "a"), _message("assistant", " ")], "assistant's turn must not be empty"),
    ([_message("user", "\ud800")], r"messages\[0\].content must be valid Unicode"),
    ([_message("user", "a") | {"weight": 0.5}], r"messages\[0\].weight must be 0 .* or 1, but got"),
    (
        [_message("user", "a"), CALL | {"tool_calls": None, "function_call": {"name": None}}],
        r"messages\[1\] must have 'content' as text",
    ),
    ([CALL | {"tool_calls": "f(1)"}], r"messages\[0\].tool_calls must be a list of objects"),
]


@pytest.mark.parametrize(("messages", "problem"), BAD_MESSAGES)
def test_bad_message_is_refused_with_its_place(
    tokenizer: Tokenizer, messages: Any, problem: str
) -> None:
    for read in (lambda row: segments(row, CHAT, tokenizer), lambda row: example_key(row, CHAT)):
        with pytest.raises(RowProblem, match=problem):
            read({"messages": messages})


@pytest.mark.parametrize("tools", ["no JSON", {"name": "f"}, ["f"], "[1]", 5])
def test_tools_that_are_no_list_of_functions_are_refused(tools: Any) -> None:
    with pytest.raises(RowProblem, match="column 'tools' must be a list of functions"):
        example_key(_exchanges("a") | {"tools": tools}, CHAT)


def test_call_that_is_nested_too_deeply_is_refused(tokenizer: Tokenizer) -> None:
    deep: Any = {}
    for _ in range(2000):
        deep = {"x": deep}
    row = {"messages": [_message("user", "?"), CALL | {"tool_calls": [{"function": deep}]}]}
    for read in (lambda row: segments(row, CHAT, tokenizer), lambda row: example_key(row, CHAT)):
        with pytest.raises(RowProblem, match=r"messages\[1\] must be nested less deeply"):
            read(row)


def test_key_of_a_chat_is_of_all_that_is_said() -> None:
    base = example_key(_exchanges("a"), CHAT)
    turned = {"messages": [dict(reversed(m.items())) for m in _exchanges("a")["messages"]]}
    assert example_key(turned, CHAT) == base
    others = [
        _exchanges("b"),
        _exchanges("a", "a"),
        _exchanges("a") | {"tools": [{"name": "f"}]},
        {"messages": [*_exchanges("a")["messages"], CALL]},
        {"messages": [_message("system", "why?"), _message("assistant", "a")]},
    ]
    assert len({base, *(example_key(row, CHAT) for row in others)}) == 6

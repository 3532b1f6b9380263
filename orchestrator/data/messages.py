"""Read a conversation out of a row: OpenAI's messages, ShareGPT's, with or without tool calls.

In: a row and the names of its columns. Out: a Conversation as chat templates take it. What cannot
be used raises RowProblem. Pure.
"""

import json
from dataclasses import dataclass
from typing import Any

from orchestrator.data.fields import canonical_json, check_unicode, field, shown, without_nulls
from orchestrator.data.slices import Row, RowProblem
from orchestrator.data_config import FieldNames

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
}
CALLS = ("tool_calls", "function_call")  # what an assistant's turn may have instead of content
WEIGHT = "weight"  # OpenAI's, 0 or 1: whether an assistant's turn is learned
WRITE_MESSAGES = 'write them as [{"role": "user", "content": "..."}, ...]'


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    """Each with a role of ROLES and, but for some tool calls, content as text; further keys as they
    came, but those without a value."""
    tools: list[Any] | None = None
    """The functions that the model may call."""
    without_loss: frozenset[int] = frozenset()
    """Places of the messages that are not learned."""

    @property
    def is_plain(self) -> bool:
        """Nothing but roles and texts."""
        return self.tools is None and all(
            len(message) == 2 and "content" in message for message in self.messages
        )


def read_conversation(row: Row, fields: FieldNames) -> Conversation:
    name = fields.messages
    value = field(row, "messages", name)
    if not isinstance(value, list) or not value:
        raise RowProblem(
            f"column {name!r} must be a list of at least one message, but got {shown(value)}: "
            f"{WRITE_MESSAGES}"
        )
    messages = [_message(item, f"{name}[{i}]", fields) for i, item in enumerate(value)]
    without_loss = frozenset(
        i for i, item in enumerate(value) if WEIGHT in item and not _weight(item, f"{name}[{i}]")
    )
    return Conversation(messages, _tools(row, fields.tools), without_loss)


def conversation_texts(conversation: Conversation) -> list[str]:
    """All that it says, two texts to a message, whatever the order of keys."""
    texts = [] if conversation.tools is None else [canonical_json(conversation.tools, "tools")]
    for i, message in enumerate(conversation.messages):
        # No role has a blank in it, so what follows one can only be the rest.
        rest = {key: message[key] for key in message if key not in ("role", "content")}
        if i in conversation.without_loss:
            rest[WEIGHT] = 0
        more = f" {canonical_json(rest, 'a message')}" if rest else ""
        texts.append(message["role"] + more)
        texts.append(message.get("content", ""))
    return texts


def _message(item: Any, place: str, fields: FieldNames) -> Message:
    if not isinstance(item, dict):
        raise RowProblem(f"{place} must be an object, but got {shown(item)}: {WRITE_MESSAGES}")
    role = _role(item, place, fields.role)
    message: Message = {"role": role}
    content = item.get(fields.content)
    rest = _rest(item, place, fields) if len(item) > 2 or content is None else {}
    calls = any(name in rest for name in CALLS)
    if content is not None or not calls or role != "assistant":
        message["content"] = _content(content, item, place, fields.content)
    message |= rest
    if role == "assistant" and not calls and not message["content"].strip():
        raise RowProblem(
            f"{place}: the assistant's turn must not be empty: "
            "there is nothing to learn from it, delete it or the row"
        )
    return message


def _role(item: Message, place: str, name: str) -> str:
    role = item.get(name)
    if not isinstance(role, str):
        raise _not_text(item, place, "role", name)
    if role not in ROLES:
        raise RowProblem(
            f"{place}.{name} must be one of {', '.join(ROLES)}, but got {shown(role)}: correct it"
        )
    return ROLES[role]


def _weight(item: Message, place: str) -> bool:
    weight = item[WEIGHT]
    if weight not in (None, 0, 1):
        raise RowProblem(
            f"{place}.{WEIGHT} must be 0 (the turn is not learned) or 1, but got {shown(weight)}: "
            "correct it"
        )
    return weight is None or weight == 1


def _content(content: Any, item: Message, place: str, name: str) -> str:
    if isinstance(content, list):
        content = "".join(_part(part, f"{place}.{name}[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise _not_text(item, place, "content", name)
    if not content.isascii():
        check_unicode(content, f"{place}.{name}")
    return content


def _rest(item: Message, place: str, fields: FieldNames) -> Message:
    used = (fields.role, fields.content, "role", "content", WEIGHT)
    rest: Message = without_nulls({key: item[key] for key in item if key not in used}, place)
    for name in CALLS:
        if not rest.get(name, True):  # an empty list, as of a table's column
            del rest[name]
    calls = rest.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowProblem(
            f"{place}.tool_calls must be a list of objects, but got {shown(calls)}: correct it"
        )
    if calls:
        rest["tool_calls"] = [_call(call) for call in calls]
    if "function_call" in rest:
        rest["function_call"] = _with_arguments(rest["function_call"])
    return rest


def _call(call: Message) -> Message:
    if "function" in call:
        return call | {"function": _with_arguments(call["function"])}
    return dict(_with_arguments(call))


def _with_arguments(function: Any) -> Any:
    """OpenAI's API has them as JSON, chat templates write them as JSON themselves."""
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return function
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):  # a model's own slip: the template writes what it was
        return function
    return function | {"arguments": arguments} if isinstance(arguments, dict) else function


def _part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RowProblem(
        f'{place} must be {{"type": "text", "text": "..."}}, but got {shown(part)}: '
        "only text can be learned, delete the row"
    )


def _not_text(item: Message, place: str, setting: str, name: str) -> RowProblem:
    return RowProblem(
        f"{place} must have {name!r} as text, but got {shown(item.get(name))} (it has: "
        f"{', '.join(map(str, item)) or 'nothing'}): correct it, or set data.fields.{setting}"
    )


def _tools(row: Row, name: str) -> list[Any] | None:
    """Tables often hold them as JSON, since each function has parameters of its own."""
    tools = row.get(name)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowProblem(
                f"column {name!r} must be a list of functions, but it is text that is no valid "
                f"JSON ({error}): correct it, or set data.fields.tools to the right column"
            ) from error
    else:
        tools = without_nulls(tools, f"column {name!r}")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowProblem(
            f"column {name!r} must be a list of functions, but got {shown(tools)}: correct it, "
            "or set data.fields.tools to the right column"
        )
    return tools

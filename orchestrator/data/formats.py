"""Turn a row into segments of text, each with or without loss.

In: a row, the data configuration, a tokenizer for its chat template and special tokens. Out:
segments whose texts joined are the document. A row that does not fit raises RowProblem, to which
the caller adds file and line. Imports no transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from orchestrator.config import DataConfig
from orchestrator.data.slices import Row

Tokenizer = Any  # transformers' PreTrainedTokenizerBase, which takes seconds to import
Message = dict[str, Any]

MAX_SHOWN_CHARS = 60
WRITE_MESSAGES = 'write them as [{"role": "user", "content": "..."}, ...]'


@dataclass(frozen=True)
class Segment:
    text: str
    has_loss: bool


class RowProblem(ValueError):
    """What is wrong with a row: rule, value and remedy, without the place."""


def segments(row: Row, config: DataConfig, tokenizer: Tokenizer) -> tuple[Segment, ...]:
    return FORMATS[config.format](row, config, tokenizer)


def _prompt_completion(row: Row, config: DataConfig, tokenizer: Tokenizer) -> tuple[Segment, ...]:
    prompt = _text_field(row, "prompt", config.fields.prompt)
    completion = _text_field(row, "completion", config.fields.completion)
    if not completion:
        raise RowProblem(
            f"column {config.fields.completion!r} must not be empty: "
            "there is nothing to learn from this row, delete it"
        )
    if config.template == "chat":
        user, assistant = {"role": "user"}, {"role": "assistant"}
        return _chat_segments(
            [user | {"content": prompt}, assistant | {"content": completion}], tokenizer
        )
    return (
        *_beginning(tokenizer),
        Segment(prompt, has_loss=False),
        Segment(completion + _end(tokenizer), has_loss=True),
    )


def _text(row: Row, config: DataConfig, tokenizer: Tokenizer) -> tuple[Segment, ...]:
    text = _text_field(row, "text", config.fields.text)
    return *_beginning(tokenizer), Segment(text + _end(tokenizer), has_loss=True)


def _chat(row: Row, config: DataConfig, tokenizer: Tokenizer) -> tuple[Segment, ...]:
    name = config.fields.messages
    messages = _field(row, "messages", name)
    if not isinstance(messages, list) or not messages:
        raise RowProblem(
            f"column {name!r} must be a list of at least one message, but got {_shown(messages)}: "
            f"{WRITE_MESSAGES}"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RowProblem(
                f"{name}[{index}] must be an object, but got {_shown(message)}: {WRITE_MESSAGES}"
            )
        for part in ("role", "content"):
            if not isinstance(message.get(part), str):
                raise RowProblem(
                    f"{name}[{index}] must have {part!r} as text, but got "
                    f"{_shown(message.get(part))} (it has: {', '.join(message) or 'nothing'})"
                )
            _check_unicode(message[part], f"{name}[{index}].{part}")
    return _chat_segments(messages, tokenizer)


def _chat_segments(messages: list[Message], tokenizer: Tokenizer) -> tuple[Segment, ...]:
    """Render up to and after each assistant turn: the difference is what the model must write.

    What stands after the last assistant turn teaches nothing and is left out.
    """
    parts: list[Segment] = []
    written = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:  # nothing asks for an opening turn
            continue
        asked = _render(messages[:index], tokenizer, add_generation_prompt=True)
        answered = _render(messages[: index + 1], tokenizer, add_generation_prompt=False)
        if not asked.startswith(written) or not answered.startswith(asked):
            raise RowProblem(
                "the tokenizer's chat template must only append when a message is added, but this "
                f"one rewrites the text before messages[{index}]: use template: plain with "
                "format: prompt_completion, or another base model"
            )
        # A line end after the closing token belongs to the next turn: nobody generates it.
        answered = asked + answered.removeprefix(asked).rstrip()
        parts.append(Segment(asked.removeprefix(written), has_loss=False))
        parts.append(Segment(answered.removeprefix(asked), has_loss=True))
        written = answered
    return tuple(parts)


def _render(messages: list[Message], tokenizer: Tokenizer, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise RowProblem(
            "the base model's tokenizer must have a chat template, but it has none: use template: "
            "plain with format: prompt_completion, or another base model"
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except TemplateError as error:
        raise RowProblem(
            f"the tokenizer's chat template refuses these messages ({error}): correct them, use "
            "template: plain with format: prompt_completion, or another base model"
        ) from error


def _field(row: Row, field: str, name: str) -> Any:
    if name not in row:
        raise RowProblem(
            f"there is no column {name!r}, only {', '.join(map(repr, row)) or 'an empty row'}: "
            f"set data.fields.{field} to the right column"
        )
    return row[name]


def _text_field(row: Row, field: str, name: str) -> str:
    value = _field(row, field, name)
    if not isinstance(value, str):
        raise RowProblem(
            f"column {name!r} must be text, but got {_shown(value)}: correct it, "
            f"or set data.fields.{field} to the right column"
        )
    _check_unicode(value, f"column {name!r}")
    return value


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowProblem(
            f"{name} must be valid Unicode, but character {error.start + 1} is half of a "
            f"surrogate pair ({text[error.start]!r}): correct it"
        ) from error


def _shown(value: object) -> str:
    text = repr(value)
    if len(text) > MAX_SHOWN_CHARS:
        text = text[:MAX_SHOWN_CHARS] + "..."
    return f"{type(value).__name__} {text}"


@lru_cache(maxsize=4)
def _beginning(tokenizer: Tokenizer) -> tuple[Segment, ...]:
    """The token that the tokenizer puts before any text by itself (Llama's <s>), if it does."""
    if tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return (Segment(str(tokenizer.bos_token), has_loss=False),)
    return ()


def _end(tokenizer: Tokenizer) -> str:
    if not tokenizer.eos_token:
        raise RowProblem(
            "the base model's tokenizer must have an end-of-text token to close a document with, "
            "but it has none: set eos_token in its tokenizer_config.json"
        )
    return str(tokenizer.eos_token)


FORMATS: dict[str, Callable[[Row, DataConfig, Tokenizer], tuple[Segment, ...]]] = {
    "prompt_completion": _prompt_completion,
    "chat": _chat,
    "text": _text,
}

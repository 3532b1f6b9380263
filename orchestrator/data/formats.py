"""Turn a row into segments of text, each with or without loss, and into a key of its content.

In: a row, the format of its source, a tokenizer for its chat template and special tokens. Out:
segments whose texts joined are the document; a hash. A row that does not fit raises RowProblem, to
which the caller adds file and line. Imports no transformers.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple

from orchestrator.data.chat import conversation_turns
from orchestrator.data.fields import answer_field, text_field
from orchestrator.data.messages import Conversation, conversation_texts, read_conversation
from orchestrator.data.slices import Row, RowProblem
from orchestrator.data_config import (
    DataConfig,
    FieldNames,
    FormatName,
    SourceConfig,
    TemplateName,
)

Tokenizer = Any  # transformers' PreTrainedTokenizerBase, which takes seconds to import

# Alpaca's headings; github.com/tatsu-lab/stanford_alpaca has the first sentence of each.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

# Those of ASCII; str.split() knows more of them, but takes several times as long.
_WHITE_SPACE_TO_BLANKS = bytes.maketrans(b"\t\n\v\f\r", b" " * 5)


@dataclass(frozen=True)
class RowFormat:
    """How the rows of one source are read and written."""

    format: FormatName
    template: TemplateName
    fields: FieldNames


class Segment(
    NamedTuple
):  # made several times for each example: a dataclass takes three times as long
    text: str
    has_loss: bool


def row_format(config: DataConfig, source: SourceConfig) -> RowFormat:
    """The source's own setting, else that of the data."""
    return RowFormat(
        source.format or config.format,
        source.template or config.template,
        source.fields or config.fields,
    )


def segments(row: Row, form: RowFormat, tokenizer: Tokenizer) -> tuple[Segment, ...]:
    return FORMATS[form.format].segments(row, form, tokenizer)


def example_key(row: Row, form: RowFormat) -> bytes:
    """SHA-256 of the values that the format uses; any run of white space in them counts as one."""
    texts = FORMATS[form.format].texts(row, form.fields)
    return sha256(b"\n".join(map(_without_runs, texts))).digest()


def _without_runs(text: str) -> bytes:
    """Has no line ends: they can part one text from the next."""
    pieces = text.encode().translate(_WHITE_SPACE_TO_BLANKS).split(b"  ")
    return b" ".join([piece for padded in pieces if (piece := padded.strip())])


def _prompt_completion(row: Row, form: RowFormat, tokenizer: Tokenizer) -> tuple[Segment, ...]:
    prompt, completion = _prompt_completion_texts(row, form.fields)
    return _pair(prompt, completion, form, tokenizer)


def _prompt_completion_texts(row: Row, fields: FieldNames) -> tuple[str, str]:
    return (
        text_field(row, "prompt", fields.prompt),
        answer_field(row, "completion", fields.completion),
    )


def _instruction(row: Row, form: RowFormat, tokenizer: Tokenizer) -> tuple[Segment, ...]:
    instruction, given, output = _instruction_texts(row, form.fields)
    if form.template == "chat":
        prompt = f"{instruction}\n\n{given}" if given else instruction
    else:
        headings = ALPACA_WITH_INPUT if given else ALPACA
        prompt = headings.format(instruction=instruction, input=given)
    return _pair(prompt, output, form, tokenizer)


def _instruction_texts(row: Row, fields: FieldNames) -> tuple[str, str, str]:
    has_input = row.get(fields.input) is not None
    return (
        text_field(row, "instruction", fields.instruction),
        text_field(row, "input", fields.input) if has_input else "",
        answer_field(row, "output", fields.output),
    )


def _pair(prompt: str, answer: str, form: RowFormat, tokenizer: Tokenizer) -> tuple[Segment, ...]:
    if form.template == "chat":
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return _turns(Conversation(messages), tokenizer)
    beginning, end = _ends(tokenizer)
    return *beginning, Segment(prompt, has_loss=False), Segment(answer + end, has_loss=True)


def _text(row: Row, form: RowFormat, tokenizer: Tokenizer) -> tuple[Segment, ...]:
    (text,) = _text_texts(row, form.fields)
    beginning, end = _ends(tokenizer)
    return *beginning, Segment(text + end, has_loss=True)


def _text_texts(row: Row, fields: FieldNames) -> tuple[str]:
    return (answer_field(row, "text", fields.text),)


def _chat(row: Row, form: RowFormat, tokenizer: Tokenizer) -> tuple[Segment, ...]:
    return _turns(read_conversation(row, form.fields), tokenizer)


def _chat_texts(row: Row, fields: FieldNames) -> list[str]:
    return conversation_texts(read_conversation(row, fields))


def _turns(conversation: Conversation, tokenizer: Tokenizer) -> tuple[Segment, ...]:
    return tuple(
        segment
        for asked, answered, has_loss in conversation_turns(conversation, tokenizer)
        for segment in (Segment(asked, has_loss=False), Segment(answered, has_loss))
    )


@lru_cache(maxsize=4)
def _ends(tokenizer: Tokenizer) -> tuple[tuple[Segment, ...], str]:
    """What stands before any text, and after it."""
    if not tokenizer.eos_token:
        raise RowProblem(
            "the base model's tokenizer must have an end-of-text token to close a document with, "
            "but it has none: set eos_token in its tokenizer_config.json"
        )
    beginning: tuple[Segment, ...] = ()
    # Llama's puts <s> there by itself.
    if tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        beginning = (Segment(str(tokenizer.bos_token), has_loss=False),)
    return beginning, str(tokenizer.eos_token)


class Format(NamedTuple):
    segments: Callable[[Row, RowFormat, Tokenizer], tuple[Segment, ...]]
    texts: Callable[[Row, FieldNames], Iterable[str]]
    """The values that it uses."""


FORMATS: dict[FormatName, Format] = {
    "prompt_completion": Format(_prompt_completion, _prompt_completion_texts),
    "instruction": Format(_instruction, _instruction_texts),
    "chat": Format(_chat, _chat_texts),
    "text": Format(_text, _text_texts),
}

"""Render conversations with a tokenizer's chat template, cut where the assistant begins and ends.

In: a conversation and a tokenizer. Out: turns, each what the model is given and what it must write.
Imports jinja2 and transformers inside functions.

What the model must write at messages[i] is what the template adds to the first i messages when it
renders i + 1, so there are two renderings to an assistant's turn, which cost a long conversation
more than to tokenise it. Most conversations differ in their texts alone. So where the borders are
is found out once for each sequence of roles, with marks in the place of the texts, and then the
texts are put in. One rendering of the whole conversation proves each time that the template does
nothing else with them; where it does (it strips them, or takes reasoning out), that conversation is
rendered turn by turn.

Where a template rewrites earlier text when a message is added (Qwen 3's takes earlier reasoning
out), the last turn alone is learned, after all else as the template writes it then.
"""

import re
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from orchestrator.data.fields import check_unicode
from orchestrator.data.messages import Conversation, Message
from orchestrator.data.slices import RowProblem

# Some templates (Llama 3.2's) write today's date, which would make other shards of the same data
# every day. This is the one that Llama 3.1's template writes where it is given none.
RENDERED_ON = datetime(2024, 7, 26)
ANOTHER_WAY = "use template: plain with format: prompt_completion, or another base model"
# Private-use characters, which no template has a reason to look for.
MARK = re.compile("\ue000([0-9]+)\ue001")

Pattern = tuple[tuple[str | int, ...], ...]
"""For each turn the text asked and the text answered in turn; a number is that message's text."""


class Turn(NamedTuple):
    asked: str
    """From the end of the turn before up to where the model begins to write."""
    answered: str
    has_loss: bool = True


def conversation_turns(conversation: Conversation, tokenizer: Any) -> tuple[Turn, ...]:
    """What stands after the last learned turn teaches nothing and is left out, and nothing asks for
    a turn of the assistant that opens a conversation.

    Raises:
        RowProblem: the tokenizer has no chat template, or one that refuses the conversation or
            rewrites what asks for the last turn when that is added.
    """
    messages = conversation.messages
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i]
    learned = [i for i in answers if i not in conversation.without_loss]
    if not learned:
        return ()
    end = learned[-1]
    template = _chat_template(tokenizer, with_tools=conversation.tools is not None)
    messages = messages[: end + 1]
    turns = _filled_in(messages, template) if conversation.is_plain else None
    if turns is None:
        turns = template.turns(messages, conversation.tools)
    if turns is None:
        return (template.last_turn(messages, conversation.tools),)
    if not conversation.without_loss:
        return turns
    return tuple(
        turn._replace(has_loss=i not in conversation.without_loss)
        for i, turn in zip(answers, turns, strict=False)
    )


def _filled_in(messages: list[Message], template: "ChatTemplate") -> tuple[Turn, ...] | None:
    pattern = _pattern(template, tuple(message["role"] for message in messages))
    if pattern is None:
        return None
    texts = [message["content"] for message in messages]
    parts = [
        "".join([part if isinstance(part, str) else texts[part] for part in piece])
        for piece in pattern
    ]
    # A line end after the last turn belongs to a next one.
    if "".join(parts) != template.render(messages).rstrip():
        return None
    return tuple(map(Turn, parts[::2], parts[1::2]))


@lru_cache(maxsize=1024)
def _pattern(template: "ChatTemplate", roles: tuple[str, ...]) -> Pattern | None:
    marked = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
    try:
        turns = template.turns(marked)
    except RowProblem:  # the conversation itself will say what is wrong
        return None
    if turns is None:
        return None
    return tuple(_pieces(text) for turn in turns for text in (turn.asked, turn.answered))


def _pieces(text: str) -> tuple[str | int, ...]:
    parts = MARK.split(text)  # text and number by turns
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts))


class ChatTemplate:
    """A tokenizer's chat template, compiled."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self._template = _compile_jinja_template(source)
        self._names = {
            **self._template.globals,
            **special_tokens,
            "documents": None,
            "strftime_now": RENDERED_ON.strftime,
        }
        # The others come of contents that the template does not expect.
        self._refusals = (TemplateError, TypeError, ValueError, RecursionError)

    def turns(
        self, messages: list[Message], tools: list[Any] | None = None
    ) -> tuple[Turn, ...] | None:
        """Of the assistant's messages but the first of all, from two renderings to each; None where
        a message more changes what stands before it."""
        turns: list[Turn] = []
        written = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i == 0:
                continue
            asked, answered = self._turn(messages[: i + 1], tools)
            if answered is None or not asked.startswith(written):
                return None
            turns.append(Turn(asked.removeprefix(written), answered))
            written = asked + answered
        check_unicode(written, "the conversation")
        return tuple(turns)

    def last_turn(self, messages: list[Message], tools: list[Any] | None = None) -> Turn:
        asked, answered = self._turn(messages, tools)
        if answered is None:
            raise RowProblem(
                "the tokenizer's chat template must only append when the last turn is added, but "
                f"this one rewrites the text before messages[{len(messages) - 1}]: {ANOTHER_WAY}"
            )
        check_unicode(asked + answered, "the conversation")
        return Turn(asked, answered)

    def _turn(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, str | None]:
        """What asks for the last message, and what that adds if it does nothing else."""
        asked = self.render(messages[:-1], tools, add_generation_prompt=True)
        answered = self.render(messages, tools)
        if not answered.startswith(asked):
            return asked, None
        # A line end after the closing token belongs to the next turn: nobody generates it.
        return asked, answered.removeprefix(asked).rstrip()

    def render(
        self,
        messages: list[Message],
        tools: list[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """As `apply_chat_template` does, but for the date."""
        given = {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        # What Template.render does, without copying all names each time: a quarter of its time.
        context = self._template.new_context(self._names | given, shared=True)
        try:
            return "".join(self._template.root_render_func(context))
        except self._refusals as error:
            raise RowProblem(
                f"the tokenizer's chat template refuses these messages ({error}): correct them, "
                f"{ANOTHER_WAY}"
            ) from error


@lru_cache(maxsize=8)
def _chat_template(tokenizer: Any, with_tools: bool) -> ChatTemplate:
    if not tokenizer.chat_template:
        raise RowProblem(
            f"the base model's tokenizer must have a chat template, but it has none: {ANOTHER_WAY}"
        )
    source = tokenizer.get_chat_template(tools=[] if with_tools else None)
    return ChatTemplate(source, tokenizer.special_tokens_map)

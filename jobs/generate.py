"""`orchestrator generate`: a prompt, or a conversation, with an adapter on its base model.

In: prompts, or lines as a person types them. Out: the answers on stdout, as they come.
"""

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jobs.adapters import open_adapter
from orchestrator.errors import BaseModelError, ConfigError
from orchestrator.training.quiet import quiet_libraries

CHAT_HELP = "a line is a message; /new begins anew, /exit or Ctrl-D ends"
Settings = dict[str, Any]


def generate_text(
    prompt: str, model: str, max_new_tokens: int, temperature: float, uri: str
) -> int:
    with tempfile.TemporaryDirectory() as temporary, quiet_libraries():
        loaded, tokenizer = _load(open_adapter(model, uri, Path(temporary)))
        from orchestrator.tracking.adapter_model import generate

        generate(
            loaded,
            tokenizer,
            [prompt],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stream=True,
        )
    return 0


def chat(
    model: str,
    max_new_tokens: int,
    temperature: float,
    uri: str,
    lines: Iterable[str] | None = None,
) -> int:
    """`lines`: what the user says; None: what is typed."""
    terminal = sys.stderr  # the libraries' silence is of standard error
    with tempfile.TemporaryDirectory() as temporary, quiet_libraries():
        loaded, tokenizer = _load(open_adapter(model, uri, Path(temporary)))
        if not tokenizer.chat_template:
            raise ConfigError(
                "--chat: the adapter was trained without a chat template (data.template: plain): "
                "use --prompt, or train with data.template: chat"
            )
        print(CHAT_HELP, file=terminal)
        _converse(
            loaded,
            tokenizer,
            lines if lines is not None else _typed(),
            {"max_new_tokens": max_new_tokens, "temperature": temperature, "stream": True},
        )
    return 0


def _load(folder: Path) -> tuple[Any, Any]:
    from orchestrator.tracking.adapter_model import load

    try:
        return load(folder)
    except (OSError, ValueError) as error:  # of the base model: the adapter was looked at
        raise BaseModelError(str(error)) from error


def _converse(model: Any, tokenizer: Any, lines: Iterable[str], settings: Settings) -> None:
    from orchestrator.tracking.adapter_model import reply

    messages: list[dict[str, str]] = []
    for line in lines:
        said = line.strip()
        if said == "/exit":
            return
        if said == "/new":
            messages = []
        elif said:
            messages.append({"role": "user", "content": said})
            answer = reply(model, tokenizer, messages, **settings)
            messages.append({"role": "assistant", "content": answer})


def _typed() -> Iterable[str]:
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return

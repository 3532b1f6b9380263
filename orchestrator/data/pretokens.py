"""Cut text into a tokenizer's pre-tokens with Python's own regex engines, many times as fast as the
tokenizers library does it.

In: the library's tokenizer. Out: for a text, the pre-tokens that the library would cut it into, or
None where that is not certain. Imports tokenizers inside functions.

A pattern's cut depends on nothing but which of its classes each character is in. ASCII is the same
in all engines. But tables of Unicode differ from version to version, so that each other character
is first put, once, between letters, digits, marks and blanks and cut in both ways.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import regex

# github.com/openai/gpt-2, as in the library's ByteLevel.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits alone before all else, and then GPT-2's on what is between them: SmolLM's and StarCoder's.
# A blank before a digit ends its piece.
GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")

Cut = Callable[[str], list[str]]

# Each class beside each other one, and where the short forms of English begin and end: some
# letters count as s or k where case is ignored.
PROBE = "a{0}a1{0}1!{0}!'{0}a'r{0}a'{0}ea'l{0}a {0} \n{0}\n  {0}"


def published_pattern(pre_tokenizer: dict[str, Any]) -> str | None:
    """Of a pre-tokenizer as tokenizer.json has it; None where it is none of those known here."""
    match _stages(pre_tokenizer):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return GPT2_DIGITS
        case [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if pattern in (GPT2, LLAMA3, QWEN2):
            return str(pattern)
    return None


def _stages(pre_tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    if pre_tokenizer["type"] == "Sequence":
        return list(pre_tokenizer["pretokenizers"])
    return [pre_tokenizer]


def state(component: Any) -> dict[str, Any] | None:
    """A part of the library's tokenizer as tokenizer.json has it."""
    if component is None:
        return None
    found: dict[str, Any] = json.loads(component.__getstate__())
    return found


class PreTokens:
    """Cuts text as the library's pre-tokenizer does, whose published pattern this is."""

    def __init__(self, pre_tokenizer: Any, pattern: str) -> None:
        self._in_ascii: Cut = re.compile(_ascii_pattern(pattern), re.ASCII).findall
        self._in_all: Cut = regex.compile(pattern).findall
        self._is_safe = _SafeCharacters(pre_tokenizer, self._in_all)

    def __call__(self, text: str) -> list[str] | None:
        if text.isascii():
            return self._in_ascii(text)
        if all(map(self._is_safe.__getitem__, set(text))):
            return self._in_all(text)
        return None


class _SafeCharacters(dict[str, bool]):
    """Whether the library and the pattern cut text with the character alike."""

    def __init__(self, pre_tokenizer: Any, cut: Cut) -> None:
        super().__init__({chr(i): True for i in range(128)})
        self._library_cut = pre_tokenizer.pre_tokenize_str
        self._cut = cut

    def __missing__(self, char: str) -> bool:
        probe = PROBE.format(char)
        pieces = [probe[start:end] for _, (start, end) in self._library_cut(probe)]
        self[char] = pieces == self._cut(probe)
        return self[char]


def _ascii_pattern(pattern: str) -> str:
    """The same for text that is all ASCII, as Python's `re` has it, which is twice as fast."""

    def plain(found: re.Match[str]) -> str:
        chars = found[0].replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9")
        return chars if chars.startswith("[") else f"[{chars}]"

    return re.sub(r"\[[^\]]*\]|\\p\{[LN]\}", plain, pattern)

"""Take a column's value out of a row, checked.

In: a row and a column's name. Out: its value. What is missing, of a wrong type or no valid Unicode
raises RowProblem. Pure.
"""

import json
from reprlib import Repr
from typing import Any

from orchestrator.data.slices import Row, RowProblem

_SHORT = Repr()
_SHORT.maxlevel = 2  # a row may be nested deeper than repr() can go
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxdict = _SHORT.maxlist = 3


def field(row: Row, setting: str, name: str) -> Any:
    """`setting` is the one of data.fields that says the column's name."""
    if name not in row:
        raise RowProblem(
            f"there is no column {name!r}, only {', '.join(map(repr, row)) or 'an empty row'}: "
            f"set data.fields.{setting} to the right column"
        )
    return row[name]


def text_field(row: Row, setting: str, name: str) -> str:
    value = row.get(name)
    if isinstance(value, str) and value.isascii():  # nearly all of them, twice for each row
        return value
    value = field(row, setting, name)
    if not isinstance(value, str):
        raise RowProblem(
            f"column {name!r} must be text, but got {shown(value)}: correct it, "
            f"or set data.fields.{setting} to the right column"
        )
    check_unicode(value, f"column {name!r}")
    return value


def answer_field(row: Row, setting: str, name: str) -> str:
    """A text that the model is to learn."""
    value = text_field(row, setting, name)
    if not value or value.isspace():
        raise RowProblem(
            f"column {name!r} must not be empty: there is nothing to learn from this row, delete it"
        )
    return value


def check_unicode(text: str, name: str) -> None:
    """JSON can write half a character (`"\\ud83d"`), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowProblem(
            f"{name} must be valid Unicode, but character {error.start + 1} is half of a "
            f"surrogate pair ({text[error.start]!r}): correct it"
        ) from error


def canonical_json(value: Any, name: str) -> str:
    """Whatever the order of keys; values that JSON does not know (dates) as text."""
    try:
        return json.dumps(value, sort_keys=True, default=str)
    except (RecursionError, TypeError) as error:  # too deep; keys of several types
        raise RowProblem(
            f"{name} must be what JSON can write, but got {shown(value)} ({error}): correct it"
        ) from error


def without_nulls(value: Any, name: str) -> Any:
    """Tables give each struct all keys that any of them has."""
    try:
        return _without_nulls(value)
    except RecursionError as error:
        raise RowProblem(f"{name} must be nested less deeply: correct it") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def shown(value: object) -> str:
    return f"{type(value).__name__} {_SHORT.repr(value)}"

"""Regular expressions that a configuration may hold. Pure."""

import re


def check_pattern(field: str, expression: str) -> None:
    """Raises ValueError for a key of a pattern that is no regular expression."""
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"{field}: {expression!r} is no regular expression: {error}: name a layer, its ending "
            "or an expression that matches"
        ) from error


def check_answer_pattern(expression: str) -> None:
    """Raises ValueError for one that is no regular expression, or has several groups."""
    try:
        groups = re.compile(expression).groups
    except re.error as error:
        raise ValueError(
            f"answer_pattern must be a regular expression, but got {expression!r} ({error}): "
            "correct it, or leave it out to compare whole answers"
        ) from error
    if groups > 1:
        raise ValueError(
            f"answer_pattern must have at most one group, which is what is compared, but got "
            f"{expression!r} with {groups}: write (?:...) for the others"
        )

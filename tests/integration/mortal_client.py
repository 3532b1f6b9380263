"""A client that dies: the process it stands for comes no further than a given number of changes."""

from collections.abc import Callable
from typing import Any

CHANGES = ("create_", "set_", "log_", "delete_", "finalize_", "update_")


class Died(BaseException):
    """No error of a library: nothing may catch it."""


class MortalClient:
    def __init__(self, client: Any, changes: int) -> None:
        self._client = client
        self._left = changes
        self.made: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            if name.startswith(CHANGES):
                if not self._left:
                    raise Died(name)
                self._left -= 1
                self.made.append(name)
            elif not self._left:
                raise Died(name)
            return method(*arguments, **named)

        return call

"""What one slot of a pack reports of its steps: their mean loss and their speed."""

import time


class Meter:
    """Mean loss and tokens per second since the last report of one slot."""

    def __init__(self, tokens: int) -> None:
        self.last: float | None = None
        self.started = time.monotonic()
        self._losses: list[float] = []
        self._tokens = tokens

    @property
    def has_news(self) -> bool:
        return bool(self._losses)

    def add(self, loss: float) -> None:
        self._losses.append(loss)

    def take(self, tokens: int) -> tuple[float, float]:
        self.last = loss = sum(self._losses) / len(self._losses)
        rate = (tokens - self._tokens) / max(1e-9, time.monotonic() - self.started)
        self._losses, self._tokens, self.started = [], tokens, time.monotonic()
        return loss, rate

"""The most that this process has held of its host's memory, without the pages of files.

In: a time to look for. Out: bytes. Linux alone tells; elsewhere it is 0.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
SAMPLE_S = 0.02


@dataclass
class HostPeak:
    private_bytes: int = 0
    shared_bytes: int = 0
    """As locked memory is, which CUDA shares with its driver."""

    @property
    def num_bytes(self) -> int:
        return self.private_bytes + self.shared_bytes


@contextmanager
def host_peak() -> Iterator[HostPeak]:
    """Filled from now until the block ends."""
    peak, over = HostPeak(), threading.Event()

    def look() -> None:
        while STATUS.exists() and not over.wait(SAMPLE_S):
            now = _now()
            if now.num_bytes > peak.num_bytes:
                peak.private_bytes, peak.shared_bytes = now.private_bytes, now.shared_bytes

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _now() -> HostPeak:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    private, shared = (int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
    return HostPeak(private, shared)

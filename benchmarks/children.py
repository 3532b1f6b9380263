"""Measurements in processes of their own, each with a time limit: a call that hangs is ended, with
all that it started, and what was measured before stays.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

POLL_S = 0.05
CALL_TIMEOUT_S = 180


def measure(arguments: Sequence[str], timeout_s: float, processes: int = 1) -> list[dict[str, Any]]:
    """What `benchmarks.part` measures in so many processes that train at the same time; none if
    one of them failed."""
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        gate = folder / "gate"
        outs = [folder / f"{number}.json" for number in range(processes)]
        children = [
            start(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.part",
                    *arguments,
                    f"--out={out}",
                    f"--gate={gate}",
                ]
            )
            for out in outs
        ]
        try:
            warm = [Path(f"{out}.warm") for out in outs]
            while not all(path.exists() for path in warm) and _going(children, deadline):
                time.sleep(POLL_S)
            gate.touch()
            while any(child.poll() is None for child in children) and _going(children, deadline):
                time.sleep(POLL_S)
        finally:
            for child in children:
                end(child)
        if not all(out.exists() for out in outs):
            print(f"failed, or over {timeout_s:.0f} s: {' '.join(arguments)}", flush=True)
            return []
        return [json.loads(out.read_text()) for out in outs]


def call(module: str, *arguments: str) -> str:
    """The last line that a module prints, run in a process that leaves nothing on the card."""
    child = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        timeout=CALL_TIMEOUT_S,
        check=True,
        text=True,
    )
    return child.stdout.strip().rpartition("\n")[2]


def end_on_sigterm() -> None:
    """So that `timeout`, which ends this process alone, does not leave its children on the card."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """In a session of its own, so that `end` reaches whatever it starts."""
    return subprocess.Popen(command, start_new_session=True, **options)


def end(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def _going(children: Sequence[subprocess.Popen[bytes]], deadline: float) -> bool:
    return time.monotonic() < deadline and not any(child.poll() for child in children)

"""Keep what a driver prints in a file of its own, for when the cluster and its logs are gone.

In: a path. Out: from then on, all that this process writes, its errors and crashes included, goes
to where it went before and to the file.
"""

import atexit
import os
import signal
import subprocess
import sys
from pathlib import Path


def keep_log(path: Path) -> None:
    """Appends: a driver that is started again continues its log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process of its own has the last words of a driver that is killed. What ends the driver
    # (SIGTERM to all of the job's processes, Ctrl-C) must not end it first.
    tee = subprocess.Popen(
        ["tee", "-a", str(path)], stdin=subprocess.PIPE, preexec_fn=_outlive, close_fds=True
    )
    assert tee.stdin is not None
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (1, 2):
        os.dup2(tee.stdin.fileno(), stream)
    tee.stdin.close()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    atexit.register(_drain, tee)


def _outlive() -> None:
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)


def _drain(tee: "subprocess.Popen[bytes]") -> None:
    """The last lines are in both places before this process is seen to be over."""
    sys.stdout.flush()
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    try:
        tee.wait(timeout=10)
    except subprocess.TimeoutExpired:  # another process still holds the other end
        tee.kill()

"""What a head's pod runs before it is taken away: `python -m jobs.pre_stop`.

In: nothing. Out: the driver in this pod has saved its trials, or its time is over. The driver goes
on from there on the next head; without this, from its last checkpoints.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

# The pod is killed 180 s after it was told (k8s/base/rayjob.yaml), and Ray takes 30 s to end.
PATIENCE_S = 140.0


def main() -> int:
    for pid, run_dir in drivers(Path("/proc")):
        print(f"asked driver {pid} to save: {'saved' if save(pid, run_dir) else 'not in time'}")
    return 0


def drivers(processes: Path) -> Iterator[tuple[int, Path]]:
    """The sweeps that may be started twice, each with its run folder."""
    for path in processes.glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if "sweep" in command and "--or-resume" in command and "--run-dir" in command:
            yield int(path.parent.name), Path(command[command.index("--run-dir") + 1])


def save(pid: int, run_dir: Path, patience_s: float = PATIENCE_S) -> bool:
    """Whether the driver has saved and let go of its run folder in time."""
    lock = FileLock(run_dir / "lock")
    try:
        os.kill(pid, signal.SIGUSR1)
        if run_dir.is_dir():
            lock.acquire(timeout=patience_s)
            lock.release()
    except (ProcessLookupError, Timeout):
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())

"""Measurements in processes of their own, each with a time limit: a call that hangs is ended, with
all that it started, and what was measured before stays.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_S = 0.05
CALL_TIMEOUT_S = 180


@dataclass(frozen=True)
class Part:
    """What `benchmarks.part` measures, in so many processes that train at the same time."""

    arguments: Sequence[str]
    processes: int = 1


def measure(parts: Sequence[Part], timeout_s: float) -> Iterator[list[dict[str, Any]]]:
    """What each part measures, in their order; nothing of one that failed.

    All of them load and compile at the same time, which is most of the work, within `timeout_s`.
    Then each measures alone, within as much again: those that wait for their gate use no GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        groups: list[_Group] = []
        try:
            for number, part in enumerate(parts):
                groups.append(_Group(part, Path(folder) / str(number)))
            _wait(lambda: all(group.warm() for group in groups), timeout_s)
            for group in groups:
                if not group.warm():  # or it would load while another measures
                    group.end()
            for group in groups:
                group.gate.touch()
                _wait(group.ended, timeout_s)
                group.end()
                yield group.found()
        finally:
            for group in groups:
                group.end()


class _Group:
    """A part's processes."""

    def __init__(self, part: Part, folder: Path) -> None:
        folder.mkdir()
        self._part = part
        self.gate = folder / "gate"
        self._outs = [folder / f"{number}.json" for number in range(part.processes)]
        self._children: list[subprocess.Popen[bytes]] = []
        command = [sys.executable, "-m", "benchmarks.part", *part.arguments, f"--gate={self.gate}"]
        for out in self._outs:
            self._children.append(start([*command, f"--out={out}"]))

    def warm(self) -> bool:
        """Or ended: with a failure, or with a measurement that needs no warming."""
        return self.ended() or all(Path(f"{out}.warm").exists() for out in self._outs)

    def ended(self) -> bool:
        codes = [child.poll() for child in self._children]
        return None not in codes or any(codes)

    def found(self) -> list[dict[str, Any]]:
        if not all(out.exists() for out in self._outs):
            print(f"failed, or over its time: {' '.join(self._part.arguments)}", flush=True)
            return []
        return [json.loads(out.read_text()) for out in self._outs]

    def end(self) -> None:
        for child in self._children:
            end(child)


def _wait(over: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not over() and time.monotonic() < deadline:
        time.sleep(POLL_S)


def run_ranks(
    words: Sequence[str],
    gpus: int,
    timeout_s: float,
    meanwhile: Callable[[], None] = lambda: None,
    ranks: int = 2,
) -> tuple[list[int | None], str]:
    """Run a process for each rank of a group, until all have ended, one has failed, or the time is
    over; `words` are completed by --world-rank and --init-method.

    Returns their exit codes, None for one that was ended here, and the last words of each if one
    failed.
    """
    started: list[subprocess.Popen[bytes]] = []
    codes: list[int | None] = [None] * ranks
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(ranks)]
        try:
            started = start_ranks(words, gpus, logs)
            ends = time.monotonic() + timeout_s
            while time.monotonic() < ends and None in codes and not any(codes):
                time.sleep(POLL_S)
                codes = [child.poll() for child in started]
                meanwhile()
        finally:
            for child in started:
                end(child)
        meanwhile()
        return codes, "; ".join(map(_last_line, logs)) if any(codes) else ""


def start_ranks(
    words: Sequence[str], gpus: int, logs: Sequence[Path]
) -> list[subprocess.Popen[bytes]]:
    """One for each log, to which it appends; one alone has the GPUs that this process has."""
    method = f"tcp://127.0.0.1:{free_port()}"
    started = []
    for rank, log in enumerate(logs):
        own = [*words, f"--world-rank={rank}", f"--init-method={method}"]
        place = rank_environment(rank, gpus) if len(logs) > 1 else {}
        with log.open("ab") as file:
            started.append(start(own, env=os.environ | place, stdout=file, stderr=file))
    return started


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def rank_environment(rank: int, gpus: int) -> dict[str, str]:
    """Of one of two ranks on so many GPUs. NCCL refuses two ranks of one host on one GPU; it takes
    them for two hosts where their NCCL_HOSTID differs, and goes through sockets then."""
    place = {"CUDA_VISIBLE_DEVICES": str(rank % gpus)}
    if gpus == 1:
        place |= {"NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo"}
    return place


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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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

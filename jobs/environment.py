"""What a sweep was started from: machine, Python, packages and commit.

Out: a record for the run folder, environment.json, so that a run can be made again.
"""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.planning.machine import this_machine

GIT_TIMEOUT_S = 10


def describe_environment(folder: Path) -> dict[str, Any]:
    """`folder`: where the command was called, whose commit is taken if it is in a repository."""
    machine = this_machine()
    return {
        "node": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "num_cpus": machine.num_cpus,
        "num_gpus": machine.num_gpus,
        "memory_bytes": machine.memory_bytes,
        "gpu_memory_bytes": machine.gpu_memory_bytes,
        "git_commit": _git(folder, "rev-parse", "HEAD"),
        "git_changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no")),
        "packages": {
            found.metadata["Name"]: found.version
            for found in sorted(metadata.distributions(), key=lambda one: str(one.name).lower())
        },
    }


def _git(folder: Path, *arguments: str) -> str:
    """Empty where there is no repository, or no git."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

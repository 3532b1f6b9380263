"""What submitting a sweep means, whatever it is sent to: its name, its entrypoint, what to do with
a job of that name that is already there, and the words for where a job stands.

In: a SweepConfig and options. Out: records and text; nothing is sent from here. Imports neither ray
nor a client of Kubernetes.
"""

import hashlib
import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from orchestrator.config import SweepConfig
from orchestrator.errors import ConfigError
from orchestrator.files import record_digest
from orchestrator.sweep.run_store import DRIVER_LOG, RESUMABLE_FIELDS
from orchestrator.yaml_core import dump_yaml

# KubeRay derives names of pods and services from a job's, and refuses longer ones.
MAX_JOB_NAME = 47
END_OF_SWEEP = "END_OF_SWEEP"
# Linux passes no longer string to a process (MAX_ARG_STRLEN), and `sh -c` is given one.
MAX_ENTRYPOINT_BYTES = 128 * 1024

JobState = Literal[
    "queued",  # waits for a queue's quota
    "starting",  # its cluster or its driver is being started
    "running",
    "suspended",  # stopped by a person, to go on later
    "stopping",
    "succeeded",
    "failed",
    "stopped",  # cancelled
]
# How a driver ends that never had room for its workers.
NO_ROOM = 4
BEFORE: frozenset[JobState] = frozenset({"queued", "starting"})
OVER: frozenset[JobState] = frozenset({"succeeded", "failed", "stopped"})


@dataclass(frozen=True)
class JobView:
    """One job, in our words."""

    name: str
    sweep: str
    digest: str
    """Of the configuration, see `config_digest`; empty if the job is not one of ours."""
    state: JobState
    message: str = ""
    """Why it is in this state, in the words of Ray or Kubernetes."""
    run_dir: str = ""
    created: float | None = None
    exit_code: int | None = None
    """The driver's, where it is known."""
    never_ran: bool = False
    """It is over, and its driver was not started or never had its workers."""


@dataclass(frozen=True)
class Line:
    """One thing that happened to a job, told once."""

    key: str
    """The same for what was told before."""
    time: float
    text: str


@dataclass(frozen=True)
class Story:
    view: JobView
    lines: tuple[Line, ...] = ()
    cause: str = ""
    """Why it does not start, if it does not."""
    is_hopeless: bool = False
    """The cause does not pass by itself."""


@dataclass(frozen=True)
class Submission:
    """A sweep as it is sent."""

    name: str
    sweep: str
    digest: str
    run_dir: str
    entrypoint: str


@dataclass(frozen=True)
class Action:
    """What to do about a sweep that is submitted; the reason is shown to the user."""

    kind: Literal["create", "attach", "replace", "resume", "nothing"]
    reason: str


def plan_submission(
    config: SweepConfig, storage: str, await_workers_s: int, name: str | None = None
) -> Submission:
    """`storage`: an absolute folder that all nodes of the cluster share.

    Raises:
        ConfigError: the configuration cannot mean the same on the cluster as here.
    """
    job = job_name(name or config.name)
    digest = config_digest(config)
    run_dir = str(PurePosixPath(storage) / "runs" / f"{job}-{digest[:8]}")
    return Submission(
        job, config.name, digest, run_dir, _entrypoint(config, run_dir, await_workers_s)
    )


def decide_submission(wanted: Submission, found: JobView | None) -> Action:
    """Raises ConfigError if the name is taken."""
    if found is None:
        return Action("create", f"there is no job {wanted.name}")
    if not found.digest:
        raise ConfigError(
            f"the name {wanted.name} is taken by a job that is not a sweep: choose another --name"
        )
    if found.digest != wanted.digest:
        if found.state not in OVER:
            raise ConfigError(
                f"the name {wanted.name} is taken: a sweep of that name with another configuration "
                f"is {found.state}: choose another --name, or cancel it first"
            )
        return Action("replace", f"the job {wanted.name} of another configuration is over")
    match found.state:
        case "succeeded":
            return Action("nothing", f"{wanted.name} is done: its run folder is {found.run_dir}")
        case "suspended":
            return Action("resume", f"{wanted.name} is suspended and goes on")
        case "failed" | "stopped":
            return Action(
                "replace", f"{wanted.name} had {found.state}: it goes on from its run folder"
            )
        case _:
            return Action("attach", f"{wanted.name} is already {found.state}")


def job_name(name: str) -> str:
    """The sweep's name as a DNS label; a digest keeps apart what looks the same when shortened."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not label[:1].isalpha():
        label = f"sweep-{label}".rstrip("-")
    if label == name and len(label) <= MAX_JOB_NAME:
        return label
    suffix = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{label[: MAX_JOB_NAME - 7].rstrip('-')}-{suffix}"


def config_digest(config: SweepConfig) -> str:
    """Of what decides the results: a sweep on more GPUs is the same sweep."""
    return record_digest(config.model_dump(mode="json", exclude=set(RESUMABLE_FIELDS)))


def driver_output(log: str) -> str:
    """A driver's log without the whole entrypoint, which Ray prints first."""
    _, end, rest = log.partition(f"\n{END_OF_SWEEP}\n")
    if end:
        return rest.lstrip("\n")
    return "" if f"<<'{END_OF_SWEEP}'" in log else log


def exit_code(view: JobView) -> int:
    """0 succeeded, 1 the work failed, 2 wrong input, 3 cancelled or paused, 4 never started."""
    if view.state == "succeeded":
        return 0
    if view.state in ("stopped", "suspended"):
        return 3
    if view.never_ran:
        return 4
    return 2 if view.exit_code == 2 else 1


def _entrypoint(config: SweepConfig, run_dir: str, await_workers_s: int) -> str:
    """The configuration travels in it: one object to send, and nothing that could be missing.

    A here-document with a quoted end is taken as it is, so nothing in a value reaches the shell.
    """
    command = [
        *("orchestrator", "sweep", "-", "--run-dir", run_dir, "--or-resume"),
        *("--ray-address", "auto", "--await-workers", str(await_workers_s)),
        *("--log-file", f"{run_dir}/{DRIVER_LOG}"),
    ]
    content = config.model_dump(mode="json", exclude_defaults=True)
    text = dump_yaml(content)
    if END_OF_SWEEP in text.splitlines():
        raise ConfigError(
            f"a line of the configuration is {END_OF_SWEEP}, which ends it: change it"
        )
    entrypoint = f"exec {shlex.join(command)} <<'{END_OF_SWEEP}'\n{text}{END_OF_SWEEP}\n"
    if len(entrypoint.encode()) > MAX_ENTRYPOINT_BYTES:
        raise ConfigError(
            f"the configuration has {len(text.encode()):,} bytes, but at most "
            f"{MAX_ENTRYPOINT_BYTES:,} reach the driver: shorten its lists"
        )
    return entrypoint

"""`orchestrator jobs`: what becomes of a sweep that was submitted, and how to end it.

In: a target and a job's name. Out: an exit code, see submit.py; what is asked for, on stdout.
"""

import json
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from cluster.follow import Follower
from cluster.submission import BEFORE, OVER, JobView, exit_code, job_name
from cluster.target import Target
from jobs.followed import FollowedSweep
from jobs.progress import duration
from jobs.terminal import Terminal
from orchestrator.errors import ClusterError, ConfigError, ContactLost, NeverStarted
from orchestrator.sweep.run_store import DRIVER_LOG

DETACHED = 130
STOP_WAIT_S = 180.0
POLL_S = 1.0
# Of a table that is no terminal's: a line of it is one job, whatever its length.
WIDE = 400


def follow_job(
    target: Target,
    name: str,
    person: Terminal,
    owns: bool = False,
) -> int:
    """`owns`: whoever follows has sent it, and wants nothing left of it if it cannot start."""
    shown = FollowedSweep(name, person.screen) if person.screen is not None else None
    follower = Follower(
        target,
        name,
        person.say,
        person.sleep,
        person.clock,
        log=shown.take if shown is not None else None,
    )
    while True:
        try:
            with shown.shown() if shown is not None else nullcontext():
                view = follower.follow()
            return exit_code(view)
        except NeverStarted:
            # What it holds, such as a head pod and quota, would do nothing until its deadline.
            if owns:
                _take_out(target, name, person)
            raise
        except ContactLost:
            person.say(f"{name} goes on where it is; {_come_back(target, name)}")
            raise
        except KeyboardInterrupt:
            if (code := _interrupted(target, name, person)) is not None:
                return code


def list_jobs(target: Target, as_json: bool, person: Terminal) -> int:
    views = target.list()
    if as_json:
        print(json.dumps([asdict(view) for view in views], indent=2))
        return 0
    if not views:
        person.say("no sweep was submitted here")
        return 0
    table = Table()
    for column in ("job", "sweep", "state", "age", "run folder", "why"):
        table.add_column(column)
    now = time.time()
    for view in views:
        age = duration(now - view.created) if view.created else ""
        table.add_row(view.name, view.sweep, view.state, age, view.run_dir, view.message)
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)
    return 0


def show_status(target: Target, name: str, as_json: bool, person: Terminal) -> int:
    """Ends as the sweep did, if it is over."""
    name = job_name(name)
    story = target.story(name)
    if story is None:
        raise _unknown(name)
    view = story.view
    if as_json:
        lines = [{"time": line.time, "text": line.text} for line in story.lines]
        print(json.dumps({**asdict(view), "cause": story.cause, "story": lines}, indent=2))
        return exit_code(view) if view.state in OVER else 0
    for line in story.lines:
        since = line.time - (view.created or line.time)
        person.say(f"[{duration(since)}] {line.text}")
    reason = story.cause or view.message
    person.say(f"{name} is {view.state}" + (f": {reason}" if reason else ""))
    if view.run_dir:
        person.say(f"run folder: {view.run_dir}")
    return exit_code(view) if view.state in OVER else 0


def show_log(target: Target, name: str, follow: bool, person: Terminal) -> int:
    view = _known(target, name := job_name(name))
    if follow:
        return follow_job(target, name, person)
    text = target.log(name)
    if text is None:
        raise ClusterError(
            f"the log of {name} cannot be read here ({name} is {view.state}): it is kept in "
            f"{view.run_dir}/{DRIVER_LOG} and in MLflow"
        )
    person.say(text.rstrip("\n"))
    return 0


def show_worker_log(target: Target, name: str, worker: str, person: Terminal) -> int:
    """`worker`: the number of a pack, or PACK.WORLD_RANK of a pack with several workers."""
    found = re.fullmatch(r"(\d+)(?:\.(\d+))?", worker)
    if found is None:
        raise ConfigError(f"--worker must be PACK or PACK.WORLD_RANK, such as 0, but got {worker}")
    _known(target, name := job_name(name))
    text = target.worker_log(name, int(found[1]), int(found[2] or 0))
    person.say(text.rstrip("\n"))
    return 0


def cancel_job(target: Target, name: str, pause: bool, person: Terminal) -> int:
    view = _known(target, name := job_name(name))
    if view.state in OVER:
        person.say(f"{name} is over already: it {view.state}")
        return 0
    (target.pause if pause else target.cancel)(name)
    person.say(f"{name} is asked to {'stop' if pause else 'save and stop'}")
    ended = OVER | {"suspended"}
    waited = 0.0
    found = target.find(name)
    while found is not None and found.state not in ended:
        if waited >= STOP_WAIT_S:
            raise ClusterError(
                f"{name} is still {found.state} after {waited:.0f} s: cancel it again"
            )
        person.sleep(POLL_S)
        waited += POLL_S
        found = target.find(name)
    saved = "its last checkpoints" if pause else f"its run folder {view.run_dir}"
    again = f"`orchestrator jobs resume {name}{target.place}`, or submit it again"
    person.say(f"{name} is stopped; it goes on from {saved} with {again}")
    return 0


def resume_job(target: Target, name: str, detach: bool, person: Terminal) -> int:
    view = _known(target, name := job_name(name))
    if view.state == "succeeded":
        person.say(f"{name} is done: its run folder is {view.run_dir}")
        return 0
    if view.state in OVER | {"suspended"}:
        target.resume(name)
        person.say(f"{name} goes on from {view.run_dir}")
    else:
        person.say(f"{name} is already {view.state}")
    return 0 if detach else follow_job(target, name, person, owns=True)


def _known(target: Target, name: str) -> JobView:
    view = target.find(name)
    if view is None:
        raise _unknown(name)
    return view


def _unknown(name: str) -> ConfigError:
    return ConfigError(f"there is no job {name}: see `orchestrator jobs list`")


def _come_back(target: Target, name: str) -> str:
    return f"come back with `orchestrator jobs logs {name} --follow{target.place}`"


def _interrupted(target: Target, name: str, person: Terminal) -> int | None:
    """Exit code, or None to go on."""
    answer = "d"
    if person.ask is not None:
        person.say("")
        try:
            answer = person.ask("[d]etach (the sweep goes on), [c]ancel, or [f]ollow on? ")
        except (EOFError, KeyboardInterrupt):
            answer = "d"
    if answer.strip().lower().startswith("f"):
        return None
    if answer.strip().lower().startswith("c"):
        cancel_job(target, name, False, person)
        return 3
    person.say(f"{name} goes on; {_come_back(target, name)}")
    return DETACHED


def _take_out(target: Target, name: str, person: Terminal) -> None:
    try:
        view = target.find(name)
        if view is not None and view.state in BEFORE:
            target.cancel(name)
            person.say(f"{name} is taken out: nothing of it runs")
    except ClusterError as error:  # why it does not start matters more, and is said last
        person.say(f"{name} could not be taken out: {error}")

"""`orchestrator submit` and `orchestrator jobs`: send a sweep to a cluster, follow it, end it.

In: a configuration and a target. Out: an exit code, the sweep's own: 0 succeeded, 1 the work
failed, 2 the input is wrong, 3 cancelled, 4 never started, 5 no contact, 130 left with Ctrl-C.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.table import Table

from cluster.follow import Follower
from cluster.kubernetes.options import KubernetesOptions
from cluster.submission import BEFORE, OVER, JobView, decide_submission, exit_code
from cluster.target import Plan, Planner, Target
from orchestrator.errors import ClusterError, ConfigError, NeverStarted
from orchestrator.loading import load_config
from orchestrator.search.space import check_space
from orchestrator.sweep.run_store import DRIVER_LOG

KUBERNETES = "kubernetes"
DETACHED = 130
STOP_WAIT_S = 180.0
POLL_S = 1.0


@dataclass(frozen=True)
class Sending:
    """What to do with a sweep that is ready to be sent."""

    name: str | None = None
    dry_run: Literal["client", "server"] | None = None
    render_to: Path | None = None
    crds: Path | None = None
    detach: bool = False
    max_wait_s: float | None = None


@dataclass
class Terminal:
    """Where a person is spoken to and asked."""

    say: Callable[[str], None]
    ask: Callable[[str], str] | None
    """None: nobody is there to answer."""
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.time


def terminal() -> Terminal:
    console = Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    return Terminal(say, console.input if sys.stdin.isatty() else None)


def planner(address: str, options: KubernetesOptions, storage: str | None = None) -> Planner:
    if address == KUBERNETES:
        from cluster.kubernetes.target import plan_rayjob

        return partial(plan_rayjob, options)
    from cluster.ray_target import plan_ray_job

    return partial(plan_ray_job, storage, options.max_wait_s)


def connect(address: str, namespace: str | None = None, context: str | None = None) -> Target:
    """`kubernetes`, or the address of a Ray cluster's dashboard."""
    if address == KUBERNETES:
        from cluster.kubernetes.api import KubernetesApi
        from cluster.kubernetes.target import KubernetesTarget

        return KubernetesTarget(KubernetesApi.connect(context, namespace))
    if address.startswith(("http://", "https://")):
        from cluster.ray_jobs import RayJobs, dashboard
        from cluster.ray_target import RayTarget

        return RayTarget(RayJobs(dashboard(address)))
    raise ConfigError(
        f"--target must be {KUBERNETES} or a Ray dashboard's http:// address, but got {address}"
    )


def submit_sweep(
    path: Path,
    overrides: list[str],
    plan_job: Planner,
    reach: Callable[[], Target],
    sending: Sending,
    person: Terminal,
) -> int:
    """`reach` is called only if there is something to ask or to send."""
    config = load_config(path, overrides)
    check_space(config)
    plan = plan_job(config, sending.name)
    if sending.crds is not None:
        _validate(plan, sending.crds)
    if sending.render_to is not None:
        return _render(plan, sending.render_to, person)
    if sending.dry_run is not None:
        if sending.dry_run == "server":
            reach().try_out(plan)
        print(_shown(plan.request), end="")
        return 0
    target = reach()
    action = decide_submission(plan.submission, target.find(plan.submission.name))
    person.say(action.reason)
    if action.kind == "nothing":
        return 0
    if action.kind != "attach":
        try:
            target.send(plan, action)
        except KeyboardInterrupt:
            name = plan.submission.name
            person.say(f"{name} may have been sent: look with `orchestrator jobs status {name}`")
            raise
        person.say(f"submitted {plan.submission.name}; run folder {plan.submission.run_dir}")
    if sending.detach:
        person.say(f"follow it with `orchestrator jobs logs {plan.submission.name} --follow`")
        return 0
    return follow_job(target, plan.submission.name, person, sending.max_wait_s)


def follow_job(target: Target, name: str, person: Terminal, max_wait_s: float | None = None) -> int:
    follower = Follower(target, name, person.say, person.sleep, person.clock, max_wait_s=max_wait_s)
    while True:
        try:
            return exit_code(follower.follow())
        except NeverStarted:
            # What it holds, such as a head pod and quota, would do nothing until its deadline.
            if _take_out(target, name):
                person.say(f"{name} is taken out: nothing of it runs")
            raise
        except KeyboardInterrupt:
            if (code := _interrupted(target, name, person)) is not None:
                return code


def list_jobs(target: Target, person: Terminal) -> int:
    views = target.list()
    if not views:
        person.say("no sweep was submitted here")
        return 0
    table = Table()
    for column in ("job", "sweep", "state", "age", "run folder", "why"):
        table.add_column(column)
    now = time.time()
    for view in views:
        age = _age(now - view.created) if view.created else ""
        table.add_row(view.name, view.sweep, view.state, age, view.run_dir, view.message)
    Console().print(table)
    return 0


def show_status(target: Target, name: str, person: Terminal) -> int:
    story = target.story(name)
    if story is None:
        raise NeverStarted(f"there is no job {name}: see `orchestrator jobs list`")
    view = story.view
    for line in story.lines:
        since = line.time - (view.created or line.time)
        person.say(f"[{_age(since)}] {line.text}")
    reason = story.cause or view.message
    person.say(f"{name} is {view.state}" + (f": {reason}" if reason else ""))
    if view.run_dir:
        person.say(f"run folder: {view.run_dir}")
    return exit_code(view) if view.state in OVER else 0


def show_log(target: Target, name: str, follow: bool, person: Terminal) -> int:
    if follow:
        return follow_job(target, name, person)
    view = _known(target, name)
    text = target.log(name)
    if text is None:
        raise ClusterError(
            f"the log of {name} cannot be read here ({name} is {view.state}): it is kept in "
            f"{view.run_dir}/{DRIVER_LOG} and in MLflow"
        )
    person.say(text.rstrip("\n"))
    return 0


def cancel_job(target: Target, name: str, pause: bool, person: Terminal) -> int:
    view = _known(target, name)
    if view.state in OVER:
        person.say(f"{name} is over already: it {view.state}")
        return 0
    (target.pause if pause else target.cancel)(name)
    person.say(f"{name} is asked to save and stop")
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
    person.say(f"{name} is stopped; `orchestrator jobs resume {name}` or a new submit goes on")
    return 0


def resume_job(target: Target, name: str, detach: bool, person: Terminal) -> int:
    view = _known(target, name)
    if view.state == "succeeded":
        person.say(f"{name} is done: its run folder is {view.run_dir}")
        return 0
    if view.state in OVER | {"suspended"}:
        target.resume(name)
        person.say(f"{name} goes on from {view.run_dir}")
    else:
        person.say(f"{name} is already {view.state}")
    return 0 if detach else follow_job(target, name, person)


def _known(target: Target, name: str) -> JobView:
    view = target.find(name)
    if view is None:
        raise ConfigError(f"there is no job {name}: see `orchestrator jobs list`")
    return view


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
    person.say(f"{name} goes on; come back with `orchestrator jobs logs {name} --follow`")
    return DETACHED


def _take_out(target: Target, name: str) -> bool:
    view = target.find(name)
    if view is None or view.state not in BEFORE:
        return False
    target.cancel(name)
    return True


def _render(plan: Plan, folder: Path, person: Terminal) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{plan.submission.name}.yaml"
    path.write_text(_shown(plan.request))
    person.say(f"wrote {path}; nothing was sent")
    return 0


def _shown(request: dict[str, Any]) -> str:
    if request.get("kind") == "RayJob":
        from cluster.kubernetes.rayjob import to_yaml

        return to_yaml(request)
    return str(yaml.safe_dump(request, sort_keys=False))


def _validate(plan: Plan, folder: Path) -> None:
    from cluster.kubernetes.crds import CustomResources

    known = CustomResources(folder)
    if not known.knows(plan.request):
        raise ConfigError(f"{folder} defines no {plan.request.get('kind', 'such resource')}")
    if problems := known.problems(plan.request):
        raise ConfigError("\n".join(problems))


def _age(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

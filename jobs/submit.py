"""`orchestrator submit`: send a sweep to a cluster and follow it to its end.

In: a configuration and a target. Out: an exit code, the sweep's own: 0 succeeded, 1 the work
failed, 2 the input is wrong, 3 cancelled or paused, 4 never started, 5 no contact, 130 left with
Ctrl-C.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

from cluster.kubernetes.options import KubernetesOptions
from cluster.kubernetes.rayjob import to_yaml
from cluster.submission import decide_submission
from cluster.target import Plan, Planner, Target
from jobs.submitted import follow_job
from jobs.terminal import Terminal
from orchestrator.config import SweepConfig
from orchestrator.data.streams import is_remote
from orchestrator.errors import ConfigError
from orchestrator.loading import load_config
from orchestrator.search.space import check_space

KUBERNETES = "kubernetes"


@dataclass(frozen=True)
class Sending:
    """What to do with a sweep that is ready to be sent."""

    name: str | None = None
    dry_run: Literal["client", "server"] | None = None
    render_to: Path | None = None
    crds: Path | None = None
    detach: bool = False


def planner(address: str, options: KubernetesOptions, storage: str | None = None) -> Planner:
    """Raises ConfigError for options that mean nothing to this target."""
    check_target(address)
    if address == KUBERNETES:
        if storage is not None:
            raise ConfigError(
                f"--storage {storage} is for a Ray cluster: on Kubernetes it is the volume claim "
                "of the RayJob, see --template"
            )
        from cluster.kubernetes.target import plan_rayjob

        return partial(plan_rayjob, options)
    ignored = replace(options, max_wait_s=KubernetesOptions.max_wait_s)
    if given := [
        f"--{field.name.removesuffix('_s').replace('_', '-')}"
        for field in fields(KubernetesOptions)
        if getattr(ignored, field.name) != field.default
    ]:
        raise ConfigError(
            f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} for Kubernetes, but --target "
            f"is {address}, a cluster that is there already: leave them out"
        )
    from cluster.ray_target import plan_ray_job

    return partial(plan_ray_job, storage, options.max_wait_s)


def check_target(address: str) -> None:
    if address != KUBERNETES and not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--target must be {KUBERNETES} or a Ray dashboard's http:// address, but got {address}"
        )


def connect(address: str, namespace: str | None = None, context: str | None = None) -> Target:
    """`kubernetes`, or the address of a Ray cluster's dashboard."""
    check_target(address)
    if address == KUBERNETES:
        from cluster.kubernetes.api import KubernetesApi
        from cluster.kubernetes.target import KubernetesTarget

        given = {"namespace": namespace, "context": context}
        place = "".join(f" --{name} {value}" for name, value in given.items() if value)
        return KubernetesTarget(KubernetesApi.connect(context, namespace), place=place)
    from cluster.ray_jobs import RayJobs, dashboard
    from cluster.ray_target import RayTarget

    return RayTarget(RayJobs(dashboard(address)), place=f" --target {address}")


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
    check_places(config)
    plan = plan_job(config, sending.name)
    if sending.crds is not None:
        _validate(plan, sending.crds)
    if sending.dry_run == "server":
        reach().try_out(plan)
    if sending.render_to is not None:
        return _render(plan, sending.render_to, person)
    if sending.dry_run is not None:
        print(to_yaml(plan.request), end="")
        return 0
    target = reach()
    action = decide_submission(plan.submission, target.find(plan.submission.name))
    if action.kind != "create":
        person.say(action.reason)
    if action.kind == "nothing":
        return 0
    if action.kind != "attach":
        try:
            target.send(plan, action)
        except KeyboardInterrupt:
            command = f"orchestrator jobs status {plan.submission.name}{target.place}"
            person.say(f"{plan.submission.name} may have been sent: look with `{command}`")
            raise
        person.say(f"submitted {plan.submission.name}; run folder {plan.submission.run_dir}")
        if plan.shape:
            person.say(f"asks for {plan.shape}")
    if sending.detach:
        command = f"orchestrator jobs logs {plan.submission.name} --follow{target.place}"
        person.say(f"follow it with `{command}`")
        return 0
    return follow_job(target, plan.submission.name, person, owns=True)


def check_places(config: SweepConfig) -> None:
    """Raises ConfigError for a path that only this machine can know."""
    data = (*config.data.train_sources, *config.data.held_out_sources)
    named = [("base_model.source", config.base_model.source)]
    for field, place in [*named, *(("data", source.path) for source in data)]:
        path = Path(place)
        if path.is_absolute() or is_remote(place):
            continue
        if place.startswith((".", "~")) or path.exists():
            raise ConfigError(
                f"{field}: {place} is a path on this machine, but the sweep runs on a cluster: "
                "give a hub id, a URL, or an absolute path on storage that all its nodes share"
            )


def _render(plan: Plan, folder: Path, person: Terminal) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{plan.submission.name}.yaml"
    path.write_text(to_yaml(plan.request))
    person.say(f"wrote {path}; nothing was sent")
    return 0


def _validate(plan: Plan, folder: Path) -> None:
    from cluster.kubernetes.crds import CustomResources

    known = CustomResources(folder)
    if not known.knows(plan.request):
        raise ConfigError(f"{folder} defines no {plan.request.get('kind', 'such resource')}")
    if problems := known.problems(plan.request):
        raise ConfigError("\n".join(problems))

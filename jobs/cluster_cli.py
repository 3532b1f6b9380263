"""The verbs of the command line that talk to a cluster: `submit` and `jobs`. Parses, calls one
function. Imports nothing heavy."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from orchestrator.errors import ConfigError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
LONGEST_S = 2**31 - 1  # RayJob's fields have 32 bits

jobs_app = typer.Typer(help="Sweeps that were submitted to a cluster.", no_args_is_help=True)


def seconds(option: str, text: str) -> int:
    found = re.fullmatch(r"(\d+)([smhd]?)", text)
    time_s = int(found[1]) * UNITS[found[2] or "s"] if found else 0
    if not 0 < time_s <= LONGEST_S:
        raise ConfigError(
            f"{option} must be a time such as 90s, 30m, 24h or 7d, at most 24855d, but got {text}"
        )
    return time_s


TargetOption = Annotated[
    str, typer.Option(help="`kubernetes`, or the http:// address of a Ray cluster's dashboard.")
]
Namespace = Annotated[str | None, typer.Option(help="Default: the kubeconfig's.")]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig.")]
KeepFailed = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Keep the cluster of a sweep that fails, for a look."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the sweep."),
]
JobName = Annotated[str, typer.Argument(metavar="NAME", help="The sweep's name, or its job's.")]
AsJson = Annotated[bool, typer.Option("--json", help="For a program to read.")]


def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The sweep's YAML file.")],
    target: TargetOption = "kubernetes",
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="The job's name; default: the sweep's.")] = None,
    namespace: Namespace = None,
    context: Context = None,
    gpus: Annotated[int, typer.Option(min=0, help="In all; 0 trains on CPUs.")] = 0,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of one pod.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Pods of a sweep without GPUs.")] = 1,
    cpus_per_node: Annotated[int, typer.Option(min=0, help="Default: 8 per GPU, else 4.")] = 0,
    memory_per_node: Annotated[int, typer.Option(min=0, help="GiB; default: 64 per GPU.")] = 0,
    gpu_type: Annotated[
        str | None, typer.Option(help="Such as h100, a product label's value, or LABEL=VALUE.")
    ] = None,
    capacity: Annotated[
        Literal["on-demand", "spot", "spot-first"], typer.Option(help="Kind of nodes.")
    ] = "on-demand",
    queue: Annotated[str | None, typer.Option(help="Kueue's LocalQueue.")] = None,
    priority: Annotated[str | None, typer.Option(help="Kueue's priority class.")] = None,
    image: Annotated[str | None, typer.Option(help="NAME:TAG or NAME@sha256:DIGEST.")] = None,
    image_pull_policy: Annotated[
        Literal["IfNotPresent", "Always", "Never"] | None, typer.Option()
    ] = None,
    max_runtime: Annotated[str, typer.Option(metavar="TIME", help="Such as 90s, 30m, 7d.")] = "24h",
    max_wait: Annotated[
        str, typer.Option(metavar="TIME", help="For pods to start, once out of the queue.")
    ] = "30m",
    keep_failed: KeepFailed = None,
    retries: Annotated[int, typer.Option(min=0, max=1, help="New clusters after a failure.")] = 0,
    template: Annotated[
        Path | None, typer.Option(help="A RayJob to start from; default: k8s/base/rayjob.yaml.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Shared folder of a Ray cluster, for run folders.")
    ] = None,
    dry_run: Annotated[
        Literal["client", "server"] | None, typer.Option(help="Print what would be sent.")
    ] = None,
    crds: Annotated[
        Path | None, typer.Option(help="Validate with the definitions in this folder, too.")
    ] = None,
    render_to: Annotated[Path | None, typer.Option(help="Write it there; send nothing.")] = None,
    detach: Annotated[bool, typer.Option(help="Send it and end; do not follow it.")] = False,
) -> int:
    """Send a sweep to a cluster and follow it to its end. Ends as it did."""
    from cluster.kubernetes.options import KubernetesOptions
    from jobs.submit import Sending, connect, planner, submit_sweep
    from jobs.terminal import terminal

    options = KubernetesOptions(
        namespace=namespace,
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        nodes=nodes,
        cpus_per_node=cpus_per_node,
        memory_gib_per_node=memory_per_node,
        gpu_type=gpu_type,
        capacity=capacity,
        queue=queue,
        priority=priority,
        image=image,
        image_pull_policy=image_pull_policy,
        max_runtime_s=seconds("--max-runtime", max_runtime),
        max_wait_s=seconds("--max-wait", max_wait),
        retries=retries,
        keep_failed_s=seconds("--keep-failed", keep_failed) if keep_failed else 0,
        template=template,
    )
    sending = Sending(name, dry_run, render_to, crds, detach)
    return submit_sweep(
        config,
        overrides or [],
        planner(target, options, storage),
        lambda: connect(target, namespace, context),
        sending,
        terminal(),
    )


@jobs_app.command("list")
def list_(
    as_json: AsJson = False,
    target: TargetOption = "kubernetes",
    namespace: Namespace = None,
    context: Context = None,
) -> int:
    """The sweeps that were submitted, the newest first."""
    from jobs.submit import connect
    from jobs.submitted import list_jobs
    from jobs.terminal import terminal

    return list_jobs(connect(target, namespace, context), as_json, terminal())


@jobs_app.command()
def status(
    name: JobName,
    as_json: AsJson = False,
    target: TargetOption = "kubernetes",
    namespace: Namespace = None,
    context: Context = None,
) -> int:
    """What has happened to a sweep so far. And why it does not start, if it does not."""
    from jobs.submit import connect
    from jobs.submitted import show_status
    from jobs.terminal import terminal

    return show_status(connect(target, namespace, context), name, as_json, terminal())


@jobs_app.command()
def logs(
    name: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="To the sweep's end.")] = False,
    worker: Annotated[
        str | None,
        typer.Option(metavar="PACK[.WORLD_RANK]", help="What a pack's worker has printed instead."),
    ] = None,
    target: TargetOption = "kubernetes",
    namespace: Namespace = None,
    context: Context = None,
) -> int:
    """What the sweep's driver has printed."""
    from jobs.submit import connect
    from jobs.submitted import show_log, show_worker_log
    from jobs.terminal import terminal

    if worker is None:
        return show_log(connect(target, namespace, context), name, follow, terminal())
    if follow:
        raise ConfigError("--worker shows what is there now: leave --follow out")
    return show_worker_log(connect(target, namespace, context), name, worker, terminal())


@jobs_app.command()
def cancel(
    name: JobName,
    pause: Annotated[bool, typer.Option(help="Give back what it holds; keep its place.")] = False,
    target: TargetOption = "kubernetes",
    namespace: Namespace = None,
    context: Context = None,
) -> int:
    """Ask a sweep to save and stop."""
    from jobs.submit import connect
    from jobs.submitted import cancel_job
    from jobs.terminal import terminal

    return cancel_job(connect(target, namespace, context), name, pause, terminal())


@jobs_app.command()
def resume(
    name: JobName,
    detach: Annotated[bool, typer.Option(help="Do not follow it.")] = False,
    target: TargetOption = "kubernetes",
    namespace: Namespace = None,
    context: Context = None,
) -> int:
    """Go on with a sweep that failed or was stopped."""
    from jobs.submit import connect
    from jobs.submitted import resume_job
    from jobs.terminal import terminal

    return resume_job(connect(target, namespace, context), name, detach, terminal())

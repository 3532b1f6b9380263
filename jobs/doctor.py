"""`orchestrator doctor`: what this machine, or a cluster, can do and what to fix.

In: nothing, or a cluster's address. Out: a table; the exit code is 1 if sweeps cannot run there.
"""

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from jobs.submit import KUBERNETES, connect
from orchestrator.files import cache_dir
from orchestrator.records import Finding
from orchestrator.wording import counted

PACKAGES = (
    "torch transformers peft bitsandbytes deepspeed ray mlflow optuna datasets safetensors"
).split()
MIN_FREE_GIB = 5.0


def examine() -> int:
    return _shown([finding for check in CHECKS for finding in check()])


def examine_target(target: str, namespace: str | None, context: str | None) -> int:
    """Of a cluster that sweeps are submitted to."""
    if target == KUBERNETES:
        from cluster.kubernetes.api import KubernetesApi
        from cluster.kubernetes.checks import examine_cluster

        return _shown(list(examine_cluster(KubernetesApi.connect(context, namespace))))
    jobs = connect(target).list()
    return _shown(
        [Finding("Ray job API", "ok", f"{target} answers; {counted(len(jobs), 'sweep')}")]
    )


def _shown(findings: list[Finding]) -> int:
    table = Table(show_header=False)
    signs = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[red]broken[/]"}
    for finding in findings:
        table.add_row(signs[finding.state], finding.subject, finding.text)
    Console().print(table)
    return 1 if any(finding.state == "broken" for finding in findings) else 0


def _python() -> Iterator[Finding]:
    cores = os.cpu_count()
    yield Finding("python", "ok", f"{platform.python_version()}, {cores} cores")


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            state: Literal["note", "broken"] = "note" if name == "deepspeed" else "broken"
            yield Finding(name, state, "not installed: run `make install`")


def _accelerator() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        build = (
            f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
        )
        yield Finding("GPU", "note", f"none ({build}): trials train on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding("GPU", "ok", f"{name}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")


def _cpu_arithmetic() -> Iterator[Finding]:
    from orchestrator.sweep.flow import auto_compute_dtype

    dtype = auto_compute_dtype("cpu")
    why = "has" if dtype == "bfloat16" else "has no"
    yield Finding("CPU arithmetic", "ok", f"{dtype} (the CPU {why} bfloat16 instructions)")


def _quantisation() -> Iterator[Finding]:
    from orchestrator.training.quiet import quiet_libraries

    with quiet_libraries():
        import bitsandbytes
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        weight = torch.randn(256, 256, device=device)
        try:
            packed, state = bitsandbytes.functional.quantize_4bit(
                weight, quant_type="nf4", compress_statistics=True
            )
            back = bitsandbytes.functional.dequantize_4bit(packed, state)
        except (RuntimeError, NotImplementedError) as error:
            yield Finding("bitsandbytes", "broken", f"NF4 on {device}: {error}")
            return
    relative = float((back - weight).norm() / weight.norm())
    yield Finding("bitsandbytes", "ok", f"NF4 on {device} works (relative error {relative:.3f})")


def _deepspeed_ops() -> Iterator[Finding]:
    if importlib.util.find_spec("deepspeed") is None:
        return
    from orchestrator.training.deepspeed_ops import BUILD_S, OPS, is_built, ops_folder

    for op in OPS:
        if is_built(op):
            yield Finding(f"DeepSpeed {op}", "ok", f"built, in {ops_folder()}")
        else:
            text = f"not built: its first use compiles it, about {BUILD_S[op]} seconds"
            yield Finding(f"DeepSpeed {op}", "note", text)


def _ray() -> Iterator[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    yield Finding("Ray cluster", "ok", address or "none named: sweeps start a local one")


def _tracking() -> Iterator[Finding]:
    from orchestrator.errors import TrackingError
    from orchestrator.tracking.stores import check_reachable, default_store

    uri = os.environ.get("MLFLOW_TRACKING_URI") or default_store(Path("runs"))
    try:
        check_reachable(uri)
        yield Finding("tracking", "ok", uri)
    except TrackingError as error:
        yield Finding("tracking", "broken", str(error))


def _disk() -> Iterator[Finding]:
    for name, path in (("cache", cache_dir()), ("runs", Path("runs").absolute())):
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        free_gib = shutil.disk_usage(existing).free / 2**30
        state: Literal["ok", "note"] = "ok" if free_gib >= MIN_FREE_GIB else "note"
        yield Finding(f"disk for {name}", state, f"{free_gib:.1f} GiB free at {path}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _accelerator,
    _cpu_arithmetic,
    _quantisation,
    _deepspeed_ops,
    _ray,
    _tracking,
    _disk,
)

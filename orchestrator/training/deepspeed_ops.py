"""DeepSpeed's compiled operators: built once per machine into a cache, never waited for in vain.

In: an operator's name. Out: the operator, loaded into this process, where DeepSpeed finds it.

torch guards a build with a file named `lock`, which a killed build leaves behind and every later
one waits for without a word. Here all builds and loads of a folder hold a lock of the kernel, which
goes with its process: a `lock` that is seen while holding it is stale.
"""

import hashlib
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from filelock import FileLock

from orchestrator.errors import StrategyError
from orchestrator.files import cache_dir
from orchestrator.training.quiet import quiet_libraries

Op = Literal["cpu_adam", "async_io"]
OPS: tuple[Op, ...] = get_args(Op)
BUILD_S: dict[Op, int] = {"cpu_adam": 45, "async_io": 160}
"""Seconds that compiling took, once for a machine."""


def load_op(name: Op) -> None:
    """Load the operator, building it where it is not built, which takes BUILD_S.

    Raises:
        StrategyError: it cannot be built here; says what is missing.
    """
    with building(ops_folder()):
        builder = _builder(name)
        if missing := _missing(name, builder):
            raise StrategyError(f"DeepSpeed's {name} must be compiled, but {missing}")
        try:
            builder.load(verbose=False)
        except RuntimeError as error:  # with the compiler's words
            raise StrategyError(f"DeepSpeed's {name} cannot be compiled: {error}") from error


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Inside, torch builds extensions in this folder, and nobody else does."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)  # torch reads it at every build and load
    with FileLock(folder / "building.lock"):
        for lock in folder.glob("*/lock"):
            lock.unlink(missing_ok=True)
        yield


def ops_folder() -> Path:
    """Of the operators for this torch, this DeepSpeed and this CPU, which they are compiled for
    (-march=native): machines with others may share the cache."""
    from importlib.metadata import version

    words = (
        f"torch{torch.__version__}",
        f"cuda{torch.version.cuda}",
        f"deepspeed{version('deepspeed')}",
        f"python{platform.python_version()}",
        hashlib.sha256(_cpu().encode()).hexdigest()[:12],
    )
    return cache_dir() / "deepspeed-ops" / "-".join(words)


def is_built(name: Op) -> bool:
    return (ops_folder() / name / f"{name}.so").exists()


def _builder(name: Op) -> Any:
    """The builder without CUDA, also where there is a GPU: DeepSpeed's choice there wants CUDA's
    headers for an async_io that calls nothing of CUDA (csrc/aio). DeepSpeed finds what is loaded
    by its name."""
    with quiet_libraries():
        from deepspeed.ops.op_builder import cpu

    return {"cpu_adam": cpu.CPUAdamBuilder, "async_io": cpu.AsyncIOBuilder}[name]()


def _missing(name: Op, builder: Any) -> str:
    """torch asks for compiler and ninja also where all is built."""
    scripts = sysconfig.get_path("scripts")  # of a virtual environment that is not activated
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), scripts])
    if shutil.which("ninja") is None:
        return "ninja is not there: pip install ninja"
    compiler = os.environ.get("CXX", "c++")  # as torch looks for it
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler}): install g++ (Debian: apt-get install g++)"
    if name == "async_io" and not builder.is_compatible():
        return (
            "libaio is not there: install it (Debian: apt-get install libaio-dev), or set "
            "strategy.offload_optimizer and offload_params to cpu"
        )
    return ""


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("vendor_id", "cpu family", "model\t", "flags", "Features")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))

"""DeepSpeed's operators are built in one place, and no build is waited for that nobody makes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from orchestrator.training.deepspeed_ops import building, is_built, ops_folder


def test_a_lock_that_a_killed_build_left_is_not_waited_for(tmp_path: Path) -> None:
    source = tmp_path / "one.cpp"
    source.write_text("int one() { return 1; }\n")
    stale = tmp_path / "ops" / "one" / "lock"
    stale.parent.mkdir(parents=True)
    stale.touch()
    with building(tmp_path / "ops"):
        cpp_extension.load("one", [str(source)], is_python_module=False, verbose=False)
    assert (stale.parent / "one.so").exists()
    assert not stale.exists()


@pytest.mark.slow
@pytest.mark.parametrize("op", ["cpu_adam", "async_io"])
def test_an_operator_is_loaded_from_the_cache_past_a_stale_lock(op: str) -> None:
    (ops_folder() / op).mkdir(parents=True, exist_ok=True)
    (ops_folder() / op / "lock").touch()
    result = run_load(op)
    assert result.returncode == 0, result.stderr
    assert is_built(op)  # type: ignore[arg-type]


@pytest.mark.parametrize("op", ["cpu_adam", "async_io"])
def test_a_missing_compiler_is_one_error_that_says_what_to_install(op: str) -> None:
    result = run_load(op, CXX="no-such-compiler")
    assert result.stderr.splitlines()[-1] == (
        f"orchestrator.errors.StrategyError: DeepSpeed's {op} must be compiled, but there is no "
        "C++ compiler (no-such-compiler): install g++ (Debian: apt-get install g++)"
    )


def run_load(op: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """In a process of its own: a loaded operator stays."""
    code = f"from orchestrator.training.deepspeed_ops import load_op; load_op({op!r})"
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DS_ACCELERATOR": "cpu"} | variables,
        capture_output=True,
        text=True,
        timeout=280,
    )

"""The real command, in processes of its own, on a tiny base model made here."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from orchestrator.sweep.run_store import RunStore
from orchestrator.tracking.stores import default_store
from tests import runs as samples
from tests.integration.mlflow_runs import MakeRun
from tests.sweeps import with_changes
from tests.tiny import make_base_model, question_rows

COMMAND_TIMEOUT_S = 480

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The user's, with a cache of its own and no network."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_"))}
    return inherited | {
        "ORCHESTRATOR_CACHE": str(tmp_path_factory.mktemp("cache")),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }


@pytest.fixture(scope="session")
def as_on_a_node(
    tmp_path_factory: pytest.TempPathFactory, environment: Mapping[str, str]
) -> Mapping[str, str]:
    """The environment, where `orchestrator` is a command of this source, as in the image."""
    folder = tmp_path_factory.mktemp("bin")
    command = folder / "orchestrator"
    command.write_text(f"#!{sys.executable}\nfrom jobs.cli import main\nmain()\n")
    command.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return {**environment, "PATH": path, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture(scope="session")
def orchestrator(environment: Mapping[str, str]) -> Command:
    """Run `orchestrator ARGUMENTS` in a folder and wait for its end."""

    def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*program(), *arguments],
            cwd=cwd,
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )

    return command


@pytest.fixture(scope="session")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow database for all tests: a new one takes 8 s."""
    store = default_store(tmp_path_factory.mktemp("mlflow"))
    MlflowClient(tracking_uri=store).search_experiments(max_results=1)
    return store


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[MakeRun]:
    """Run folders with an experiment and a model of their own."""
    name = f"sweep-{uuid.uuid4().hex[:8]}"
    count = iter(range(100))

    def make(content: dict[str, Any] | None = None, **options: Any) -> RunStore:
        run_id = f"{name}-{next(count)}"
        config = samples.make_config(name=name, **content or {})
        return samples.make_run(tmp_path / run_id, run_id=run_id, config=config, **options)

    return make


def program() -> list[str]:
    return [sys.executable, "-c", "from jobs.cli import main; main()"]


def write_config(folder: Path, base: Path, **changes: Any) -> Path:
    """A sweep of four trials on sums; `changes` are dotted with __."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in question_rows(120)))
    content: dict[str, Any] = {
        "name": "sums",
        "base_model": {"source": str(base)},
        "data": {"train": str(rows), "template": "chat", "block_length": 128},
        "trial": {
            "steps": 6,
            "batch_size": 2,
            "optimizer": {"learning_rate": 1e-2},
            "quant": {"compute_dtype": "float32"},
        },
        "search": {"space": {"quant.bit_width": [4, 16], "adapter.rank": [2, 4]}},
        "evaluation": {"every_steps": 3},
        "checkpoint_every_steps": 2,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(with_changes(content, changes)))
    return path

"""Which MLflow store a sweep uses, and how its address is shown."""

import os
import sys
from pathlib import Path

import pytest

from orchestrator.errors import (
    OrchestratorError,
    RegistryError,
    RegistryUnreachable,
    TrackingError,
    TrackingUnreachable,
)
from orchestrator.tracking.stores import (
    artifact_location,
    default_store,
    environment,
    mlflow_calls,
    resolve_tracking_uri,
    ui_command,
    without_password,
)
from tests.runs import make_config


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_the_configuration_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment:5000")
    config = make_config(tracking={"uri": "http://configured:5000"})
    assert resolve_tracking_uri(config) == "http://configured:5000"
    assert resolve_tracking_uri(make_config()) == "http://environment:5000"


def test_the_default_store_lies_in_the_runs_folder(tmp_path: Path) -> None:
    config = make_config(runs_dir=str(tmp_path))
    assert resolve_tracking_uri(config) == f"sqlite:///{tmp_path}/mlflow.db"
    assert default_store(Path("runs")) == f"sqlite:///{Path.cwd()}/runs/mlflow.db"


def test_artifacts_of_a_local_store_lie_beside_it() -> None:
    location = artifact_location("sqlite:////data/my runs/mlflow.db", "a/b c")
    assert location == "file:///data/my%20runs/mlartifacts/a_b_c"
    assert artifact_location("http://server:5000", "a") is None


def test_the_ui_serves_a_local_store_to_this_machine_only() -> None:
    command = ui_command("sqlite:////data/mlflow.db", 5001)
    assert command[:4] == [sys.executable, "-m", "mlflow", "server"]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--artifacts-destination") + 1] == "/data/mlartifacts"
    with pytest.raises(TrackingError, match="no local store"):
        ui_command("http://server:5000", 5001)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:p@ss@server:5000/x", "http://server:5000/x"),
        ("postgresql+psycopg2://user:pass@host/db", "postgresql+psycopg2://host/db"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("http://server", "http://server"),
    ],
)
def test_passwords_are_not_shown(uri: str, shown: str) -> None:
    assert without_password(uri) == shown


def test_environment_changes_end_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SET_VARIABLE", "1")
    monkeypatch.delenv("AN_UNSET_VARIABLE", raising=False)
    with environment({"A_SET_VARIABLE": "2", "AN_UNSET_VARIABLE": "3"}):
        assert (os.environ["A_SET_VARIABLE"], os.environ["AN_UNSET_VARIABLE"]) == ("2", "3")
    assert os.environ["A_SET_VARIABLE"] == "1"
    assert "AN_UNSET_VARIABLE" not in os.environ


@pytest.mark.parametrize(
    ("kind", "silent"),
    [(TrackingError, TrackingUnreachable), (RegistryError, RegistryUnreachable)],
)
def test_who_does_not_answer_is_told_from_who_says_no(
    kind: type[OrchestratorError], silent: type[OrchestratorError]
) -> None:
    for cause, found in ((ConnectionError("timed out"), silent), (OSError("denied"), kind)):
        with pytest.raises(kind) as raised, mlflow_calls("http://server", kind):
            raise cause
        assert type(raised.value) is found

"""Where MLflow keeps its data: the tracking URI, the local store's folders, and a quick check.

In: a SweepConfig or a tracking URI. Out: URIs, a command line, or a TrackingError with the cause
and the remedy. Imports mlflow and sqlalchemy inside functions only.
"""

import logging
import os
import re
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from orchestrator.config import SweepConfig
from orchestrator.errors import (
    OrchestratorError,
    RegistryError,
    RegistryUnreachable,
    TrackingError,
    TrackingUnreachable,
)
from orchestrator.garbage import without_collections

if TYPE_CHECKING:
    from mlflow import MlflowClient

SERVER_SCHEMES = frozenset({"http", "https"})
DATABASE_SCHEMES = frozenset({"sqlite", "postgresql", "mysql", "mssql"})
OTHER_SCHEMES = frozenset({"", "file", "databricks", "databricks-uc", "uc"})
PROBE_TIMEOUT_S = 5
# MLflow's own defaults (7 retries, 120 s each) let a dead server hold a command for minutes.
PROBE_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(PROBE_TIMEOUT_S),
}
# As a dead server, a dead database, and a proxy before a dead server say it.
UNREACHABLE = (
    r"[Tt]imed? ?out|refused|Max retries|resolve|Name or service|unreachable|aborted|reset by peer"
    r"|closed the connection|Connection broken|error code 50[234]"
)
# While events are forwarded, who forwards tries again: MLflow's own tries would hold the end of a
# sweep for minutes, and make a run twice when the answer to `create` is lost.
FORWARDING_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
# What a failure's own words tell about its remedy; the first that fits.
REMEDIES = (
    (r"\b401\b|[Uu]nauthenticated|[Uu]nauthori[sz]ed",
     "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"),
    (r"\b403\b|[Pp]ermission denied|PERMISSION_DENIED",
     "this user may not do that there: ask for the right, or use another tracking.uri"),
    (r"out-of-date database schema|Can't locate revision",
     "another MLflow version made this database: use that version, or, if the database is the "
     "older one, back it up and run `mlflow db upgrade`"),
    (r"No module named|Can't load plugin", "install the database's Python driver"),
    (UNREACHABLE, "start the server, or correct tracking.uri or MLFLOW_TRACKING_URI"),
)  # fmt: skip
DEFAULT_REMEDY = "check tracking.uri or MLFLOW_TRACKING_URI"
MAX_CAUSE_CHARS = 300


def resolve_tracking_uri(config: SweepConfig) -> str:
    """The configured URI, else MLFLOW_TRACKING_URI, else SQLite in the runs folder."""
    return (
        config.tracking.uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or default_store(Path(config.runs_dir))
    )


def default_store(runs_dir: Path) -> str:
    return f"sqlite:///{runs_dir.expanduser().absolute() / 'mlflow.db'}"


def is_absent(uri: str) -> bool:
    """Whether it names a SQLite database that is not there."""
    database = _sqlite_file(uri)
    return database is not None and not database.exists()


def artifact_location(uri: str, experiment: str) -> str | None:
    """Folder URI for the artifacts of a local experiment; None where the server decides."""
    database = _sqlite_file(uri)
    if database is None:
        return None
    name = re.sub(r"[^A-Za-z0-9._-]", "_", experiment)
    return (_artifacts_folder(database) / name).as_uri()


def ui_command(uri: str, port: int) -> list[str]:
    """The argv of a server, for this machine only, with the UI of a local SQLite store.

    Raises:
        TrackingError: `uri` is no SQLite store; a server has its own UI.
    """
    database = _sqlite_file(uri)
    if database is None:
        raise TrackingError(f"{without_password(uri)} is no local store: open its own UI instead")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--artifacts-destination", str(_artifacts_folder(database))]
    return [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]


def check_reachable(uri: str) -> bool:
    """One cheap call, of 5 s at most, so that a wrong URI ends a command at its start. Whether
    there is a store: a SQLite database that is not there yet is not made, for its tables take 8 s.

    Raises:
        TrackingError: with the cause and the remedy.
    """
    scheme = _checked_scheme(uri)
    if scheme == "sqlite" and not _check_database_file(uri):
        return False
    with mlflow_calls(uri), environment(PROBE_ENVIRONMENT):
        if scheme in ("postgresql", "mysql"):
            _check_database_server(uri)
        client(uri).search_experiments(max_results=1)
    return True


def client(uri: str) -> "MlflowClient":
    import mlflow

    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def mlflow_calls(uri: str, error: type[OrchestratorError] = TrackingError) -> Iterator[None]:
    """Inside, MLflow chats less, and what it raises becomes our error, with cause and remedy."""
    try:
        with _quiet_mlflow():
            yield
    except _mlflow_failures() as failure:
        cause = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        remedy = next((text for rule, text in REMEDIES if re.search(rule, cause)), DEFAULT_REMEDY)
        if re.search(UNREACHABLE, cause):
            error = {
                TrackingError: TrackingUnreachable,
                RegistryError: RegistryUnreachable,
            }.get(error, error)
        raise error(
            f"MLflow at {without_password(uri)}: {cause[:MAX_CAUSE_CHARS]}: {remedy}"
        ) from failure


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the block only."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def without_password(uri: str) -> str:
    """The URI as it may be shown and written down."""
    uri = re.sub(r"([?&](?:password|passwd|pwd)=)[^&]*", r"\1***", uri, flags=re.IGNORECASE)
    # A database's password may hold slashes.
    uri = re.sub(r"^((?!https?:)[A-Za-z][\w+.-]*://)[^:/@]*:[^@]+@", r"\1", uri)
    return re.sub(r"^([A-Za-z][\w+.-]*://)[^/]*@", r"\1", uri)


def _checked_scheme(uri: str) -> str:
    try:
        parts = urlsplit(uri)
        scheme = parts.scheme.partition("+")[0]  # postgresql+psycopg2
        broken = scheme in SERVER_SCHEMES and not (parts.hostname and (parts.port or True))
    except ValueError:  # a port that is no number
        scheme, broken = "", True
    known = SERVER_SCHEMES | DATABASE_SCHEMES | OTHER_SCHEMES
    if broken or scheme not in known or (scheme == "sqlite" and _sqlite_file(uri) is None):
        raise TrackingError(
            f"tracking.uri {without_password(uri)!r} is malformed: write http://HOST:PORT, "
            "sqlite:////ABSOLUTE/PATH.db, postgresql://USER@HOST/DATABASE, or leave it out"
        )
    return scheme


def _sqlite_file(uri: str) -> Path | None:
    scheme, separator, name = uri.partition(":///")
    if not separator or scheme.partition("+")[0] != "sqlite" or not name.partition("?")[0]:
        return None
    return Path(name.partition("?")[0]).absolute()


def absolute_uri(uri: str) -> str:
    """Of a SQLite database whose path goes by the folder that one is in."""
    if (database := _sqlite_file(uri)) is None:
        return uri
    scheme, _, name = uri.partition(":///")
    return f"{scheme}:///{database}{''.join(name.partition('?')[1:])}"


def _artifacts_folder(database: Path) -> Path:
    return database.parent / "mlartifacts"


def _check_database_file(uri: str) -> bool:
    """Whether there is a database. MLflow itself would try for minutes to open a bad file."""
    database = _sqlite_file(uri)
    assert database is not None
    try:
        if not database.exists():
            folder = next(parent for parent in database.parents if parent.exists())
            with tempfile.TemporaryFile(dir=folder):
                return False
        with database.open("rb+"):
            pass
        with closing(sqlite3.connect(database, timeout=PROBE_TIMEOUT_S)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
    except (OSError, sqlite3.Error) as error:
        raise TrackingError(
            f"{without_password(uri)} cannot be used: {error}: give tracking.uri or runs_dir a "
            "folder that can be written"
        ) from error
    return True


def _check_database_server(uri: str) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": PROBE_TIMEOUT_S})
    try:
        engine.connect().close()
    finally:
        engine.dispose()


@contextmanager
def _quiet_mlflow() -> Iterator[None]:
    """Inside, MLflow reports warnings and errors only."""
    with without_collections():
        import mlflow.store.db.utils  # noqa: F401  importing it sets the levels anew

    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _mlflow_failures() -> tuple[type[Exception], ...]:
    """What MLflow's clients let through: their own errors and those of the layers below."""
    import alembic.util
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    return (
        MlflowException,
        requests.RequestException,
        sqlalchemy.exc.SQLAlchemyError,
        alembic.util.CommandError,
        ImportError,
        OSError,
    )

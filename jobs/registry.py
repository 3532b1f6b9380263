"""`orchestrator registry list | show | compare | promote | rollback`: look at models, move aliases.

In: names as a user writes them. Out: tables on stdout, an exit code. All decisions are the gate's.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from jobs.progress import TIGHT
from orchestrator.config import GateConfig
from orchestrator.errors import ConfigError, RegistryError
from orchestrator.tracking.alias_history import carried_out, read_events
from orchestrator.tracking.gate import CHAMPION, PROMOTION_TAG, RULES_TAG, Gate
from orchestrator.tracking.model_files import find_version
from orchestrator.tracking.promotion import Promotion
from orchestrator.tracking.stores import check_reachable, client, mlflow_calls

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

PREFIX = "models:/"
REFUSED = 1
NO_MODEL = "no model is registered yet: a sweep registers its winner"


def list_models(uri: str) -> int:
    if not check_reachable(uri):
        print(NO_MODEL)
        return 0
    table = _table(
        "model", "versions", "champion", "eval\nloss", "base model", "candidate", "since"
    )
    table.padding = TIGHT
    with mlflow_calls(uri, RegistryError):
        api = client(uri)
        models = api.search_registered_models(max_results=1000)
        for model in sorted(models, key=lambda model: str(model.name)):
            versions = _versions(api, model.name)
            number = model.aliases.get(CHAMPION)
            champion = next((v for v in versions if str(v.version) == str(number)), None)
            tags = champion.tags if champion else {}
            events = carried_out([e for _, e in read_events(model.tags)], _number(number))
            table.add_row(
                model.name,
                str(len(versions)),
                str(number or ""),
                _loss(tags.get("eval_loss")),
                tags.get("base_model", "").rstrip("/").rpartition("/")[2],
                str(model.aliases.get("candidate", "")),
                _when(events[-1].time) if events else "",
            )
    if not models:
        print(NO_MODEL)
        return 0
    Console().print(table)
    return 0


def show_model(uri: str, model: str) -> int:
    """A model's versions and who was champion; or all that one version carries."""
    _check_store(uri)
    if "@" in model or "/" in model.removeprefix(PREFIX):
        return _show_version(find_version(uri, PREFIX + model.removeprefix(PREFIX)))
    with mlflow_calls(uri, RegistryError):
        api = client(uri)
        found = _find_model(api, model.removeprefix(PREFIX))
        versions = _versions(api, found.name)
    console = Console()
    console.print(_version_table(found, versions))
    for version in versions:
        if reason := version.tags.get(PROMOTION_TAG):
            _say(f"version {version.version}: {reason}")
    console.print(_history_table(found))
    return 0


def compare_versions(uri: str, candidate: str, champion: str) -> int:
    """What the gate would say, by the candidate's rules; changes nothing."""
    _check_store(uri)
    ours, theirs = (find_version(uri, _version_uri(name)) for name in (candidate, champion))
    if ours.name != theirs.name:
        raise ConfigError(
            f"compare needs two versions of one model, but got {ours.name} and {theirs.name}: give "
            "models:/NAME/VERSION twice with the same NAME"
        )
    with mlflow_calls(uri, RegistryError):
        gate = Gate(client(uri), uri)
        promotion = gate.judge(ours.name, int(ours.version), int(theirs.version), _rules(ours))
    _say(f"version {ours.version} against version {theirs.version}: {promotion.reason}")
    _print_numbers(promotion)
    return 0


def promote_version(uri: str, model: str, force: bool, reason: str) -> int:
    """Ask the gate, by the rules that the version was registered with; or do without."""
    if force and not reason.strip():
        raise ConfigError("--force needs --reason: it is kept in the history of the aliases")
    _check_store(uri)
    version = find_version(uri, _version_uri(model))
    name, number = version.name, int(version.version)
    with mlflow_calls(uri, RegistryError):
        gate = Gate(client(uri), uri)
        if gate.champion(name) == number:
            _say(f"{PREFIX}{name}/{number} is the champion already")
            return 0
        promotion = (
            gate.force(name, number, reason)
            if force
            else gate.promote(name, number, _rules(version))
        )
    _say(f"{'promoted' if promotion.promote else 'refused'}: {promotion.reason}")
    _print_numbers(promotion)
    if not promotion.promote:
        _say("to promote it all the same: --force --reason '...'")
    return 0 if promotion.promote else REFUSED


def roll_back(uri: str, model: str, reason: str) -> int:
    _check_store(uri)
    with mlflow_calls(uri, RegistryError):
        api = client(uri)
        name = _find_model(api, model.removeprefix(PREFIX)).name
        before, after = Gate(api, uri).roll_back(name, reason or "rolled back by hand")
    _say(f"{PREFIX}{name}@{CHAMPION} is version {after} again, no longer version {before}")
    return 0


def _check_store(uri: str) -> None:
    if not check_reachable(uri):
        raise RegistryError(NO_MODEL)


def _version_uri(model: str) -> str:
    return PREFIX + model.removeprefix(PREFIX)


def _rules(version: "ModelVersion") -> GateConfig:
    """As they were registered with the version; the defaults for one that has none."""
    rules = version.tags.get(RULES_TAG)
    return GateConfig.model_validate_json(rules) if rules else GateConfig()


def _find_model(api: "MlflowClient", name: str) -> "RegisteredModel":
    from mlflow.exceptions import MlflowException

    try:
        return api.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = sorted(str(model.name) for model in api.search_registered_models())
        remedy = f"choose one of {', '.join(known)}" if known else "a sweep registers its winner"
        raise RegistryError(f"there is no registered model {name}: {remedy}") from error


def _versions(api: "MlflowClient", name: str) -> list["ModelVersion"]:
    found = api.search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda version: -int(version.version))


def _version_table(model: "RegisteredModel", versions: Sequence["ModelVersion"]) -> Table:
    scored = any("task_score" in version.tags for version in versions)
    losses = ("eval loss", "base", *(["right"] if scored else []))
    table = _table("version", "aliases", "trial", "bits", "rank", *losses, "MiB")
    table.title = model.name
    for version in versions:
        tags = version.tags
        aliases = [name for name, to in model.aliases.items() if int(to) == int(version.version)]
        size, score = tags.get("adapter_bytes"), tags.get("task_score")
        table.add_row(
            str(version.version),
            ", ".join(sorted(aliases)),
            tags.get("trial", ""),
            tags.get("bit_width", ""),
            tags.get("rank", ""),
            _loss(tags.get("eval_loss")),
            _loss(tags.get("baseline_eval_loss")),
            *([f"{float(score):.1%}" if score else ""] if scored else []),
            f"{int(size) / 2**20:.1f}" if size else "",
        )
    return table


def _history_table(model: "RegisteredModel") -> Table:
    table = _table("when", "what", "from", "to", "why")
    table.title = f"champions of {model.name}, the latest last"
    events = [event for _, event in read_events(model.tags)]
    moved = carried_out(events, _number(model.aliases.get(CHAMPION)))
    for event in events:
        undone = "" if event in moved else " (not carried out)"
        table.add_row(
            _when(event.time),
            event.action + undone,
            str(event.before or ""),
            str(event.after),
            Text(event.reason),
        )
    return table


def _show_version(version: "ModelVersion") -> int:
    table = Table("what", "value", title=f"{PREFIX}{version.name}/{version.version}")
    facts: dict[str, Any] = {
        "aliases": ", ".join(version.aliases),
        "description": version.description,
        "source": version.source,
        "run": version.run_id,
        **dict(sorted(version.tags.items())),
    }
    for name, value in facts.items():
        table.add_row(name, Text(str(value or "")))
    Console().print(table)
    return 0


def _print_numbers(promotion: Promotion) -> None:
    if promotion.comparison is None:
        return
    table = Table("what", "value")
    for name, value in vars(promotion.comparison).items():
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    Console().print(table)


def _table(*columns: str) -> Table:
    table = Table(title_justify="left")
    words = ("model", "aliases", "base model", "what", "why", "when", "since")
    # Only what is long is broken: a date may be, before its time.
    broken, widths = ("base model", "what", "why", "when", "since"), {"since": len("2026-11-28")}
    for name in columns:
        justify: JustifyMethod = "left" if name in words else "right"
        table.add_column(
            name,
            justify=justify,
            overflow="fold",
            no_wrap=name not in broken,
            min_width=widths.get(name),
        )
    return table


def _say(line: str) -> None:
    Console().print(line, markup=False, highlight=False, soft_wrap=True)


def _number(value: Any) -> int | None:
    return int(value) if value is not None else None


def _loss(value: str | None) -> str:
    return f"{float(value):.4f}" if value else ""


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))

"""Where a benchmark's results go.

Each part appends its row to a JSONL file as soon as it is measured, so that a run that is cut off
leaves what it measured. `record` merges such rows into benchmarks/results/NAME.json, which the
documents quote.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.training.libraries import installed_versions

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "ray", "mlflow")

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """A measured value beside the goal that it should reach."""

    value: float
    goal: float
    at_most: bool = False
    """The goal is a limit that the value stays below; the bar's name says so."""

    @property
    def holds(self) -> bool:
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "goal": self.goal, "holds": self.holds}


def environment() -> dict[str, Any]:
    """Of this process's machine, for the rows that are measured on it."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": _gpus() if cuda else f"CPU, {_threads()}",
        "versions": {"python": platform.python_version()} | installed_versions(PACKAGES),
    }


def append_row(path: Path, row: Row) -> None:
    """`row["environment"]` says where it was measured; the command that asked for it is added, if
    it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"command": command()} | row) + "\n")
    shown = {key: row[key] for key in row if key not in ("command", "environment")}
    print(json.dumps(shown), flush=True)


def read_rows(paths: Iterable[Path]) -> list[Row]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def light_environment() -> Row:
    """As `environment`, of what computes on one core and needs no library."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": "CPU, 1 thread",
        "versions": {"python": platform.python_version()},
    }


def parser_of_actions(description: str | None) -> tuple[argparse.ArgumentParser, Any]:
    """And its actions, one of which must be given."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return parser, parser.add_subparsers(dest="action", required=True)


def add_record_action(actions: Any, name: str) -> None:
    """To a parser's actions: `record --rows FILE... [--name NAME]`."""
    merge = actions.add_parser("record")
    merge.add_argument("--rows", type=Path, nargs="+", required=True)
    merge.add_argument("--name", default=name)


def record(
    name: str,
    rows: Sequence[Row],
    bars: dict[str, Bar],
    folder: Path = RESULTS,
    summary: Row | None = None,
) -> Path:
    """Write rows as `read_rows` gives them; what is the same for many of them is said once. In
    `summary` is what has no bar."""
    content = {
        "command": " && ".join(dict.fromkeys(row["command"] for row in rows)),
        **_common_environment(row["environment"] for row in rows),
        "rows": [
            {key: row[key] for key in row if key not in ("command", "environment")} for row in rows
        ],
        "bars": {name: bar.to_json() for name, bar in bars.items()},
        **({"summary": summary} if summary else {}),
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def command() -> str:
    """As it was called, with folders by their names: paths say nothing on another machine."""
    arguments = [word.rpartition("/")[2] if "/" in word else word for word in sys.argv[1:]]
    return " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *arguments])


def _gpus() -> str:
    import torch

    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def _threads() -> str:
    import torch

    return f"{torch.get_num_threads()} thread(s)"


def _common_environment(environments: Iterable[Row]) -> Row:
    """Of calls on like machines on one day; one may have had packages that another lacked."""
    found = list(environments)
    versions: dict[str, str] = {}
    for environment in found:
        versions |= environment["versions"]
    common = found[0] | {"versions": versions}
    for environment in found:
        if environment | {"versions": versions | environment["versions"]} != common:
            raise SystemExit("rows of several machines, dates or versions: record each apart")
    return common

"""Write a benchmark's results where the documents quote them from: benchmarks/results/NAME.json."""

import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Bar:
    """A measured value beside the goal that it should reach."""

    value: float
    goal: float

    @property
    def holds(self) -> bool:
        return self.value >= self.goal


def record(name: str, rows: list[dict[str, Any]], bars: dict[str, Bar]) -> Path:
    content = {
        "command": " ".join(_command()),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in PACKAGES},
        "rows": rows,
        "bars": {bar: asdict(value) | {"holds": value.holds} for bar, value in bars.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def _command() -> list[str]:
    """As it was called, with folders by their names: paths say nothing on another machine."""
    arguments = [word.rpartition("/")[2] if "/" in word else word for word in sys.argv[1:]]
    return ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *arguments]


def _hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads()} CPU thread(s)"

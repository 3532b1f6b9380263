"""What a worker imports before it waits for the other loads on its machine."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.training.conftest import MakeSpec

# In a process of its own: in this one everything is imported already.
PROGRAM = """
import json, sys
from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.records import BaseModel
from orchestrator.training.base_model import load_base_model
from orchestrator.training.libraries import import_libraries

base, quant = json.loads(sys.argv[1])
import_libraries()
before = set(sys.modules)
quant = QuantConfig.model_validate(quant)
load_base_model(BaseModel(**base), quant, "cpu", StrategyConfig())
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.mark.parametrize("bit_width", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_a_base_is_loaded_without_importing_a_library(make_spec: MakeSpec, bit_width: int) -> None:
    spec = make_spec(bit_width)
    argument = json.dumps([spec.base_model.__dict__, spec.quant])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument], capture_output=True, text=True, check=True
    )
    imported = json.loads(done.stdout.splitlines()[-1])
    assert set(_libraries(imported)) <= {"orchestrator", "transformers"}
    assert len(imported) < 50


def _libraries(modules: list[str]) -> Iterator[str]:
    for name in modules:
        library = name.split(".")[0]
        if library not in sys.stdlib_module_names:
            yield library

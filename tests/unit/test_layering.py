"""The direction of imports, what the light half may load, and the size of files and functions."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("orchestrator", "cluster", "jobs")
MAY_IMPORT = {
    "orchestrator": {"orchestrator"},
    "cluster": {"orchestrator", "cluster"},
    "jobs": set(PACKAGES),
}
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "deepspeed", "ray", "mlflow", "datasets"}
CLUSTER_ONLY = {"ray", "kubernetes"}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_BROAD_EXCEPTS = 2


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path, top_level_only: bool) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    for path in sources(package):
        ours = {name.split(".")[0] for name in imported(path, False)} & set(PACKAGES)
        assert ours <= MAY_IMPORT[package], f"{path} imports {ours - MAY_IMPORT[package]}"


def test_the_library_knows_neither_ray_nor_kubernetes() -> None:
    for path in sources("orchestrator"):
        found = {name.split(".")[0] for name in imported(path, False)} & CLUSTER_ONLY
        assert not found, f"{path} imports {found}"


def test_only_training_imports_torch_at_module_level() -> None:
    for path in sources("orchestrator"):
        # adapter_model.py is run by MLflow itself, also where this project is not installed.
        if path.parent.name == "training" or path.name == "adapter_model.py":
            continue
        found = {name.split(".")[0] for name in imported(path, True)} & HEAVY
        assert not found, f"{path} imports {found} at module level"


def heavy_modules_after(*arguments: str) -> set[str]:
    program = (
        "import sys; from jobs.cli import run; run(sys.argv[1:]);"
        f"print('loaded', *({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_help_loads_nothing_heavy() -> None:
    assert heavy_modules_after("--help") == set()


def test_a_dry_run_loads_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "base" / name).write_text("{}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    config = tmp_path / "sweep.yaml"
    config.write_text(
        f"name: t\nbase_model: {{source: {tmp_path}/base}}\ndata: {{train: {rows}}}\n"
        "search: {space: {adapter.rank: [4, 8]}}\n"
    )
    assert heavy_modules_after("sweep", str(config), "--dry-run") == set()


def test_files_and_functions_stay_readable() -> None:
    for path in [path for package in PACKAGES for path in sources(package)]:
        text = path.read_text()
        assert len(text.splitlines()) <= MAX_FILE_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= MAX_FUNCTION_LINES, f"{path}: {node.name} has {length} lines"


def test_broad_excepts_stay_at_the_two_edges() -> None:
    broad = [
        f"{path}:{node.lineno}"
        for package in PACKAGES
        for path in sources(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException"))
    ]
    assert len(broad) <= MAX_BROAD_EXCEPTS, broad

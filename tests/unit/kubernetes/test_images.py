"""The Dockerfile's own rules; building it needs a registry and is not part of the tests."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
TARGETS = ("cpu", "cuda", "mlflow")
PINNED = re.compile(r"[\w./-]+:\d[\w.-]*@sha256:[0-9a-f]{64}")
COMPILERS = re.compile(r"(?<!\S)(g\+\+|gcc|clang|build-essential|cmake|git)(?!\S)")

Stages = dict[str, tuple[str, list[str]]]
"""Name -> the stage or image that it is made from, and its instructions."""


def stages(text: str) -> Stages:
    lines = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    arguments: dict[str, str] = {}
    found: Stages = {}
    for line in filter(None, map(str.strip, lines)):
        if line.startswith("ARG") and not found and "=" in line:
            name, _, value = line.removeprefix("ARG ").partition("=")
            arguments[name] = value
        elif line.startswith("FROM"):
            source, name = re.fullmatch(r"FROM (\S+) AS (\S+)", line).groups()  # type: ignore[union-attr]
            source = re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], source)
            found[name] = (source, [])
        else:
            found[name][1].append(line)
    return found


def instructions(built: Stages, name: str) -> list[str]:
    """From the base image on."""
    source, own = built[name]
    return (instructions(built, source) if source in built else []) + own


@pytest.fixture(scope="module")
def built() -> Stages:
    return stages((ROOT / "Dockerfile").read_text())


def test_every_base_image_has_a_version_and_a_digest(built: Stages) -> None:
    foreign = {source for source, _ in built.values() if source not in built}
    assert foreign
    assert all(PINNED.fullmatch(source) for source in foreign), foreign
    assert not PINNED.fullmatch("python:latest")
    assert not PINNED.fullmatch("python:3.11-slim")


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_does_not_end_as_root(built: Stages, target: str) -> None:
    users = [line for line in instructions(built, target) if line.startswith("USER")]
    assert users[-1] == "USER 1000:100"


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_checks_itself_last(built: Stages, target: str) -> None:
    runs = [line for line in instructions(built, target) if line.startswith("RUN")]
    assert "import " in runs[-1]


@pytest.mark.parametrize(
    ("target", "compiles"), [("cpu", False), ("mlflow", False), ("cuda", True)]
)
def test_only_the_image_whose_libraries_compile_at_run_time_has_a_compiler(
    built: Stages, target: str, compiles: bool
) -> None:
    runs = [line for line in instructions(built, target) if line.startswith("RUN")]
    assert any(COMPILERS.search(line) for line in runs) == compiles
    assert not any("pip install" in line for line in runs)


@pytest.mark.parametrize("name", ["builder", "mlflow-builder", "dependencies", "project"])
def test_every_package_is_installed_with_its_version(built: Stages, name: str) -> None:
    for line in built[name][1]:
        if "pip install" in line:
            assert "-c constraints.txt" in line or "--no-deps" in line, line
    assert "apt-get upgrade" not in " ".join(built[name][1])


def test_what_is_copied_is_there_and_is_not_ignored(built: Stages) -> None:
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        source
        for _, own in built.values()
        for line in own
        if line.startswith("COPY") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_the_image_carries_the_python_that_the_versions_are_frozen_for(built: Stages) -> None:
    assert ":3.11." in built["base"][0]


def test_ray_of_the_manifests_is_the_ray_of_the_image() -> None:
    constraints = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and "#" not in line
    )
    template = yaml.safe_load((ROOT / "k8s" / "base" / "rayjob.yaml").read_text())
    assert template["spec"]["rayClusterSpec"]["rayVersion"] == constraints["ray"]

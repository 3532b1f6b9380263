import re
from pathlib import Path

import pytest

from jobs.cli import app
from jobs.reference import render_reference
from orchestrator.loading import load_config

ROOT = Path(__file__).parents[2]


def test_the_reference_is_the_schema() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    assert text == render_reference(), "run `orchestrator schema --markdown > docs/reference.md`"


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "configs").glob("*.yaml")))
def test_every_shipped_config_is_valid_and_begins_with_its_command(path: Path) -> None:
    load_config(path)
    assert path.read_text().startswith(f"# orchestrator sweep jobs/configs/{path.name}\n")


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_guide_names_every_command() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"orchestrator {command.callback.__name__}" in guide

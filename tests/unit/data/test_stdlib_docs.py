from pathlib import Path

import pytest

from orchestrator.data.sources import estimate_slices, source_files
from orchestrator.data.stdlib_docs import MAX_ANSWER_CHARS, stdlib_doc_rows
from orchestrator.data_config import SourceConfig
from tests.unit.data.reading import rows_of


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return stdlib_doc_rows()


def test_there_are_thousands_of_pairs_and_none_is_empty(rows: list[dict[str, str]]) -> None:
    assert len(rows) > 2000
    assert all(row["prompt"] and 30 <= len(row["completion"]) <= MAX_ANSWER_CHARS for row in rows)
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_a_well_known_function_is_asked_about_with_its_arguments(
    rows: list[dict[str, str]],
) -> None:
    answers = {row["prompt"]: row["completion"] for row in rows}
    question = "What does the Python function `textwrap.dedent(text)` do?"
    assert answers[question].startswith("Remove any common leading whitespace from every line")
    assert "What does the Python method `json.encoder.JSONEncoder.default(o)` do?" in answers
    assert not any(" `test." in question or "._" in question.split("(")[0] for question in answers)


def test_the_builtin_dataset_is_made_once_and_always_the_same(
    rows: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    source = SourceConfig(path="stdlib-docs")
    assert estimate_slices(source, 1 << 20) is None
    (file,) = source_files(source)
    assert rows_of(file, 100_000) == rows
    written = Path(file).stat().st_mtime_ns
    assert source_files(source) == [file]
    assert [part.file for part in estimate_slices(source, 1 << 30) or []] == [file]
    assert Path(file).stat().st_mtime_ns == written

import json
import os
from pathlib import Path

import pytest

from orchestrator.digests import known_file_digest
from orchestrator.files import file_digest

OLD_FILE = Path(os.__file__)  # of Python's own library


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "digests"


def change_record(records: Path, **changes: object) -> None:
    (path,) = records.iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_old_file_is_read_for_its_digest_once(records: Path) -> None:
    assert known_file_digest(OLD_FILE) == file_digest(OLD_FILE)
    change_record(records, digest="remembered")
    assert known_file_digest(OLD_FILE) == "remembered"


@pytest.mark.parametrize("changed", range(4))
def test_a_file_whose_size_inode_or_time_differs_is_read_again(records: Path, changed: int) -> None:
    known_file_digest(OLD_FILE)
    (path,) = records.iterdir()
    stamp = json.loads(path.read_text())["stamp"]
    stamp[changed] += 1
    change_record(records, digest="of another file", stamp=stamp)
    assert known_file_digest(OLD_FILE) == file_digest(OLD_FILE)


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path, records: Path) -> None:
    """Its next change may show the same size and times."""
    path = tmp_path / "file"
    path.write_text("one")
    first = known_file_digest(path)
    times = path.stat()
    path.write_text("two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert known_file_digest(path) == file_digest(path) != first
    assert not records.exists()


def test_a_file_with_an_old_time_that_was_written_just_now_is_not_remembered(
    tmp_path: Path, records: Path
) -> None:
    path = tmp_path / "copy"
    path.write_text("copied with its times")
    os.utime(path, (0, 0))
    known_file_digest(path)
    assert not records.exists()


def test_a_record_cut_off_by_a_crash_is_written_anew(records: Path) -> None:
    known_file_digest(OLD_FILE)
    (path,) = records.iterdir()
    path.write_text(path.read_text()[:20])
    assert known_file_digest(OLD_FILE) == file_digest(OLD_FILE)
    assert json.loads(path.read_text())["digest"] == file_digest(OLD_FILE)


def test_a_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    assert known_file_digest(OLD_FILE) == file_digest(OLD_FILE)

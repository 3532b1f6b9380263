import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.data.parquet_files import MAX_ROW_GROUP_BYTES
from orchestrator.data.slices import ReadOptions
from orchestrator.data.sources import PlanTask, plan_file, read_slice
from orchestrator.data.spool import KEPT_S, spooled
from orchestrator.data.streams import fingerprint
from orchestrator.errors import DataError


@pytest.fixture(autouse=True)
def spool(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(folder))
    return folder / "spool"


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "rows.jsonl.gz").write_text("content")
    return str(tmp_path / "rows.jsonl.gz")


def test_those_who_ask_at_once_get_one_copy(file: str) -> None:
    made = []

    def rewrite(original: str, copy: Path) -> None:
        made.append(original)
        copy.write_text("plain")

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(spooled, file, fingerprint(file), rewrite) for _ in range(8)]
    (path,) = {future.result() for future in asked}
    assert made == [file]
    assert Path(path).read_text() == "plain"


@pytest.mark.parametrize("chosen", ["", "zip://rows.jsonl::"])
def test_a_file_replaced_by_one_of_equal_size_and_time_is_copied_again(
    file: str, chosen: str
) -> None:
    def rewrite(original: str, copy: Path) -> None:
        copy.write_text(Path(original.removeprefix(chosen)).read_text())

    found, before = Path(file).stat(), fingerprint(file)
    old = spooled(chosen + file, fingerprint(chosen + file), rewrite)
    other = Path(file).with_name("other")
    other.write_text("CONTENT")
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.replace(file)
    assert fingerprint(file) == before
    new = spooled(chosen + file, fingerprint(chosen + file), rewrite)
    assert [Path(path).read_text() for path in (old, new)] == ["content", "CONTENT"]


def test_a_copy_of_a_file_that_changes_meanwhile_is_not_kept(file: str, spool: Path) -> None:
    def rewrite(original: str, copy: Path) -> None:
        copy.write_text("plain")
        Path(original).write_text("other content")

    with pytest.raises(DataError, match="the file changed while it was being prepared"):
        spooled(file, fingerprint(file), rewrite)
    assert [path.suffix for path in spool.iterdir()] == [".lock"]


def test_a_full_disk_stays_a_full_disk_and_leaves_nothing(file: str, spool: Path) -> None:
    def rewrite(original: str, copy: Path) -> None:
        copy.write_text("half of")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as caught:
        spooled(file, fingerprint(file), rewrite)
    assert caught.value.errno == errno.ENOSPC
    assert [path.suffix for path in spool.iterdir()] == [".lock"]


def test_copies_that_nobody_uses_are_deleted(file: str, spool: Path) -> None:
    def rewrite(original: str, copy: Path) -> None:
        copy.write_text("plain")

    old = Path(spooled(file, fingerprint(file), rewrite))
    used = Path(file).stat().st_mtime - KEPT_S - 60
    os.utime(old, (used, used))
    Path(file).write_text("other content")
    new = Path(spooled(file, fingerprint(file), rewrite))
    assert new.exists()
    assert not old.exists()


def test_parquet_of_one_large_row_group_is_read_from_smaller_ones(
    tmp_path: Path, spool: Path
) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [f"{number:01024d}" for number in range((MAX_ROW_GROUP_BYTES >> 10) + 1)]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, use_dictionary=False)
    parts = plan_file(PlanTask(str(path), 8 << 20))
    assert len(list(spool.glob("*.parquet"))) == 1
    assert [parts[0].start, parts[-1].end] == [0, len(texts)]
    for part in (parts[0], parts[-1]):
        numbered = next(iter(read_slice(part, ReadOptions())))
        assert numbered == (1, {"text": texts[part.start]})

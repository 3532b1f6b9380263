"""What every place of shards must do: a folder, and an fsspec URL."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.data.store import ShardStore, open_store
from orchestrator.errors import DataError
from orchestrator.files import file_digest

KINDS = ("folder", "file URL", "memory URL")


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    import fsspec

    if request.param == "memory URL":
        yield "memory://shards/one"
        fsspec.filesystem("memory").store.clear()
    else:
        yield str(tmp_path / "a") if request.param == "folder" else f"file://{tmp_path}/b"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))


def _write(store: ShardStore, name: str, content: bytes) -> Path:
    return store.write(name, lambda path: _put(path, content))


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def test_what_one_process_writes_another_finds(place: str) -> None:
    path = _write(open_store(place), "a.safetensors", b"abc")
    open_store(place).write_record("a.json", {"n": 1})
    other = open_store(place)
    assert other.holds("a.safetensors", 3, file_digest(path))
    assert not other.holds("a.safetensors", 4, file_digest(path))
    assert not other.holds("b.safetensors", 3, file_digest(path))
    assert other.read_record("a.json") == {"n": 1}
    assert other.read_record("b.json") is None


def test_fetched_files_are_on_this_machine_whole(place: str) -> None:
    store = open_store(place)
    path = _write(store, "a.safetensors", b"abc")
    digest = file_digest(path)
    if store.folder != Path(place):
        path.write_bytes(b"cut")  # a copy that was damaged here
    other = open_store(place)
    other.fetch([("a.safetensors", digest)])
    assert (other.folder / "a.safetensors").read_bytes() == b"abc"


def test_a_writer_that_fails_leaves_nothing(place: str) -> None:
    store = open_store(place)

    def fill(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        store.write("a.safetensors", fill)
    assert not store.holds("a.safetensors", 4, "")
    assert not [path for path in store.folder.rglob("*") if path.is_file()]


def test_a_record_cut_off_by_a_crash_counts_as_none(place: str) -> None:
    import fsspec

    open_store(place).write_record("a.json", {"n": 1})
    with fsspec.open(f"{place}/a.json", "wb") as file:
        file.write(b'{"n"')
    assert open_store(place).read_record("a.json") is None


def test_a_damaged_remote_shard_is_refused(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/b")
    _write(store, "a.safetensors", b"abc")
    with pytest.raises(DataError, match="must have the digest .* run again"):
        store.fetch([("a.safetensors", "0" * 64)])
    with pytest.raises(DataError, match="a shard is missing"):
        store.fetch([("b.safetensors", "0" * 64)])


def test_an_unknown_protocol_is_one_clear_error() -> None:
    with pytest.raises(DataError, match="nowhere://x: the shards' place cannot be used"):
        open_store("nowhere://x")

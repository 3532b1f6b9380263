import gzip
import json
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.slices import ReadOptions
from orchestrator.data.sources import (
    SMALL_BYTES,
    PlanTask,
    content_digest,
    estimate_slices,
    is_small,
    must_be_read,
    place,
    plan_file,
    read_slice,
    source_files,
)
from orchestrator.data_config import DataConfig, SourceConfig
from orchestrator.errors import DataError
from tests.unit.data.reading import rows_of

ROWS: list[dict[str, Any]] = [{"prompt": f"question {n}", "completion": "é"} for n in range(10)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(folder))
    return folder


def _files(path: Path | str, **chosen: str) -> list[str]:
    return source_files(SourceConfig(path=str(path), **chosen))


def _write(folder: Path, *names: str) -> list[str]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(JSONL)
    return [str(folder / name) for name in names]


def test_folder_gives_its_known_files_sorted(tmp_path: Path) -> None:
    _write(tmp_path, "b.JSONL", "a/c.json", "README.md", ".cache/x.jsonl", "a/.x.jsonl")
    assert _files(tmp_path) == [str(tmp_path / "a/c.json"), str(tmp_path / "b.JSONL")]


def test_glob_gives_what_it_matches(tmp_path: Path) -> None:
    _write(tmp_path, "b.jsonl", "a.jsonl", "a.md", "c/d.jsonl", ".e/f.jsonl")
    assert _files(tmp_path / "*") == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert _files(tmp_path / "[bc]*.jsonl") == [str(tmp_path / "b.jsonl")]
    assert _files(tmp_path / "**/*.jsonl") == [
        str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c/d.jsonl")
    ]
    assert _files(tmp_path / ".e/*.jsonl") == [str(tmp_path / ".e/f.jsonl")]
    with pytest.raises(DataError, match=r"\*\.csv: it must match at least one file of a known"):
        _files(tmp_path / "*.csv")


def test_a_file_may_have_the_signs_of_a_glob_in_its_name(tmp_path: Path) -> None:
    written = _write(tmp_path, "a[1].jsonl")
    assert _files(tmp_path / "a[1].jsonl") == written
    assert _files(f"file://{tmp_path}/a[1].jsonl") == written


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    _write(tmp_path, "far/deep/a.jsonl", "set/b.jsonl")
    (tmp_path / "set/linked").symlink_to(tmp_path / "far")
    (tmp_path / "far/loop").symlink_to(tmp_path / "set")
    (tmp_path / "whole").symlink_to(tmp_path / "set")
    both = ["b.jsonl", "linked/deep/a.jsonl"]
    for folder in (tmp_path / "set", tmp_path / "whole"):
        assert _files(folder) == _files(folder / "**/*.jsonl") == [str(folder / x) for x in both]
    assert _files(tmp_path / "set/*/*/*.jsonl") == [str(tmp_path / "set" / both[1])]
    assert _files(tmp_path / "set/*.jsonl") == [str(tmp_path / "set/b.jsonl")]


@pytest.mark.parametrize("field", ["split", "name", "revision"])
def test_what_chooses_from_a_hub_dataset_is_refused_elsewhere(tmp_path: Path, field: str) -> None:
    (file,) = _write(tmp_path, "a.jsonl")
    for path in (tmp_path, file, tmp_path / "*.jsonl", f"file://{file}", "stdlib-docs"):
        with pytest.raises(DataError, match=f"{field} chooses from a hub dataset, .* is 'test': l"):
            _files(path, **{field: "test"})


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = _write(tmp_path, "a.jsonl")
    assert _files("a.jsonl") == _files("*.jsonl") == written


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it must hold at least one file of a known type"):
        _files(tmp_path)


def test_missing_file_suggests_a_near_name(tmp_path: Path) -> None:
    _write(tmp_path, "train.jsonl")
    with pytest.raises(DataError) as caught:
        _files(tmp_path / "trian.jsonl")
    assert "trian.jsonl: file not found; did you mean '" in str(caught.value)
    assert str(tmp_path / "train.jsonl") in str(caught.value)


@pytest.mark.parametrize("source", ["./data", "~/nothing-here", "data/sets/mine", "rows.csv"])
def test_what_looks_like_a_path_is_no_hub_id(source: str) -> None:
    with pytest.raises(DataError, match="file not found"):
        _files(source)


def test_urls_of_files_folders_and_globs_are_read() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/rows-test/b.jsonl", JSONL.encode())
    memory.pipe("/rows-test/a.jsonl.gz", gzip.compress(JSONL.encode()))
    memory.pipe("/rows-test/.x/c.jsonl", JSONL.encode())
    both = ["memory:///rows-test/a.jsonl.gz", "memory:///rows-test/b.jsonl"]
    assert _files("memory://rows-test") == both
    assert _files("memory://rows-test/*.jsonl") == both[1:]
    assert _files("simplecache::memory://rows-test/b.jsonl")
    for source in ("memory://rows-test/b.jsonl", *both, f"simplecache::{both[1]}"):
        assert rows_of(source, 40) == ROWS
    before, (part,) = content_digest(both[1]), plan_file(PlanTask(both[1], 1 << 20))
    memory.pipe("/rows-test/b.jsonl", JSONL.encode() * 2)
    assert content_digest(both[1]) != before
    with pytest.raises(DataError, match="the file changed"):
        next(read_slice(part, ReadOptions()))


def test_lines_are_not_counted_over_gigabytes_of_a_store() -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/far-test/a.jsonl", JSONL.encode())
    (near,) = plan_file(PlanTask("memory://far-test/a.jsonl", 1 << 20))
    assert place(near, 3) == "memory://far-test/a.jsonl:3"
    far = replace(near, start=1 << 30, end=(1 << 30) + 9)
    assert place(far, 3) == "memory://far-test/a.jsonl: line 3 after byte 1073741824"


def test_tables_of_a_store_are_read(tmp_path: Path) -> None:
    import fsspec
    import pyarrow.feather
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    pyarrow.feather.write_feather(table, tmp_path / "a.feather")
    fsspec.filesystem("memory").put(str(tmp_path), "/tables-test", recursive=True)
    for file in _files("memory://tables-test"):
        assert rows_of(file, 20) == ROWS


def test_members_of_an_archive_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "rows.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b.jsonl", JSONL)
        archive.writestr("c.jsonl", JSONL)
    found = _files(f"zip://**/*.jsonl::{tmp_path}/rows.zip")
    assert found == [f"zip://{name}::{tmp_path}/rows.zip" for name in ("a/b.jsonl", "c.jsonl")]
    assert rows_of(found[0], 50) == ROWS
    digests = list(map(content_digest, found))
    assert len(set(digests)) == 2
    os.utime(tmp_path / "rows.zip", (1, 1))
    assert list(map(content_digest, found)) == digests


def test_a_files_digest_covers_its_type_and_bytes_but_not_its_place(tmp_path: Path) -> None:
    names = ["a.jsonl", "b/a.jsonl", "a.txt", "a.json"]
    jsonl, moved, *others = map(content_digest, _write(tmp_path, *names))
    assert moved == jsonl
    assert len({jsonl, *others}) == 3
    (tmp_path / "a.jsonl").write_text(JSONL.replace("question", "QUESTION"))
    assert content_digest(str(tmp_path / "a.jsonl")) != jsonl


def test_an_unchanged_file_is_hashed_once(cache: Path) -> None:
    file = json.__file__  # what changed just now is not remembered
    digest = content_digest(file)
    (kept,) = cache.glob("digests/*.json")
    kept.write_text(kept.read_text().replace(digest.partition(":")[2], "remembered"))
    assert content_digest(file) == ".py:remembered"


class _Quiet(SimpleHTTPRequestHandler):
    """Sends whole files only, as Python's server does."""

    def log_message(self, format: str, *values: Any) -> None:
        pass


class _WithRanges(_Quiet):
    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        asked = self.headers.get("Range")
        start, end = asked.removeprefix("bytes=").split("-") if asked else (0, len(content) - 1)
        part = content[int(start) : int(end) + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[type[_Quiet]], str]]:
    servers = []

    def start(handler: type[_Quiet]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("handler", "num_copies"), [(_Quiet, 1), (_WithRanges, 0)])
def test_a_web_servers_file_is_copied_only_if_it_must(
    tmp_path: Path, cache: Path, serve: Callable[[Any], str], handler: Any, num_copies: int
) -> None:
    _write(tmp_path, "rows.jsonl")
    url = f"{serve(handler)}/rows.jsonl?download=true"
    assert _files(url) == [url]
    parts = plan_file(PlanTask(url, 100))
    assert [row for part in parts for _, row in read_slice(part, ReadOptions())] == ROWS
    assert len(list(cache.glob("spool/*.jsonl"))) == num_copies
    os.utime(tmp_path / "rows.jsonl", (1, 1))
    with pytest.raises(DataError, match="the file changed"):
        next(read_slice(parts[0], ReadOptions()))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://no-such-folder/rows.jsonl", "file not found"),
        ("memory://no-such-folder/*.jsonl", "it must match at least one file of a known type"),
        ("nonsense://bucket/rows.jsonl", "cannot be listed"),
        ("http://127.0.0.1:9/rows.jsonl", "file not found (Cannot connect to host 127.0.0.1:9"),
    ],
)
def test_bad_url_is_refused(url: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        _files(url)
    assert message in str(caught.value)


def test_an_unreachable_store_is_an_error_with_a_remedy() -> None:
    with pytest.raises(DataError, match="cannot be read .* that the store can be reached with"):
        plan_file(PlanTask("http://127.0.0.1:9/rows.jsonl", 100))


def test_saved_datasets_are_read_by_split(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    train, test = Dataset.from_list(ROWS), Dataset.from_list(ROWS[:2])
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both", num_shards={"train": 2})
    test.save_to_disk(tmp_path / "one")
    assert [Path(file).name for file in _files(tmp_path / "both")] == [
        f"data-0000{number}-of-00002.arrow" for number in range(2)
    ]
    assert [row for file in _files(tmp_path / "both") for row in rows_of(file, 100)] == ROWS
    assert rows_of(_files(tmp_path / "both", split="test")[0]) == ROWS[:2]
    assert rows_of(_files(tmp_path / "one")[0]) == ROWS[:2]
    with pytest.raises(DataError, match="has no split 'dev', only 'train', 'test': set split"):
        _files(tmp_path / "both", split="dev")


def test_hub_dataset_without_network_is_an_error_with_a_remedy() -> None:
    with pytest.raises(DataError) as caught:
        _files("stdlib_docs")
    assert "did you mean 'stdlib-docs'?" in str(caught.value)
    assert "or give a local file" in str(caught.value)


def test_hub_dataset_is_kept_by_name_split_and_revision(cache: Path) -> None:
    names = {
        "hub-someone--rows+split=train.parquet": {},
        "hub-someone--rows+name=a%2Fb+split=test+revision=v1.parquet": {
            "name": "a/b",
            "split": "test",
            "revision": "v1",
        },
    }
    for name, chosen in names.items():
        _write(cache / "datasets", name)
        assert _files("someone/rows", **chosen) == [str(cache / "datasets" / name)]
    with pytest.raises(DataError, match="cannot be loaded"):
        _files("someone/rows", revision="v2")


def test_estimate_does_no_work_beyond_cheap_local_files(tmp_path: Path, cache: Path) -> None:
    def estimate(path: object) -> Any:
        return estimate_slices(SourceConfig(path=str(path)), 100)

    (file,) = _write(tmp_path, "rows.jsonl")
    assert estimate(file) == plan_file(PlanTask(file, 100))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(JSONL.encode()))
    assert estimate(tmp_path / "rows.jsonl.gz") is None
    assert estimate(tmp_path) is None
    assert estimate("memory://rows-test/b.jsonl") is None
    assert estimate("someone/some-dataset") is None
    with pytest.raises(DataError, match="file not found"):
        estimate(tmp_path / "other.jsonl")
    (tmp_path / "some").mkdir()
    (tmp_path / "some/empty.jsonl").touch()
    with pytest.raises(DataError, match="some: a dataset must hold at least one row, but has none"):
        estimate(tmp_path / "some")
    _write(tmp_path, "some/rows.jsonl")
    assert [part.file for part in estimate(tmp_path / "some")] == (
        [str(tmp_path / "some/rows.jsonl")] * len(estimate(file))
    )
    assert not list(cache.iterdir())


def test_small_is_little_text_of_a_size_that_is_cheap_to_tell(tmp_path: Path) -> None:
    def small(**sources: object) -> bool:
        return is_small(DataConfig.model_validate(sources))

    (little,) = _write(tmp_path, "little.jsonl")
    much = tmp_path / "much.jsonl"
    much.write_text(JSONL * (SMALL_BYTES // len(JSONL.encode()) + 1))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(JSONL.encode()))
    assert small(train=little)
    assert small(train=little, held_out=little)
    assert not small(train=str(much))
    assert not small(train=little, held_out=str(much))
    assert not small(train={"path": little, "weight": SMALL_BYTES / len(JSONL.encode()) + 1})
    assert not small(train=str(tmp_path / "rows.jsonl.gz"))
    assert not small(train="someone/some-dataset")


def test_files_that_must_be_read_to_be_cut_are_known(tmp_path: Path) -> None:
    cheap, *others = _write(tmp_path, "a.jsonl", "a.csv", "a.jsonl.gz")
    assert not must_be_read(cheap)
    assert all(map(must_be_read, [*others, "memory://a.jsonl"]))

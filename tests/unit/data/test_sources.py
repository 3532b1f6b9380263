import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.sources import (
    content_digest,
    estimate_slices,
    plan_slices,
    read_slice,
    source_files,
)
from orchestrator.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": f'question {i},\n"é"', "completion": str(i)} for i in range(10)
]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
# Without a time in its header: xdist needs the same test names in every process.
CUT_GZIP = gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9]


def _read_all(source: str | Path) -> list[tuple[int, dict[str, Any]]]:
    return [numbered for part in plan_slices(str(source), 1) for numbered in read_slice(part)]


def _write_csv(path: Path) -> None:
    import csv

    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "completion"])
        table.writeheader()
        table.writerows(ROWS)


def _write_gzipped_csv(path: Path) -> None:
    _write_csv(path.with_suffix(""))
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))


def _write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=4)


def _write_zstandard(path: Path) -> None:
    import zstandard

    lines = JSONL.encode().splitlines(keepends=True)
    frames = [zstandard.compress(b"".join(part)) for part in (lines[:4], lines[4:])]
    path.write_bytes(b"".join(frames))


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_text(JSONL),
    "windows.jsonl": lambda path: path.write_bytes(
        b"\xef\xbb\xbf" + JSONL.replace("\n", "\r\n").encode()
    ),
    "list.json": lambda path: path.write_text("\n" + json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_text(JSONL),
    "rows.csv": _write_csv,
    "rows.csv.gz": _write_gzipped_csv,
    "rows.parquet": _write_parquet,
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(JSONL.encode())),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.jsonl.zst": _write_zstandard,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("rows_per_slice", [1, 3, 5, 100])
def test_slices_of_every_file_type_give_all_rows_in_order(
    tmp_path: Path, name: str, rows_per_slice: int
) -> None:
    WRITERS[name](tmp_path / name)
    parts = plan_slices(str(tmp_path / name), rows_per_slice)
    assert [part.num_rows for part in parts[:-1]] == [rows_per_slice] * (len(parts) - 1)
    assert [row for part in parts for _, row in read_slice(part)] == ROWS


@given(blank_before=st.lists(st.integers(0, 3), min_size=1, max_size=20), size=st.integers(1, 6))
def test_jsonl_line_numbers_count_blank_lines(
    tmp_path_factory: pytest.TempPathFactory, blank_before: list[int], size: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines: list[str] = []
    for blanks in blank_before:
        lines += [" \n"] * blanks
        lines.append(json.dumps({"line": len(lines) + 1}) + "\n")
    path.write_text("".join(lines))
    parts = plan_slices(str(path), size)
    numbered = [item for part in parts for item in read_slice(part)]
    assert len(numbered) == len(blank_before)
    assert all(row == {"line": number} for number, row in numbered)


def test_csv_rows_are_numbered_by_their_first_line(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('a,b\n1,"two\nlines"\n\n3,4\n')
    (part,) = plan_slices(str(tmp_path / "rows.csv"), 10)
    assert list(read_slice(part)) == [
        (2, {"a": "1", "b": "two\nlines"}),
        (5, {"a": "3", "b": "4"}),
    ]


def test_folder_gives_its_known_files_sorted(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/c.jsonl", "README.md", ".cache/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(JSONL)
    expected = [str(tmp_path / "a/c.jsonl"), str(tmp_path / "b.jsonl")]
    assert source_files(str(tmp_path)) == expected
    assert [part.file for part in plan_slices(str(tmp_path), 100)] == expected


def test_urls_of_files_folders_and_globs_are_read(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/rows-test/b.jsonl", JSONL.encode())
    memory.pipe("/rows-test/a.jsonl.gz", gzip.compress(JSONL.encode()))
    both = ["memory:///rows-test/a.jsonl.gz", "memory:///rows-test/b.jsonl"]
    assert source_files("memory://rows-test") == both
    assert source_files("memory://rows-test/*.jsonl") == both[1:]
    for source in ("memory://rows-test/b.jsonl", both[0]):
        parts = plan_slices(source, 4)
        assert [row for part in parts for _, row in read_slice(part)] == ROWS
    before = content_digest(both[1])
    memory.pipe("/rows-test/b.jsonl", JSONL.encode() * 2)
    assert content_digest(both[1]) != before


def test_estimate_does_no_work_beyond_cheap_local_files(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(JSONL)
    source = str(tmp_path / "rows.jsonl")
    assert estimate_slices(source, 4) == plan_slices(source, 4)
    assert estimate_slices("memory://rows-test/b.jsonl", 4) is None
    assert estimate_slices("someone/some-dataset", 4) is None
    with pytest.raises(DataError, match="file not found"):
        estimate_slices(str(tmp_path / "other.jsonl"), 4)


def test_missing_file_suggests_a_near_name(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(JSONL)
    with pytest.raises(DataError) as caught:
        plan_slices(str(tmp_path / "trian.jsonl"), 4)
    assert "trian.jsonl: file not found; did you mean '" in str(caught.value)
    assert str(tmp_path / "train.jsonl") in str(caught.value)


@pytest.mark.parametrize("source", ["./data", "~/nothing-here", "data/sets/mine", "rows.csv"])
def test_what_looks_like_a_path_is_no_hub_id(source: str) -> None:
    with pytest.raises(DataError, match="file not found"):
        plan_slices(source, 4)


def test_hub_dataset_without_network_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    with pytest.raises(DataError) as caught:
        plan_slices("stdlib_docs", 4)
    assert "did you mean 'stdlib-docs'?" in str(caught.value)
    assert "or give a local file" in str(caught.value)


def test_hub_dataset_is_read_from_its_table_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    (tmp_path / "datasets").mkdir()
    _write_parquet(tmp_path / "datasets" / "hub-someone--rows.parquet")
    (part,) = plan_slices("someone/rows", 100)
    assert [row for _, row in read_slice(part)] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"a": 1}\n{"a": \n', "rows.jsonl:2: each line must be one JSON object"),
        (
            "rows.jsonl",
            b'{"a": 1}\n\n{"a": "\xff"}\n',
            "rows.jsonl:3: text must be UTF-8, but byte 8",
        ),
        (
            "rows.jsonl",
            b'{"a": 1}\n[1, 2]\n',
            "rows.jsonl:2: a row must be a JSON object, but got list",
        ),
        ("rows.jsonl", b"[" * 100_000, "rows.jsonl:1: each line must be one JSON object"),
        ("rows.jsonl", b"\n\n", "rows.jsonl: a dataset's file must hold at least one row"),
        ("rows.json", b'[{"a": 1},\n {"a": }]', "rows.json:2: the file must be one JSON list"),
        ("rows.json", b'[{"a": 1}, 5]', "rows.json:2: a row must be a JSON object, but got int"),
        ("rows.json", b"[]", "rows.json: a dataset's file must hold at least one row"),
        ("rows.csv", b"", "rows.csv: a dataset's file must hold at least one row"),
        ("rows.csv", b"a,b\n1,2\n3\n", "rows.csv:3: a row must have as many values"),
        ("rows.csv", b'a,b\n1,"2\n', "rows.csv:2: not valid CSV"),
        ("rows.csv", b"a,a\n1,2\n", "rows.csv:1: column 'a' is there twice"),
        ("rows.csv", b"a,b\n1,\xe9\n", "rows.csv:2: text must be UTF-8, but byte 3"),
        ("rows.parquet", b"not parquet", "rows.parquet: cannot be read"),
        ("rows.jsonl.gz", b"not gzip", "rows.jsonl.gz: cannot be read"),
        ("rows.jsonl.gz", CUT_GZIP, "rows.jsonl.gz: cannot be read"),
        ("rows.jsonl.zst", b"not zstandard", "rows.jsonl.zst: cannot be read"),
        ("rows.txt", b"hello", "rows.txt: the file's type is told by its name's ending"),
        ("rows.parquet.gz", b"", "but got '.gz'"),
    ],
)
def test_bad_file_is_refused_with_file_and_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        _read_all(tmp_path / name)
    assert message in str(caught.value)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one file of a known type"):
        plan_slices(str(tmp_path), 4)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://no-such-folder/rows.jsonl", "file not found"),
        ("memory://no-such-folder/*.jsonl", "at least one file of a known type"),
        ("nonsense://bucket/rows.jsonl", "cannot be listed"),
    ],
)
def test_bad_url_is_refused(url: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        plan_slices(url, 4)

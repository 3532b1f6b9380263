"""What is wrong with a row goes by as a RowProblem; what is wrong with a file ends its reading."""

import datetime
import decimal
import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from orchestrator.data.slices import ReadOptions
from orchestrator.data.sources import PlanTask, plan_file, read_slice
from orchestrator.errors import DataError
from tests.unit.data.reading import read_file, rows_of

GOOD = b'{"a": "1"}\n'
# Without a time in its header: xdist needs the same test names in every process.
GZIPPED = gzip.compress(GOOD * 99, mtime=0)


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORCHESTRATOR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _parquet(table: Any) -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content)
    return content.getvalue()


def _not_utf8(name: str) -> bytes:
    binary = pyarrow.array([b"good", b"\xff", b"good"])
    table = pyarrow.table({name: pyarrow.StringArray.from_buffers(3, *binary.buffers()[1:])})
    return _parquet(table)


LONG = "x" * 3000
PROBLEMS = [
    ("rows.jsonl", GOOD + b'{"a": \n' + GOOD, "2", "not valid JSON (Expecting value, character 6)"),
    ("rows.jsonl", GOOD + b"\n" + GOOD[:-1] + b"{}\n" + GOOD, "3", "not valid JSON (Extra data"),
    ("rows.jsonl", GOOD + b'\n{"a": "\xff"}\n' + GOOD, "3", "text must be UTF-8, but byte 8 of"),
    ("rows.jsonl", GOOD + b"[1, 2]\n" + GOOD, "2", "a row must be a JSON object, but got list"),
    ("rows.jsonl", GOOD + b"[" * 1500 + b"\n" + GOOD, "2", "not valid JSON"),
    ("rows.jsonl", GOOD + b'{"a": ' + b"1" * 900 * 5, "2", "at most data.max_row_bytes=2000"),
    ("rows.jsonl", GOOD + LONG.encode() + b"\n" + GOOD, "2", "at most data.max_row_bytes=2000"),
    (
        "rows.jsonl.gz",
        gzip.compress(GOOD + b"5\n" + GOOD, mtime=0),
        "2",
        "must be a JSON object, but got int",
    ),
    (
        "rows.json",
        b'[{"a": "1"},\n\n 5, {"a": "1"}]',
        "2",
        "a row must be a JSON object, but got int",
    ),
    ("rows.json", b'[{"a": "1"}, {"a": "\xff"}, {"a": "1"}]', "2", "text must be UTF-8"),
    ("rows.json", json.dumps([{"a": "1"}, {"a": LONG}, {}]).encode(), "2", "data.max_row_bytes"),
    ("rows.csv", b'a,b\n1,2\n3\n"4\n",5\n', "3", "as many values as the header has columns (2)"),
    ("rows.csv", b'a,b\n1,2\n"\n\n\xe9",3\n4,5\n', "3", "text must be UTF-8, but byte 1"),
    ("rows.csv", f'a,b\n1,2\n"{LONG}\n""\n",3\n4,5\n'.encode(), "3", "data.max_row_bytes=2000"),
    ("rows.csv", f'a,b\n1,2\n"\n{LONG}\n"\n4,5\n'.encode(), "3", "data.max_row_bytes=2000"),
    ("rows.csv", b'a,b\n1,2\n"1"2,3\n4,5\n', "3", "valid CSV, but this one is not (',' expected"),
    ("rows.csv", b'a,b\n1,2\n"\n1"2"\n,3\n', "3", "valid CSV, but this one is not (',' expected"),
    ("rows.csv", b"a,b\n1,2\n1\r2,3\n4,5\n", "3", "valid CSV, but this one is not (new-line"),
    ("rows.txt", b"one\n\xff\nthree", "2", "text must be UTF-8"),
    ("rows.txt", b"one\n" + LONG.encode() + b"\nthree", "2", "data.max_row_bytes=2000"),
    ("rows.parquet", _not_utf8("a"), "2", "a value cannot be read ('utf-8' codec"),
    (
        "rows.parquet",
        _parquet(pyarrow.table({"a": ["", LONG, ""]})),
        "2",
        "data.max_row_bytes=2000",
    ),
    (
        "rows.parquet",
        _parquet(pyarrow.table({"a": pyarrow.array([0, 1 << 60, 0], pyarrow.timestamp("ms"))})),
        "2",
        "a value cannot be read",
    ),
]


@pytest.mark.parametrize(("name", "content", "line", "problem"), PROBLEMS)
@pytest.mark.parametrize("slice_bytes", [1 << 30, 7])
def test_bad_row_is_told_and_reading_goes_on(
    tmp_path: Path, name: str, content: bytes, line: str, problem: str, slice_bytes: int
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    rows = read_file(path, slice_bytes, ReadOptions(max_row_bytes=2000))
    problems = [(where, row) for where, row in rows if isinstance(row, str)]
    assert [where for where, _ in problems] == [line]
    assert problem in problems[0][1]
    num_good_after = 0 if rows[-1] == problems[0] else 1
    assert len(rows) == 2 + num_good_after


@pytest.mark.parametrize("kind", ["dictionary", "view", "nested dictionary"])
def test_a_row_is_as_long_as_its_own_values_wherever_these_lie(tmp_path: Path, kind: str) -> None:
    """Those of a dictionary, and those that are viewed, lie beside the rows'."""
    texts = [f"{number} " + "x" * 100 for number in range(50)]
    values = pyarrow.array([*texts, LONG])
    if kind == "view":
        column = values.cast(pyarrow.string_view())
    else:
        column = values.dictionary_encode()
        if kind == "nested dictionary":
            column = pyarrow.StructArray.from_arrays([column], names=["text"])
    table = pyarrow.table({"a": column})
    path = tmp_path / "rows.arrow"
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table)
    *rows, (where, problem) = read_file(path, 1 << 30, ReadOptions(max_row_bytes=2000))
    values_read = [row if isinstance(row, str) else row["a"] for _, row in rows]
    assert values_read == ([{"text": text} for text in texts] if "nested" in kind else texts)
    assert where == "51"
    assert "data.max_row_bytes=2000" in str(problem)


def test_long_paragraphs_and_documents_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "prose.txt"
    path.write_text(f"one\none\n\n{'x' * 15}\n{'x' * 15}\n\nthree\n\n{LONG}\nlast\n\nfive")
    paragraphs = read_file(path, 10, ReadOptions("paragraph", max_row_bytes=20))
    assert [where for where, _ in paragraphs] == ["1", "4", "7", "9", "12"]
    texts = [row["text"] if isinstance(row, dict) else row[:14] for _, row in paragraphs]
    assert texts == ["one\none", "a row must hav", "three", "a row must hav", "five"]
    ((where, document),) = read_file(path, 10, ReadOptions("document", max_row_bytes=20))
    assert (where, str(document)[:14]) == ("1", "a row must hav")


def test_a_gigantic_line_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(GOOD)
        file.truncate(4 << 30)  # zeros that take no room on the disk
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + GOOD)
    (part, *_, last) = plan_file(PlanTask(str(path), 64 << 20))
    tracemalloc.start()
    (_, good), (number, problem) = read_slice(part, ReadOptions())
    assert tracemalloc.get_traced_memory()[1] < 3 * ReadOptions().max_row_bytes
    tracemalloc.stop()
    assert (good, number) == ({"a": "1"}, 2)
    assert "data.max_row_bytes" in str(problem)
    assert list(read_slice(last, ReadOptions())) == [(1, {"a": "1"})]


BROKEN = [
    ("rows.json", b'[{"a": 1},\n {"a": }]', "rows.json:2: the file must be one JSON list"),
    ("rows.json", b'[{"a": 1}\n {"a": 2}]', "rows.json:2: the file must be one JSON list"),
    ("rows.json", b'[{"a": 1},\n]', "rows.json:2: the file must be one JSON list"),
    ("rows.json", b'[{"a": 1},\n {"a": "1', "not valid JSON (Unterminated string"),
    ("rows.json", b'[{"a": 1}]\n [', "rows.json:2: the file must be one JSON list"),
    ("rows.json", b"[" * 100_000, "rows.json:1: the file must be one JSON list"),
    ("rows.csv", b'a,b\n1,2\n1,"2\n3,4\n', "rows.csv:3: not valid CSV (the quotes that are opened"),
    ("rows.csv", b'a,"b\n1,2\n', "rows.csv:1: not valid CSV"),
    ("rows.csv", b"a,\xe9\n1,2\n", "rows.csv:1: not valid CSV (in the header: text must be UTF-8"),
    ("rows.csv", b"a,a\n1,2\n", "rows.csv:1: column 'a' is there twice"),
    ("rows.csv", b"a,b\r1,2\r", "rows.csv:1: not valid CSV"),
    ("rows.parquet", b"not parquet", "rows.parquet: cannot be read"),
    ("rows.parquet", _parquet(pyarrow.table({"a": ["b"]}))[:-9], "rows.parquet: cannot be read"),
    ("rows.arrow", b"not arrow", "rows.arrow: cannot be read"),
    ("rows.arrow", b"", "rows.arrow: cannot be read"),
    ("rows.jsonl.gz", b"not gzip", "rows.jsonl.gz: cannot be read"),
    ("rows.jsonl.gz", GZIPPED[:-9], "rows.jsonl.gz: cannot be read (Compressed file ended"),
    ("rows.jsonl.gz", GZIPPED[:-8] + b"12345678", "rows.jsonl.gz: cannot be read"),
    ("rows.jsonl.zst", b"not zstandard", "rows.jsonl.zst: cannot be read"),
    ("rows.jsonl.xz", b"not xz", "rows.jsonl.xz: cannot be read"),
    ("rows.md", b"hello", "rows.md: the file's type is told by its name's ending"),
    ("rows.parquet.gz", b"", "but got '.gz'"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_file(tmp_path / name)
    assert message in str(caught.value)


EMPTY = [
    ("rows.jsonl", b""),
    ("rows.jsonl", b"\xef\xbb\xbf\n \n"),
    ("rows.jsonl.gz", gzip.compress(b"", mtime=0)),
    ("rows.txt", b"\n"),
    ("rows.json", b"[ ]"),
    ("rows.csv", b""),
    ("rows.csv", b"a,b\n\n"),
    ("rows.parquet", _parquet(pyarrow.table({"a": pyarrow.array([], "string")}))),
]


@pytest.mark.parametrize(("name", "content"), EMPTY)
def test_a_file_without_rows_has_no_slices(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert plan_file(PlanTask(str(tmp_path / name), 1 << 20)) == []


def test_a_cut_zstandard_file_is_refused(tmp_path: Path) -> None:
    import zstandard

    whole = zstandard.compress(b"".join(b'{"a": "%d"}\n' % number for number in range(99_999)))
    (tmp_path / "rows.jsonl.zst").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="Truncated compressed stream"):
        rows_of(tmp_path / "rows.jsonl.zst")


def test_a_damaged_page_of_parquet_is_refused(tmp_path: Path) -> None:
    content = bytearray(_parquet(pyarrow.table({"a": [str(number) * 9 for number in range(999)]})))
    content[20:60] = bytes(40)
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet: cannot be read"):
        rows_of(tmp_path / "rows.parquet")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv"])
@pytest.mark.parametrize("seen", [0, 1])
def test_a_file_that_changes_underway_is_refused(tmp_path: Path, name: str, seen: int) -> None:
    path = tmp_path / name
    content = b"a\n1\n2\n3\n" if name == "rows.csv" else GOOD * 3
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (part,) = plan_file(PlanTask(str(path), 1 << 20))
    rows = read_slice(part, ReadOptions())
    for _ in range(seen):
        next(rows)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(DataError, match="the file changed while it was being prepared"):
        list(rows)


def test_a_file_that_goes_away_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    (part,) = plan_file(PlanTask(str(tmp_path / "rows.jsonl"), 1 << 20))
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        list(read_slice(part, ReadOptions()))


def test_values_that_json_does_not_know_are_read(tmp_path: Path) -> None:
    row = {
        "when": datetime.datetime(2024, 2, 29, 12, 0, 0, 1),
        "day": datetime.date(2024, 2, 29),
        "price": decimal.Decimal("1.50"),
        "image": b"\xff\x00",
        "nothing": None,
        "nested": [{"deep": [1.5, None]}],
    }
    (tmp_path / "rows.parquet").write_bytes(_parquet(pyarrow.Table.from_pylist([row])))
    assert rows_of(tmp_path / "rows.parquet") == [row]

"""Any slices of any file give the rows that a plain reading gives, each once."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.slices import ReadOptions
from orchestrator.data.sources import PlanTask, plan_file
from orchestrator.data.streams import CHUNK_BYTES
from tests.unit.data.reading import read_file, rows_of

Rows = list[dict[str, Any]]

TEXT = st.text(st.sampled_from("ab é😀\t\\{}[],:\"'\n\r\u2028"), max_size=12)
ROWS = st.lists(st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}), min_size=1, max_size=9)
SLICE_BYTES = st.integers(1, 200)


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORCHESTRATOR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """A file that is written twice within a clock tick may look unchanged, so each has its own."""
    parent = tmp_path_factory.mktemp("rows")
    return lambda: Path(tempfile.mkdtemp(dir=parent))


def _jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _csv(rows: Rows) -> bytes:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, ["prompt", "completion"])
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()


def _parquet(rows: Rows) -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), content, row_group_size=3)
    return content.getvalue()


def _arrow(rows: Rows, start: Callable[..., Any]) -> bytes:
    table, content = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with start(content, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return content.getvalue()


def _framed(compress: Callable[[bytes], bytes], content: bytes) -> bytes:
    """In several frames, one of them empty, as parallel compressors and `cat` write them."""
    middle = len(content) // 2
    return compress(content[:middle]) + compress(b"") + compress(content[middle:])


WRITERS: dict[str, Callable[[Rows], bytes]] = {
    "rows.jsonl": _jsonl,
    "bom.jsonl": lambda rows: b"\xef\xbb\xbf" + _jsonl(rows).replace(b"\n", b"\r\n"),
    "open.jsonl": lambda rows: _jsonl(rows).rstrip(b"\n"),
    "lines.json": _jsonl,
    "list.json": lambda rows: b"\n\n" + json.dumps(rows, indent=1, ensure_ascii=False).encode(),
    "compact.json": lambda rows: b"\xef\xbb\xbf" + json.dumps(rows).encode(),
    "rows.csv": _csv,
    "bom.csv": lambda rows: b"\xef\xbb\xbf" + _csv(rows),
    "rows.parquet": _parquet,
    "stream.arrow": lambda rows: _arrow(rows, pyarrow.ipc.new_stream),
    "file.arrow": lambda rows: _arrow(rows, pyarrow.ipc.new_file),
    "rows.jsonl.gz": lambda rows: _framed(gzip.compress, _jsonl(rows)),
    "rows.jsonl.zst": lambda rows: _framed(zstandard.compress, _jsonl(rows)),
    "rows.jsonl.bz2": lambda rows: _framed(bz2.compress, _jsonl(rows)),
    "rows.jsonl.xz": lambda rows: _framed(lzma.compress, _jsonl(rows)),
    "rows.json.gz": lambda rows: _framed(gzip.compress, json.dumps(rows).encode()),
    "rows.csv.gz": lambda rows: _framed(gzip.compress, _csv(rows)),
}


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=40)
@given(rows=ROWS, slice_bytes=SLICE_BYTES)
def test_slices_of_every_file_type_give_each_row_once(
    new_folder: Callable[[], Path], name: str, rows: Rows, slice_bytes: int
) -> None:
    path = new_folder() / name
    path.write_bytes(WRITERS[name](rows))
    assert rows_of(path, slice_bytes) == rows
    assert read_file(path, slice_bytes) == read_file(path)


@given(blank_before=st.lists(st.integers(0, 3), min_size=1, max_size=20), slice_bytes=SLICE_BYTES)
def test_lines_are_numbered_from_the_files_beginning(
    new_folder: Callable[[], Path], blank_before: list[int], slice_bytes: int
) -> None:
    lines: list[str] = []
    for blanks in blank_before:
        lines += [" \n"] * blanks
        lines.append(json.dumps({"line": str(len(lines) + 1)}) + "\n")
    path = new_folder() / "blank.jsonl"
    path.write_text("".join(lines))
    found = read_file(path, slice_bytes)
    assert len(found) == len(blank_before)
    assert all(row == {"line": number} for number, row in found)


TEXT_LINES = st.text(st.sampled_from("aé \n\n\n\r"), min_size=1, max_size=40)


@given(text=TEXT_LINES, slice_bytes=SLICE_BYTES)
def test_text_is_sampled_by_line_paragraph_and_document(
    new_folder: Callable[[], Path], text: str, slice_bytes: int
) -> None:
    path = new_folder() / "prose.txt"
    path.write_bytes(text.encode())
    if not text.strip():
        return
    lines = text.encode().split(b"\n")
    filled = [line.decode().rstrip("\r") for line in lines if line.strip()]
    read = {
        sample_by: [
            row["text"]
            for _, row in read_file(path, slice_bytes, ReadOptions(sample_by))
            if isinstance(row, dict)
        ]
        for sample_by in ("line", "paragraph", "document")
    }
    assert read["line"] == filled
    assert read["paragraph"] == _paragraphs(lines)
    assert read["document"] == [text.replace("\r\n", "\n")]


def _paragraphs(lines: list[bytes]) -> list[str]:
    """Another way to the same: each blank line starts a new, perhaps empty, paragraph."""
    paragraphs: list[list[bytes]] = [[]]
    for line in lines:
        if line.strip():
            paragraphs[-1].append(line)
        else:
            paragraphs.append([])
    joined = [b"\n".join(paragraph).rstrip(b"\r") for paragraph in paragraphs if paragraph]
    return [paragraph.replace(b"\r\n", b"\n").decode() for paragraph in joined]


# Quotes that open a value, close it, are doubled, or stand for themselves within a bare value.
PIECES = st.sampled_from(['"', '""', ",", "\n", "\r\n", "a", "é", '"a"', '5"', '"\n"', '"",'])


@given(text=st.lists(PIECES, max_size=25).map("".join), slice_bytes=st.integers(1, 12))
def test_csv_is_cut_where_the_csv_module_starts_a_record(
    new_folder: Callable[[], Path], text: str, slice_bytes: int
) -> None:
    content = "x,y\n" + text
    try:
        plain = [row for row in csv.reader(io.StringIO(content, newline=""), strict=True) if row]
    except csv.Error:
        return
    path = new_folder() / "quotes.csv"
    path.write_bytes(content.encode())
    if not text.strip():
        return
    rows = rows_of(path, slice_bytes)
    assert len(rows) == len(plain) - 1
    for row, values in zip(rows, plain[1:], strict=True):
        assert row == dict(zip("xy", values, strict=True)) if len(values) == 2 else str(row)


@pytest.mark.parametrize("name", ["list.json", "rows.csv", "rows.json.gz"])
@settings(max_examples=20)
@given(rows=ROWS, before=st.integers(0, 150))
def test_what_is_read_at_once_may_end_anywhere(
    new_folder: Callable[[], Path], name: str, rows: Rows, before: int
) -> None:
    filler = {"prompt": "x" * (CHUNK_BYTES - before), "completion": ""}
    path = new_folder() / name
    path.write_bytes(WRITERS[name]([filler, *rows]))
    assert rows_of(path, 1 << 18) == [filler, *rows]


def test_slices_are_about_as_large_as_asked(new_folder: Callable[[], Path]) -> None:
    folder = new_folder()
    rows = [{"prompt": "question " * 5, "completion": str(number)} for number in range(400)]
    for name in ("rows.jsonl", "rows.csv", "rows.parquet", "stream.arrow", "rows.jsonl.gz"):
        (folder / name).write_bytes(WRITERS[name](rows))
        parts = plan_file(PlanTask(str(folder / name), 4096))
        assert 4 <= len(parts) <= 16, name
        assert all(0 < part.num_bytes <= 8192 for part in parts), name
        assert parts[0].start <= parts[0].end == parts[1].start

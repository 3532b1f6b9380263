"""What a store or a web server says of a file decides what is prepared again, copied or refused."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from orchestrator.data.slices import ReadOptions
from orchestrator.data.sources import PlanTask, content_digest, plan_file, read_slice
from orchestrator.errors import DataError
from tests.unit.data.reading import rows_of

MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(folder))
    return folder


class _Bucket(AbstractFileSystem):
    """Like S3: reads 50 MiB ahead if not told, and its listings say when a file was last read."""

    protocol = "bucket"
    cachable = False
    files: ClassVar[dict[str, bytes]] = {}
    versions: ClassVar[dict[str, str]] = {}
    fetched: ClassVar[list[int]] = []
    clock = count()

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        name = self._strip_protocol(path)
        return {
            "name": name,
            "type": "file",
            "size": len(self.files[name]),
            "ETag": self.versions.get(name, "1"),
            "accessed": next(self.clock),
        }

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        options["block_size"] = options.get("block_size") or 50 * MIB
        return _Object(self, path, mode, **options)


class _Object(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    def _fetch_range(self, start: int, end: int) -> bytes:
        part = _Bucket.files[self.path][start:end]
        _Bucket.fetched.append(len(part))
        return part


@pytest.fixture
def bucket() -> type[_Bucket]:
    fsspec.register_implementation("bucket", _Bucket, clobber=True)
    _Bucket.fetched.clear()
    return _Bucket


def test_a_slice_of_a_store_fetches_little_more_than_itself(bucket: type[_Bucket]) -> None:
    line = json.dumps({"a": "x" * 1000}).encode() + b"\n"
    bucket.files["far.jsonl"] = line * (32 * MIB // len(line))
    parts = plan_file(PlanTask("bucket://far.jsonl", 2 * MIB))
    bucket.fetched.clear()
    rows = list(read_slice(parts[3], ReadOptions()))
    assert len(rows) == pytest.approx(2 * MIB / len(line), rel=0.01)
    assert 2 * MIB <= sum(bucket.fetched) <= 10 * MIB


def test_a_store_file_is_told_by_its_version_not_by_its_last_use(bucket: type[_Bucket]) -> None:
    bucket.files |= {"a.jsonl": b'{"a": 1}\n', "b.jsonl": b'{"a": 2}\n'}
    before = content_digest("bucket://a.jsonl")
    assert content_digest("bucket://a.jsonl") == before
    # An ETag may be made of size and time, which two files can share.
    assert content_digest("bucket://b.jsonl") != before
    bucket.versions["a.jsonl"] = "2"
    assert content_digest("bucket://a.jsonl") != before


class _Server(BaseHTTPRequestHandler):
    """Sends whole files only."""

    content = b'{"a": 1}\n'
    validators: ClassVar[dict[str, str]] = {}

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        for name, value in self.validators.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        rest = io.BytesIO(self.content)
        while piece := rest.read(MIB):
            try:
                self.wfile.write(piece)
            except OSError:  # the client has seen enough
                return

    def log_message(self, format: str, *values: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    servers = []

    def start(content: bytes = _Server.content, **validators: str) -> str:
        names = {"content": content, "validators": validators}
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Given", (_Server,), names))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/rows.jsonl"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_that_tells_no_change_is_refused(serve: Callable[..., str]) -> None:
    url = serve()
    for use in (content_digest, lambda file: plan_file(PlanTask(file, 100))):
        with pytest.raises(DataError, match=r"sends neither ETag, .*: download the file and give"):
            use(url)


def test_a_servers_hash_stands_for_the_content_wherever_it_is(serve: Callable[..., str]) -> None:
    hashed = {"Content-MD5": "bWQ1"}
    assert content_digest(serve(**hashed)) == content_digest(serve(**hashed, ETag="x"))
    assert content_digest(serve(ETag="x")) != content_digest(serve(ETag="x"))


def test_a_large_file_of_a_server_without_ranges_is_read(serve: Callable[..., str]) -> None:
    content = json.dumps({"a": "x" * MIB}).encode() + b"\n"
    rows = rows_of(serve(content * 12, ETag="1"), 4 * MIB)
    assert len(rows) == 12
    assert all(row == json.loads(content) for row in rows)

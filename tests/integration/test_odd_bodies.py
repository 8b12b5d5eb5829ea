"""Bodies that come in odd ways: whole in place of a range, without a length, with an encoding. Right, or refused."""

from __future__ import annotations

import gzip
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mpreader import ObjectChanged, PoolConfig, RangeFetcher, S3Client, S3ClientConfig, TransportError
from mpreader.config import MiB
from mpreader.testing.s3_server import aws_environment

DATA = b"0123456789" * 300_000
GZIPPED = gzip.compress(DATA)
Head = dict[str, str]
Answer = tuple[int, Head, bytes]
ETAG = {"ETag": '"1"'}
GZIP = {"Content-Encoding": "gzip"}
CHUNKED = {"Transfer-Encoding": "chunked"}
TO_THE_END = {"Connection": "close"}  # neither a length nor chunks: the body ends with the connection


class _Server(ThreadingHTTPServer):
    """Answers HEAD and GET by functions of the requested range."""

    daemon_threads = True
    head: Head
    get: Callable[[int, int], Answer]

    def handle_error(self, *_: object) -> None:
        """Keep quiet: a body that is refused is not received to its end."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._send(200, self.server.head)

    def do_GET(self) -> None:
        first, last = re.findall(r"bytes=(\d+)-(\d*)", self.headers["Range"])[0]
        status, headers, body = self.server.get(int(first), int(last) + 1 if last else len(DATA))
        self._send(status, headers)
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def _send(self, status: int, headers: Head) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setattr("random.uniform", lambda *_: 0.0)  # retries come at once
    server = _Server(("127.0.0.1", 0), _Handler)
    for name, value in aws_environment(f"http://127.0.0.1:{server.server_port}").items():
        monkeypatch.setenv(name, value)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


CLIENT = S3ClientConfig("us-east-1", max_attempts=3)


def _fetch(uri: str) -> bytes:
    with RangeFetcher(CLIENT, PoolConfig(1, 1, 64 * MiB, 4 * MiB)) as fetcher:  # one part
        return bytes(fetcher.fetch_object(uri))


def _read(server: _Server, way: str) -> bytes:
    if way == "http":
        return _fetch(f"http://127.0.0.1:{server.server_port}/bucket/key")
    if way == "s3":
        return _fetch("s3://bucket/key")
    client = S3Client(s3client_config=CLIENT)
    try:
        return client.get_object("bucket", "key").read()
    finally:
        client.close()


def chunks(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


def length(body: bytes) -> Head:
    return {"Content-Length": str(len(body))}


def content_range(start: int, end: int) -> Head:
    return {"Content-Range": f"bytes {start}-{end - 1}/{len(DATA)}"}


HEAD = {**ETAG, **length(DATA)}
# What HEAD says; status, headers and body of a GET.
RIGHT: dict[str, tuple[Head, Answer]] = {
    "length": (HEAD, (200, HEAD, DATA)),
    "length and range": (HEAD, (200, {**HEAD, **content_range(0, len(DATA))}, DATA)),
    "chunks": (HEAD, (200, {**ETAG, **CHUNKED}, chunks(DATA))),
    "to the end": (HEAD, (200, {**ETAG, **TO_THE_END}, DATA)),
    "partial, in chunks": (HEAD, (206, {**ETAG, **content_range(0, len(DATA)), **CHUNKED}, chunks(DATA))),
}
WRONG: dict[str, tuple[Head, Answer]] = {
    "chunks, too many": (HEAD, (200, {**ETAG, **CHUNKED}, chunks(DATA + b"x"))),
    "to the end, too many": (HEAD, (200, {**ETAG, **TO_THE_END}, DATA + b"x")),
    "chunks, too few": (HEAD, (200, {**ETAG, **CHUNKED}, chunks(DATA[:-1]))),
    "another range": (HEAD, (200, {**HEAD, **content_range(1, len(DATA))}, DATA)),
    "compressed, in chunks": (HEAD, (200, {**ETAG, **GZIP, **CHUNKED}, chunks(GZIPPED))),
    "compressed, with a length": (HEAD, (200, {**ETAG, **GZIP, **length(GZIPPED)}, GZIPPED)),
    "partial, too many": (HEAD, (206, {**ETAG, **content_range(0, len(DATA)), **CHUNKED}, chunks(DATA + b"x"))),
}


@pytest.mark.parametrize("way", ["http", "s3", "reader"])
@pytest.mark.parametrize(("head", "answer"), RIGHT.values(), ids=RIGHT)
def test_whole_object_is_right_however_it_comes(server: _Server, head: Head, answer: Answer, way: str) -> None:
    server.head, server.get = head, lambda _start, _end: answer
    assert _read(server, way) == DATA


@pytest.mark.parametrize("way", ["http", "s3", "reader"])
@pytest.mark.parametrize(("head", "answer"), WRONG.values(), ids=WRONG)
@pytest.mark.row("200 with the whole object instead of 206")
def test_body_that_is_not_the_whole_object_is_refused(server: _Server, head: Head, answer: Answer, way: str) -> None:
    server.head, server.get = head, lambda _start, _end: answer
    with pytest.raises(TransportError) as caught:
        _read(server, way)
    assert type(caught.value) is not ObjectChanged


@pytest.mark.parametrize("way", ["http", "s3", "reader"])
def test_whole_object_of_another_version_is_refused(server: _Server, way: str) -> None:
    server.head, server.get = HEAD, lambda _start, _end: (200, {"ETag": '"2"', **length(DATA)}, DATA)
    if way == "reader":  # it has not asked for a version before: the first answer decides which one it reads
        assert _read(server, way) == DATA
        return
    with pytest.raises(ObjectChanged, match='ETag "2", not "1"'):
        _read(server, way)


@pytest.mark.parametrize("way", ["http", "s3", "reader"])
@pytest.mark.row("Content-Encoding: stored with the object, or made on the way")
def test_stored_encoding_comes_in_chunks_where_head_has_said_so(server: _Server, way: str) -> None:
    server.get = lambda start, end: (
        206,
        {**ETAG, **GZIP, **content_range(start, end), **CHUNKED},
        chunks(DATA[start:end]),
    )
    server.head = {**HEAD, **GZIP}
    assert _read(server, way) == DATA
    server.head = HEAD  # else it is the server that compresses
    with pytest.raises(TransportError, match="compresses"):
        _read(server, way)


def test_reader_notices_another_size_though_nothing_tells_versions(server: _Server) -> None:
    server.head, gets = length(DATA), []

    def answer(start: int, end: int) -> Answer:
        gets.append(start)
        if len(gets) == 1:  # breaks off
            return 206, {**content_range(start, end), **length(DATA), **TO_THE_END}, DATA[:1_500_000]
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(DATA) + 5}", **length(DATA[start:end])}
        return 206, headers, bytes(end - start)

    server.get = answer
    with pytest.raises(ObjectChanged, match="3000005 bytes now, not 3000000"):
        _read(server, "reader")


def test_reader_may_ask_for_the_size_where_head_tells_nothing_of_the_version(server: _Server) -> None:
    server.get = lambda start, end: (
        206,
        {**ETAG, **content_range(start, end), **length(DATA[start:end])},
        DATA[start:end],
    )
    client = S3Client(s3client_config=CLIENT)
    try:
        for head, is_same in ((length(DATA), True), (length(DATA + b"x"), False)):
            server.head = head
            reader = client.get_object("bucket", "key")
            assert reader.read(10) == DATA[:10]
            if is_same:
                assert reader.seek(0, 2) == len(DATA)
            else:
                with pytest.raises(TransportError, match=r"ETag|bytes now"):
                    reader.seek(0, 2)
            reader.close()
    finally:
        client.close()

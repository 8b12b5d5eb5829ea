"""Arbitrary responses of a server: exactly the right bytes or an error, nothing outside of the slot, little memory."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpreader.pool.worker.connection import Connection
from mpreader.pool.worker.failure import GetFailed
from mpreader.pool.worker.http import MAX_HEAD_BYTES, HttpSocket, MalformedResponse
from mpreader.pool.worker.messages import Fetch
from mpreader.pool.worker.route import Route
from mpreader.pool.worker.version import ObjectVersion

if TYPE_CHECKING:
    from tests.fuzz.conftest import Mutant, Mutants

fuzzed = settings(max_examples=int(os.environ.get("MPREADER_FUZZ_EXAMPLES", "200")))

DATA: Final = random.Random(1).randbytes(6000)
ETAG: Final = '"0123456789abcdef"'
START: Final = 2000
LENGTH: Final = 900
WANTED: Final = DATA[START : START + LENGTH]
Skips = tuple[tuple[int, int], ...]
SKIPS: Final[Skips] = ((START + 10, START + LENGTH - 20),)
GUARD: Final = b"\xa5" * 4096
# A head, what was received with it, and the body of an error.
MOST_BYTES: Final = 4 * MAX_HEAD_BYTES


def response(status: str = "206 Partial Content", body: bytes = WANTED, **changes: str) -> bytes:
    headers = {
        "x-amz-request-id": "4442587FB7D0A2F9",
        "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
        "ETag": ETAG,
        "Accept-Ranges": "bytes",
        "Content-Range": f"bytes {START}-{START + LENGTH - 1}/{len(DATA)}",
        "Content-Type": "binary/octet-stream",
        "Content-Length": str(len(body)),
        "Server": "AmazonS3",
    }
    headers.update({name.replace("_", "-"): value for name, value in changes.items()})
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items() if value), "", ""]
    return "\r\n".join(lines).encode() + body


def chunked(body: bytes, size: int) -> bytes:
    cuts = [body[at : at + size] for at in range(0, len(body), size)]
    return (
        b"".join(b"%x;chunk-signature=0\r\n%s\r\n" % (len(cut), cut) for cut in cuts) + b"0\r\nx-amz-trailer: 1\r\n\r\n"
    )


def error(status: str, code: str) -> bytes:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>It failed</Message></Error>'.encode()
    return response(status, body, Content_Range="", ETag="", Retry_After="1")


RESPONSES: Final = (
    response(),
    response(Content_Length=""),  # the body ends with the connection
    response(Connection="close"),
    response().replace(b"HTTP/1.1", b"HTTP/1.0", 1),
    response(body=chunked(WANTED, 300), Content_Length="", Transfer_Encoding="chunked"),
    response(body=chunked(WANTED, 1), Content_Length="", Transfer_Encoding="chunked", Content_Encoding="aws-chunked"),
    b"HTTP/1.1 100 Continue\r\n\r\n" + response(),
    response(body=WANTED + b"beyond", Content_Length=str(LENGTH)),
    response("200 OK", DATA, Content_Range=""),
    response(Content_Range=f"bytes 0-{LENGTH - 1}/{len(DATA)}"),
    error("503 Slow Down", "SlowDown"),
    error("403 Forbidden", "ExpiredToken"),
    error("404 Not Found", "NoSuchKey"),
    error("301 Moved Permanently", "PermanentRedirect"),
)


class Server:
    """Sends the bytes that it is given to each connection, in the pieces that it is given, and closes it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.pieces: Sequence[bytes] = ()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.recv(65536)
                for piece in self.pieces:
                    connection.sendall(piece)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):  # a reset would throw away what is still to be read
                    pass


class Pieces(NamedTuple):
    """Bytes that a server sends, and where they are cut into pieces."""

    data: bytes
    cuts: tuple[int, ...]

    def all(self) -> list[bytes]:
        borders = sorted({0, len(self.data), *(cut % (len(self.data) + 1) for cut in self.cuts)})
        return [self.data[a:b] for a, b in pairwise(borders)]


@pytest.fixture(scope="session")
def damaged(mutants: Mutants) -> st.SearchStrategy[Mutant]:
    return mutants(RESPONSES)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MOST_BYTES, peak


def get(
    server: Server, raw: bytes, cuts: Sequence[int], etag: str = ETAG, repeats: int = 1, skips: Skips = ()
) -> bytes | None:
    """Bytes that a GET of the wanted range receives; None where it fails."""
    server.pieces = Pieces(raw, tuple(cuts)).all() * repeats
    route = Route(False, "127.0.0.1", server.port, "/b/k", (("Host", "h"),))
    fetch = Fetch(7, route, ObjectVersion(len(DATA), etag), START, START + LENGTH, 0, 0, skips)
    slot = bytearray(GUARD + bytes(fetch.kept_bytes) + GUARD)
    connection = Connection(connect_timeout_s=5.0, stall_timeout_s=5.0)
    failed: GetFailed | None = None
    try:
        with little_memory():
            connection.get(fetch, memoryview(slot)[len(GUARD) : -len(GUARD)])
    except GetFailed as error:
        failed = error
    finally:
        connection.close()
    assert slot.startswith(GUARD), "bytes before the slot"
    assert slot.endswith(GUARD), "bytes behind the slot"
    assert connection.part is None
    if failed is None:
        return bytes(slot[len(GUARD) : -len(GUARD)])
    assert 0 <= failed.received <= LENGTH
    assert failed.detail
    assert 0 <= failed.retry_after_s <= 60
    return None


cuts = st.lists(st.integers(0, 5000), max_size=4)


@pytest.mark.parametrize("raw", RESPONSES)
def test_get_of_the_corpus(server: Server, raw: bytes) -> None:
    is_right = b" 206 " in raw and f"Content-Range: bytes {START}-".encode() in raw
    assert get(server, raw, range(0, 5000, 50)) == (WANTED if is_right else None)
    kept = WANTED[:10] + WANTED[-20:]
    assert get(server, raw, range(0, 5000, 50), skips=SKIPS) == (kept if is_right else None)


@fuzzed
@given(raw=st.data(), cuts=cuts)
def test_get_of_a_damaged_head_brings_the_right_bytes_or_fails(
    raw: st.DataObject, cuts: list[int], server: Server, damaged: st.SearchStrategy[Mutant]
) -> None:
    """The body's own bytes are not covered by anything at this level: only the head is damaged."""
    origin, data = raw.draw(damaged)
    head, separator, _ = data.partition(b"\r\n\r\n")
    body = RESPONSES[origin].partition(b"\r\n\r\n")[2]
    sent = head + separator + body
    received = get(server, sent, cuts)
    if received is not None:
        for named in (b" 206", ETAG.encode(), f"bytes {START}-{START + LENGTH - 1}/".encode()):
            assert named in sent
        # A body may be the wrong one, or have lost the header that says it is chunked: then it is taken as it comes.
        assert received in (WANTED, body[:LENGTH])


@fuzzed
@given(
    raw=st.data(),
    cuts=cuts,
    etag=st.sampled_from([ETAG, ""]),
    repeats=st.sampled_from([1, 1, 1, 200]),
    skips=st.sampled_from([(), SKIPS]),
)
def test_get_of_anything_stays_in_its_slot(
    raw: st.DataObject,
    cuts: list[int],
    etag: str,
    repeats: int,
    skips: Skips,
    server: Server,
    damaged: st.SearchStrategy[Mutant],
) -> None:
    get(server, raw.draw(damaged).data, cuts, etag, repeats, skips)


@fuzzed
@given(raw=st.data(), cuts=cuts)
def test_response_is_read_to_its_end_or_refused(
    raw: st.DataObject, cuts: list[int], damaged: st.SearchStrategy[Mutant]
) -> None:
    pieces = Pieces(raw.draw(damaged).data, tuple(cuts))
    ours, theirs = socket.socketpair()
    with ours, theirs, little_memory():
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        for piece in pieces.all():
            theirs.sendall(piece)
        theirs.shutdown(socket.SHUT_WR)
        stream = HttpSocket(ours)
        with contextlib.suppress(MalformedResponse):
            while True:  # one response may follow another
                response = stream.read_response()
                assert 200 <= response.status <= 999
                body = response.read(10_000)
                assert len(body) <= len(pieces.data)
                assert response.length is None or len(body) <= response.length
                assert not body or response.is_chunked or body in pieces.data

"""Ranged GETs of a connection against a real server: exact bytes, or the kind of failure and the bytes received."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mpreader.pool.worker.connection import CHUNK_BYTES, Connection
from mpreader.pool.worker.failure import GetFailed
from mpreader.pool.worker.messages import FailureKind, Fetch
from mpreader.pool.worker.route import Proxy, Route
from mpreader.pool.worker.transport import open_socket
from mpreader.pool.worker.version import ObjectVersion
from mpreader.ranges import Part
from mpreader.testing import Fault, FaultKind, FaultServer

DATA = os.urandom(2_000_000)
ETAG = f'"{hashlib.md5(DATA).hexdigest()}"'


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"/b/k": DATA}) as server:
        yield server


@pytest.fixture
def connection() -> Iterator[Connection]:
    connection = Connection(connect_timeout_s=2.0, stall_timeout_s=5.0)
    yield connection
    connection.close()


def fetch_from(port: int, start: int, end: int, *, host: str = "127.0.0.1", etag: str = ETAG, **route: object) -> Fetch:
    headers = (("Host", f"{host}:{port}"),)
    to = Route(
        bool(route.get("tls")),
        host,
        port,
        "/b/k",
        headers,
        proxy=route.get("proxy"),  # type: ignore[arg-type]
        ca_file=route.get("ca_file"),  # type: ignore[arg-type]
    )
    return Fetch(7, to, ObjectVersion(len(DATA), etag), start, end, 0, 0)


def get(connection: Connection, server: FaultServer, start: int = 100_000, end: int = 1_100_000) -> bytes:
    into = bytearray(end - start)
    port = int(server.endpoint_url.rpartition(":")[2])
    connection.get(fetch_from(port, start, end), memoryview(into))
    return bytes(into)


def failure_of(call: Callable[[], object]) -> GetFailed:
    with pytest.raises(GetFailed) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 1), (5, 6), (0, CHUNK_BYTES), (1, CHUNK_BYTES + 2), (0, len(DATA)), (len(DATA) - 1, len(DATA))],
)
def test_get_receives_exactly_the_range(connection: Connection, server: FaultServer, start: int, end: int) -> None:
    assert get(connection, server, start, end) == DATA[start:end]
    [request] = server.requests
    assert request.range == f"bytes={start}-{end - 1}"
    assert request.headers["if-match"] == ETAG
    assert request.headers["accept-encoding"] == "identity"


def test_get_keeps_the_connection(connection: Connection, server: FaultServer) -> None:
    for start in range(0, 500, 100):
        assert get(connection, server, start, start + 100) == DATA[start : start + 100]
    assert {request.connection for request in server.requests} == {1}


# The first one is shorter than what comes with the head of the response, the last one ends with the range.
SKIPS = ((100_010, 100_020), (150_000, 420_000), (420_001, 1_000_000), (1_099_000, 1_100_000))


def fetch_with_skips(server: FaultServer, *, tls: bool = False) -> tuple[Fetch, bytes]:
    """A part with skips, and what is kept of it."""
    port = int(server.endpoint_url.rpartition(":")[2])
    fetch = fetch_from(port, 100_000, 1_100_000, tls=tls, ca_file=str(server.ca_file) if tls else None)
    borders = (100_000, *itertools.chain(*SKIPS), 1_100_000)
    return fetch._replace(skips=SKIPS), b"".join(map(DATA.__getitem__, map(slice, borders[::2], borders[1::2])))


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_get_keeps_nothing_of_what_is_skipped(connection: Connection, tls: bool) -> None:
    with FaultServer({"/b/k": DATA}, tls=tls) as server:
        fetch, kept = fetch_with_skips(server, tls=tls)
        assert fetch.kept_bytes == len(kept)
        for _ in range(2):  # the second one on the same connection: no byte of the first is left in it
            into = bytearray(len(kept))
            connection.get(fetch, memoryview(into))
            assert into == kept
        assert {request.connection for request in server.requests} == {1}


@pytest.mark.parametrize("after_bytes", [5, 15, 30_000, 200_000, 320_000, 950_000, 999_500])
def test_get_of_a_body_that_breaks_counts_what_was_skipped(
    connection: Connection, server: FaultServer, after_bytes: int
) -> None:
    server.inject(Fault(FaultKind.EARLY_CLOSE, after_bytes=after_bytes))
    fetch, kept = fetch_with_skips(server)
    into = bytearray(len(kept))
    failure = failure_of(lambda: connection.get(fetch, memoryview(into)))
    assert (failure.kind, failure.received) == (FailureKind.BROKEN, after_bytes)
    rest = Part(fetch.start, fetch.end, skips=SKIPS).rest(after_bytes)
    assert into[: rest.slot_offset] == kept[: rest.slot_offset]
    assert not any(into[rest.slot_offset :])


def test_get_skips_within_a_body_of_chunks(connection: Connection) -> None:
    head = (
        f"HTTP/1.1 206 P\r\nContent-Range: bytes 0-99999/{len(DATA)}\r\nETag: {ETAG}\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    ).encode()
    chunks = b"".join(b"%x\r\n%b\r\n" % (7000, DATA[start : start + 7000]) for start in range(0, 98_000, 7000))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(head + chunks + b"7d0\r\n" + DATA[98_000:100_000] + b"\r\n0\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        fetch = fetch_from(listener.getsockname()[1], 0, 100_000)._replace(skips=((10_000, 90_000),))
        into = bytearray(20_000)
        connection.get(fetch, memoryview(into))
        thread.join()
    assert into == DATA[:10_000] + DATA[90_000:100_000]


def test_get_survives_a_server_that_closes_idle_connections(connection: Connection) -> None:
    # Each connection serves one response that does not say it is the last, and is closed after it.
    listener = socket.create_server(("127.0.0.1", 0))
    head = (
        f"HTTP/1.1 206 P\r\nContent-Range: bytes 0-9/{len(DATA)}\r\nETag: {ETAG}\r\nContent-Length: 10\r\n\r\n".encode()
    )

    def serve() -> None:
        for _ in range(3):
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(head + DATA[:10])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(3):
            into = bytearray(10)
            connection.get(fetch_from(listener.getsockname()[1], 0, 10), memoryview(into))
            assert into == DATA[:10]
    finally:
        listener.close()
        thread.join()


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        (Fault(FaultKind.WHOLE_OBJECT), FailureKind.MALFORMED, "whole object in place of a range"),
        (Fault(FaultKind.WRONG_RANGE), FailureKind.MALFORMED, "Content-Range"),
        (Fault(FaultKind.WRONG_TOTAL), FailureKind.MALFORMED, f"{len(DATA) + 1} bytes now, not {len(DATA)}"),
        (Fault(FaultKind.WRONG_LENGTH, delta=5), FailureKind.MALFORMED, "Content-Length 1000005"),
        (Fault(FaultKind.WRONG_LENGTH, delta=-5), FailureKind.MALFORMED, "Content-Length 999995"),
        (Fault(FaultKind.NO_ETAG), FailureKind.MALFORMED, "(none)"),
        (Fault(FaultKind.OTHER_ETAG), FailureKind.CHANGED, "another-version"),
        (Fault(FaultKind.CLOSE_ON_ACCEPT), FailureKind.BROKEN, "no answer"),
        (Fault(FaultKind.STATUS, status=500), FailureKind.BUSY, "HTTP 500 InternalError"),
        (Fault(FaultKind.STATUS, status=503), FailureKind.BUSY, "HTTP 503 SlowDown"),
        (Fault(FaultKind.STATUS, status=429), FailureKind.BUSY, "HTTP 429"),
        (Fault(FaultKind.STATUS, status=403), FailureKind.DENIED, "HTTP 403 AccessDenied (Access Denied)"),
        (Fault(FaultKind.STATUS, status=403, code="ExpiredToken"), FailureKind.EXPIRED, "ExpiredToken"),
        (Fault(FaultKind.STATUS, status=400, code="ExpiredToken"), FailureKind.EXPIRED, "ExpiredToken"),
        (Fault(FaultKind.STATUS, status=403, code="RequestExpired"), FailureKind.EXPIRED, "RequestExpired"),
        (Fault(FaultKind.STATUS, status=400, code="RequestTimeout"), FailureKind.BUSY, "RequestTimeout"),
        (Fault(FaultKind.STATUS, status=401, code="Unauthorized"), FailureKind.DENIED, "HTTP 401"),
        (Fault(FaultKind.STATUS, status=404), FailureKind.MISSING, "HTTP 404 NoSuchKey"),
        (Fault(FaultKind.STATUS, status=412), FailureKind.CHANGED, "HTTP 412 PreconditionFailed"),
        (Fault(FaultKind.STATUS, status=416), FailureKind.CHANGED, "HTTP 416 InvalidRange"),
        (Fault(FaultKind.STATUS, status=400, code="BadRequest"), FailureKind.REFUSED, "HTTP 400"),
        (Fault(FaultKind.STATUS, status=301, code="PermanentRedirect"), FailureKind.REDIRECTED, "HTTP 301"),
    ],
    ids=lambda value: str(getattr(value, "kind", value)).removeprefix("FaultKind."),
)
def test_get_refuses(connection: Connection, server: FaultServer, fault: Fault, kind: FailureKind, text: str) -> None:
    server.inject(fault)
    failure = failure_of(lambda: get(connection, server))
    assert failure.kind is kind
    assert text in failure.detail
    assert failure.received == 0
    server.inject()
    assert get(connection, server) == DATA[100_000:1_100_000], "the next GET must be on a fresh connection"


def test_get_answered_with_the_whole_object_does_not_read_its_body(connection: Connection, server: FaultServer) -> None:
    server.inject(Fault(FaultKind.WHOLE_OBJECT))
    into = bytearray(1000)
    port = int(server.endpoint_url.rpartition(":")[2])
    failure_of(lambda: connection.get(fetch_from(port, 0, 1000), memoryview(into)))
    assert into == bytes(1000), "bytes of a wrong response were written into the slot"


@pytest.mark.parametrize("kind", [FaultKind.RESET, FaultKind.EARLY_CLOSE])
def test_get_of_a_body_that_breaks_tells_how_far_it_came(
    connection: Connection, server: FaultServer, kind: FaultKind
) -> None:
    server.inject(Fault(kind, after_bytes=600_000))
    into = bytearray(1_000_000)
    port = int(server.endpoint_url.rpartition(":")[2])
    failure = failure_of(lambda: connection.get(fetch_from(port, 0, 1_000_000), memoryview(into)))
    assert failure.kind is FailureKind.BROKEN
    # A reset may throw away what was not read yet; an orderly end does not.
    assert failure.received == 600_000 if kind is FaultKind.EARLY_CLOSE else failure.received <= 600_000
    assert into[: failure.received] == DATA[: failure.received]


def test_get_takes_no_bytes_beyond_the_range(connection: Connection, server: FaultServer) -> None:
    server.inject(Fault(FaultKind.EXTRA_BYTES, at=(1,), delta=100_000))
    assert get(connection, server, 0, 1000) == DATA[:1000]
    assert get(connection, server, 1000, 2000) == DATA[1000:2000]


@pytest.mark.parametrize("kind", [FaultKind.STALL, FaultKind.TRICKLE, FaultKind.DELAY])
def test_get_can_be_aborted_from_another_thread(connection: Connection, server: FaultServer, kind: FaultKind) -> None:
    server.inject(Fault(kind, after_bytes=CHUNK_BYTES, seconds=30.0 if kind is not FaultKind.TRICKLE else 0.05))

    def abort() -> None:
        server.wait_for_requests(1)
        while connection.part != 7:
            pass
        connection.abort(FailureKind.STALLED)

    thread = threading.Thread(target=abort)
    thread.start()
    failure = failure_of(lambda: get(connection, server))
    thread.join()
    assert failure.kind is FailureKind.STALLED
    assert "5 s" in failure.detail
    assert connection.part is None
    assert connection.deadline == float("inf")


@pytest.mark.parametrize("way", ["plain", "tls", "plain by a proxy", "tls by a proxy"])
def test_get_that_is_cut_tells_how_far_it_came_and_its_rest_comes_anew(connection: Connection, way: str) -> None:
    with contextlib.ExitStack() as stack:
        stall = Fault(FaultKind.STALL, at=(1,), after_bytes=600_000, seconds=3600.0)
        server = stack.enter_context(FaultServer({"/b/k": DATA}, [stall], tls="tls" in way))
        port = int(server.endpoint_url.rpartition(":")[2])
        server.put(f"http://127.0.0.1:{port}/b/k", DATA)  # by this name a proxy is asked for it
        proxy = Proxy("127.0.0.1", stack.enter_context(tunnel(port, "tls" in way))) if "proxy" in way else None
        route: dict[str, Any] = {"tls": "tls" in way, "ca_file": str(server.ca_file), "proxy": proxy}
        stack.callback(connection.close)
        into = bytearray(1_000_000)

        def cut() -> None:
            deadline = time.monotonic() + 30.0
            while connection.received < 600_000 and time.monotonic() < deadline:
                pass
            connection.abort(FailureKind.SLOW)

        thread = threading.Thread(target=cut)
        thread.start()
        failure = failure_of(lambda: connection.get(fetch_from(port, 0, 1_000_000, **route), memoryview(into)))
        thread.join()
        assert (failure.kind, failure.received) == (FailureKind.SLOW, 600_000)
        connection.get(fetch_from(port, 600_000, 1_000_000, **route), memoryview(into)[600_000:])
        assert into == DATA[:1_000_000]
        assert len({request.connection for request in server.requests}) == 2


@contextlib.contextmanager
def tunnel(port: int, tls: bool) -> Iterator[int]:
    """A proxy that hands on the bytes of all connections to a server; yields its port."""
    with contextlib.ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as listener:
        threads: list[threading.Thread] = []

        def hand_on(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    target.sendall(data)
            for each in (source, target):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

        def serve() -> None:
            for _ in range(2):
                client = stack.enter_context(listener.accept()[0])
                if tls:
                    assert client.recv(1 << 16).startswith(b"CONNECT ")
                    client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
                server = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                for pair in ((client, server), (server, client)):
                    threads.append(threading.Thread(target=hand_on, args=pair))
                    threads[-1].start()

        acceptor = threading.Thread(target=serve)
        acceptor.start()
        yield listener.getsockname()[1]
        acceptor.join()
        for thread in threads:
            thread.join()


def test_get_that_is_cancelled_before_it_begins_requests_nothing(connection: Connection, server: FaultServer) -> None:
    port = int(server.endpoint_url.rpartition(":")[2])
    failure = failure_of(lambda: connection.get(fetch_from(port, 0, 100), memoryview(bytearray(100)), {7}))
    assert failure.kind is FailureKind.CANCELLED
    assert server.requests == []
    assert connection.part is None


def test_get_that_is_aborted_while_it_connects_requests_nothing(
    connection: Connection, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_and_abort(*arguments: Any) -> socket.socket:
        sock = open_socket(*arguments)
        connection.abort(FailureKind.CANCELLED)
        return sock

    monkeypatch.setattr("mpreader.pool.worker.connection.open_socket", open_and_abort)
    assert failure_of(lambda: get(connection, server)).kind is FailureKind.CANCELLED
    assert server.requests == []


def test_get_sets_a_deadline_for_whoever_watches(connection: Connection, server: FaultServer) -> None:
    server.inject(Fault(FaultKind.STALL, seconds=30.0))
    thread = threading.Thread(target=lambda: failure_of(lambda: get(connection, server)))
    thread.start()
    server.wait_for_requests(1)
    assert connection.deadline < float("inf")
    connection.abort(FailureKind.CANCELLED)
    thread.join()


def test_get_from_a_closed_port_names_it(connection: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    failure = failure_of(lambda: connection.get(fetch_from(port, 0, 10), memoryview(bytearray(10))))
    assert failure.kind is FailureKind.UNREACHABLE
    assert f"127.0.0.1:{port}" in failure.detail
    assert "refused" in failure.detail


def test_get_from_an_unknown_host_names_it(connection: Connection) -> None:
    fetch = fetch_from(80, 0, 10, host="no-such-host.invalid")
    failure = failure_of(lambda: connection.get(fetch, memoryview(bytearray(10))))
    assert failure.kind is FailureKind.UNREACHABLE
    assert "no-such-host.invalid:80" in failure.detail


def test_get_over_tls_wants_the_right_authority(connection: Connection) -> None:
    with FaultServer({"/b/k": DATA}, tls=True) as server, FaultServer({}, tls=True) as other:
        port = int(server.endpoint_url.rpartition(":")[2])
        into = bytearray(300_000)
        trusting = fetch_from(port, 0, 300_000, tls=True, ca_file=str(server.ca_file))
        connection.get(trusting, memoryview(into))
        assert into == DATA[:300_000]
        for ca_file in (str(other.ca_file), None):
            wrong = fetch_from(port, 0, 300_000, tls=True, ca_file=ca_file)
            failure = failure_of(lambda fetch=wrong: connection.get(fetch, memoryview(into)))  # type: ignore[misc]
            assert failure.kind is FailureKind.UNREACHABLE
            assert "CERTIFICATE_VERIFY_FAILED" in failure.detail
        name = fetch_from(port, 0, 300_000, host="127.0.0.2", tls=True, ca_file=str(server.ca_file))
        failure = failure_of(lambda: connection.get(name, memoryview(into)))
        assert failure.kind is FailureKind.UNREACHABLE


def test_get_without_a_pinned_etag_still_pins_the_size(connection: Connection, server: FaultServer) -> None:
    port = int(server.endpoint_url.rpartition(":")[2])
    into = bytearray(10)
    connection.get(fetch_from(port, 0, 10, etag=""), memoryview(into))
    assert into == DATA[:10]
    assert "if-match" not in server.requests[0].headers
    server.put("/b/k", DATA + b"more")
    failure = failure_of(lambda: connection.get(fetch_from(port, 0, 10, etag=""), memoryview(into)))
    assert failure.kind is FailureKind.CHANGED

"""Connections to a host of several addresses, of which some are slow, refuse, or say nothing at all."""

from __future__ import annotations

import contextlib
import http.server
import re
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Final

import pytest

from mpreader.pool.worker.addresses import Address, Addresses
from mpreader.pool.worker.connection import Connection
from mpreader.pool.worker.failure import GetFailed
from mpreader.pool.worker.messages import FailureKind, Fetch
from mpreader.pool.worker.route import Route
from mpreader.pool.worker.version import ObjectVersion

pytestmark = [pytest.mark.timeout(60), pytest.mark.row("one of several addresses is slow, or refuses")]

HOST: Final = "store.test"
DATA: Final = bytes(range(256))
PATIENCE_S: Final = 30.0  # for what comes at once; longer only where something is wrong


class Server(http.server.ThreadingHTTPServer):
    """A server at one address of the host.

    Attributes:
        is_slow: True while requests are not answered.
        waiting: Counts the requests that wait for an answer.
        served: Requests that were answered.
    """

    daemon_threads = False

    def __init__(self, address: str, port: int = 0) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), Handler)
        self.is_slow = False
        self.waiting = threading.Semaphore(0)
        self.served = 0
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # not HTTPServer's, which asks for the name of the address

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()  # waits for the connections, which the client has closed by now


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        if self.server.is_slow:
            self.server.waiting.release()
            self.close_connection = True
            self.rfile.read(1)  # until the client closes the connection
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert match is not None
        start, last = map(int, match.groups())
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{last}/{len(DATA)}")
        self.send_header("Content-Length", str(last + 1 - start))
        self.end_headers()
        self.server.served += 1  # before the client can know of it
        self.wfile.write(DATA[start : last + 1])

    def log_message(self, *_: object) -> None:
        pass


class Bench:
    """A host with several addresses, and connections of one worker to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stack: contextlib.ExitStack) -> None:
        self.stack = stack
        self.found: list[Address] = []  # in the order in which they are tried, as long as none is avoided
        self._addresses = Addresses()
        monkeypatch.setattr("mpreader.pool.worker.transport.addresses", self._addresses)
        monkeypatch.setattr("mpreader.pool.worker.connection.addresses", self._addresses)
        monkeypatch.setattr("mpreader.pool.worker.addresses.os", SimpleNamespace(urandom=lambda _: b""))
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)

    def serve(self, *addresses: str) -> list[Server]:
        """Start a server at each of the addresses; all are found from now on."""
        servers = [Server(address) for address in addresses]
        for server in servers:
            self.stack.callback(server.close)
            self.found.append(server.socket.getsockname())
        return servers

    def swallow(self, address: str) -> Address:
        """Have an address found where no packet is answered."""
        # The kernel answers none where as many connections wait to be accepted as may.
        listener = self.stack.enter_context(socket.create_server((address, 0), backlog=0))
        self.stack.enter_context(socket.socket()).connect(listener.getsockname())
        self.found.append(listener.getsockname())
        return self.found[-1]

    def connection(self, connect_timeout_s: float = PATIENCE_S) -> Connection:
        connection = Connection(connect_timeout_s, PATIENCE_S)
        self.stack.callback(connection.close)
        return connection

    def is_avoided(self, address: Address) -> bool:
        return self._addresses.should_leave(HOST, 80, address)

    def _look_up(self, host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        assert (host, port) == (HOST, 80)
        families = (socket.AF_INET6 if len(address) == 4 else socket.AF_INET for address in self.found)
        return [
            (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address)
            for family, address in zip(families, self.found, strict=True)
        ]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with contextlib.ExitStack() as stack:
        yield Bench(monkeypatch, stack)


def get(connection: Connection, *, tls: bool = False) -> None:
    into = bytearray(100)
    route = Route(tls, HOST, 80, "/key", (("Host", HOST),))
    connection.get(Fetch(7, route, ObjectVersion(len(DATA), ""), 5, 105, 0, 0), memoryview(into))
    assert into == DATA[5:105]


def failure_of(call: Callable[[], object]) -> GetFailed:
    with pytest.raises(GetFailed) as caught:
        call()
    return caught.value


def cut(connection: Connection, is_under_way: Callable[[], object], *, tls: bool = False) -> None:
    """Cut a GET as the coordinator does, once it is under way."""
    failures: list[GetFailed] = []
    thread = threading.Thread(target=lambda: failures.append(failure_of(lambda: get(connection, tls=tls))))
    thread.start()
    is_under_way()
    connection.abort(FailureKind.SLOW)
    thread.join()
    assert [failure.kind for failure in failures] == [FailureKind.SLOW]


def cut_at(server: Server, connection: Connection) -> None:
    server.is_slow = True
    cut(connection, lambda: server.waiting.acquire(timeout=PATIENCE_S))


def _is_connecting(sock: socket.socket) -> bool:
    """True once a socket has sent the first packet of its connection, which is not answered."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == bytes([2])  # TCP_SYN_SENT


def served(servers: Sequence[Server]) -> list[int]:
    return [server.served for server in servers]


def test_address_whose_requests_were_cut_twice_is_left_alone_by_kept_connections_too(bench: Bench) -> None:
    servers = bench.serve("127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5")
    kept, other = bench.connection(), bench.connection()
    get(kept)
    cut_at(servers[0], other)
    servers[0].is_slow = False
    get(kept)
    assert served(servers) == [2, 0, 0, 0], "one slow request says nothing of an address"
    for _ in range(2):
        cut_at(servers[0], other)
    servers[0].is_slow = False
    get(other)
    get(kept)
    assert served(servers) == [2, 2, 0, 0]


def test_address_that_refuses_is_left_alone_at_once(bench: Bench) -> None:
    with socket.create_server(("127.0.0.2", 0)) as unused:
        refusing = unused.getsockname()
    bench.found.append(refusing)
    [good] = bench.serve("127.0.0.3")
    get(bench.connection())
    assert bench.is_avoided(refusing)
    with socket.create_server(refusing) as listener:  # would take the connection, and never answer
        get(bench.connection())
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert good.served == 2


def test_address_that_swallows_packets_is_left_alone_once_its_request_is_cut(bench: Bench) -> None:
    silent = bench.swallow("127.0.0.2")
    [good] = bench.serve("127.0.0.3")
    connection = bench.connection()

    def wait_until_it_connects() -> None:
        while (sock := connection._connecting) is None or not _is_connecting(sock):
            assert time.monotonic() < deadline, "it does not connect"

    deadline = time.monotonic() + PATIENCE_S
    cut(connection, wait_until_it_connects)
    assert bench.is_avoided(silent)
    get(connection)
    assert good.served == 1


def test_address_that_swallows_packets_costs_one_timeout(bench: Bench) -> None:
    bench.swallow("127.0.0.2")
    [good] = bench.serve("127.0.0.3")
    get(bench.connection(connect_timeout_s=0.1))
    # Without a timeout that would end it: the silent one is not tried again.
    get(bench.connection())
    assert good.served == 2


def test_addresses_that_are_all_avoided_are_used_all_the_same(bench: Bench) -> None:
    servers = bench.serve("127.0.0.2", "127.0.0.3")
    connection = bench.connection()
    for server in servers:
        cut_at(server, connection)
        cut_at(server, connection)
        server.is_slow = False
    get(connection)
    get(connection)  # nor does a kept connection leave the one for the other
    assert served(servers) == [2, 0], "the one that was avoided first is used first"


def test_only_address_is_used_however_often_it_was_slow(bench: Bench) -> None:
    [server] = bench.serve("127.0.0.2")
    connection = bench.connection()
    for _ in range(4):
        cut_at(server, connection)
    server.is_slow = False
    get(connection)
    assert server.served == 1


@pytest.mark.skipif(not socket.has_ipv6, reason="this host has no IPv6")
@pytest.mark.parametrize("slow", [0, 1])
def test_addresses_of_both_kinds_take_each_others_place(bench: Bench, slow: int) -> None:
    try:
        servers = bench.serve("::1", "127.0.0.1")
    except OSError:
        pytest.skip("this host has no ::1")
    bench.found.sort(key=lambda address: address != servers[slow].socket.getsockname())
    connection = bench.connection()
    get(connection)
    cut_at(servers[slow], connection)
    cut_at(servers[slow], connection)
    get(connection)
    assert served(servers) == [1, 1]


# -- TLS


def accept(listener: socket.socket, stack: contextlib.ExitStack) -> socket.socket:
    """Accept a connection, and read the first message of TLS."""
    listener.settimeout(PATIENCE_S)
    accepted, _ = listener.accept()
    stack.enter_context(accepted)
    assert accepted.recv(1 << 16)
    return accepted


def test_request_that_is_cut_in_its_tls_handshake_ends_at_once_and_counts_for_its_address(bench: Bench) -> None:
    listener = bench.stack.enter_context(socket.create_server(("127.0.0.2", 0)))
    bench.found += [listener.getsockname(), ("127.0.0.3", 1)]
    connection = bench.connection()
    for _ in range(2):
        assert not bench.is_avoided(listener.getsockname())
        cut(connection, lambda: accept(listener, bench.stack), tls=True)
    assert bench.is_avoided(listener.getsockname())


@pytest.mark.parametrize("is_reset", [False, True], ids=["closes", "resets"])
def test_address_that_breaks_tls_handshakes_is_left_alone(bench: Bench, *, is_reset: bool) -> None:
    listener = bench.stack.enter_context(socket.create_server(("127.0.0.2", 0)))
    bench.found += [listener.getsockname(), ("127.0.0.3", 1)]

    def break_handshake() -> None:
        with contextlib.ExitStack() as stack:
            accepted = accept(listener, stack)
            if is_reset:
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    for _ in range(2):
        assert not bench.is_avoided(listener.getsockname())
        thread = threading.Thread(target=break_handshake)
        thread.start()
        assert failure_of(lambda: get(bench.connection(), tls=True)).kind is FailureKind.UNREACHABLE
        thread.join()
    assert bench.is_avoided(listener.getsockname())

"""A worker's threads, run in this process: the test is the coordinator at one end, and the server at the other."""

from __future__ import annotations

import os
import pickle
import queue
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from mpreader.pool.worker.connection import Connection
from mpreader.pool.worker.main import ConnectionThread, Worker
from mpreader.pool.worker.messages import (
    MAX_MESSAGE_BYTES,
    AskProgress,
    Cancel,
    Failed,
    FailureKind,
    Fetch,
    Fetched,
    MapSegment,
    PartProgress,
    Ping,
    Pong,
    Progress,
    Ready,
    UnmapSegment,
    python_name,
)
from mpreader.pool.worker.route import Route
from mpreader.pool.worker.version import ObjectVersion

DATA: Final = os.urandom(4096)
ETAG: Final = '"1"'
PART_BYTES: Final = 100
SEGMENT: Final = 3
MEMORY: Final = "mpreader-test-of-a-worker"
PATIENCE_S: Final = 30.0  # for what comes at once; longer only where something is wrong


class Server:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(PATIENCE_S)

    def read_request(self) -> int:
        """Returns the number of the part that is requested."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            received = self._sock.recv(4096)
            assert received, "the connection was closed"
            head += received
        match = re.search(rb"Range: bytes=(\d+)-", head)
        assert match is not None
        return int(match[1]) // PART_BYTES

    def respond(self, part: int, nbytes: int = PART_BYTES) -> None:
        start = part * PART_BYTES
        head = (
            f"HTTP/1.1 206 Partial Content\r\nETag: {ETAG}\r\nContent-Length: {PART_BYTES}\r\n"
            f"Content-Range: bytes {start}-{start + PART_BYTES - 1}/{len(DATA)}\r\n\r\n"
        )
        self._sock.sendall(head.encode() + DATA[start : start + nbytes])

    def respond_in_chunks(self, part: int, chunks: tuple[int, ...], rest: int) -> None:
        """Respond with chunks of these sizes, and with the first ``rest`` bytes of one that is much larger."""
        start = position = part * PART_BYTES
        body = b""
        for size in chunks:
            body += b"%x\r\n%b\r\n" % (size, DATA[position : position + size])
            position += size
        head = (
            f"HTTP/1.1 206 Partial Content\r\nETag: {ETAG}\r\nTransfer-Encoding: chunked\r\n"
            f"Content-Range: bytes {start}-{start + PART_BYTES - 1}/{len(DATA)}\r\n\r\n"
        )
        self._sock.sendall(head.encode() + body + b"%x\r\n" % (PART_BYTES - sum(chunks)) + DATA[position:][:rest])

    def serve(self) -> int:
        """Respond to the next request."""
        part = self.read_request()
        self.respond(part)
        return part

    def is_silent(self) -> bool:
        """True if no request is there, and the connection is open."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        self._sock.close()


class _End(BaseException):
    """Ends a connection thread, which in a worker process ends with the process only."""


class _EndingFetch:
    part = -1

    @property
    def segment(self) -> int:
        raise _End


class Bench:
    """A worker with threads, and what it talks to."""

    def __init__(self, connections: int, stall_timeout_s: float = PATIENCE_S) -> None:
        self.servers: queue.Queue[Server] = queue.Queue()  # one for each connection that was opened
        self._opened: list[Server] = []
        self._is_closing = False
        self._sock, self._worker_sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(PATIENCE_S)
        self._parent_end, self._parent = os.pipe()  # readable when the parent is gone, as its pidfd is
        self._memory = os.memfd_create(MEMORY)
        os.ftruncate(self._memory, len(DATA))
        self._worker = Worker(self._worker_sock, [Connection(PATIENCE_S, stall_timeout_s) for _ in range(connections)])
        self.main_thread = threading.Thread(target=self._worker.run, args=(os.getppid(), self._parent_end), daemon=True)
        self.main_thread.start()
        assert self.receive() == Ready(os.getpid(), python_name())
        socket.send_fds(self._sock, [pickle.dumps(MapSegment(SEGMENT, len(DATA)))], [self._memory])

    def open_socket(self, *_: object) -> socket.socket:
        if self._is_closing:
            raise OSError("the test is over")
        ours, theirs = socket.socketpair()
        server = Server(theirs)
        self._opened.append(server)
        self.servers.put(server)
        return ours

    def server(self) -> Server:
        """The server's end of the connection that was opened, or is opened next."""
        return self.servers.get(timeout=PATIENCE_S)

    def occupy(self, part: int) -> Server:
        """Open one more connection with a part; the server's end, with the request read."""
        self.fetch(part)
        server = self.server()
        assert server.read_request() == part
        return server

    def send(self, *messages: object) -> None:
        for message in messages:
            self._sock.send(pickle.dumps(message))

    def fetch(self, *parts: int, segment: int = SEGMENT) -> None:
        route = Route(False, "server", 80, "/key", (("Host", "server"),))
        for part in parts:
            start = part * PART_BYTES
            self.send(Fetch(part, route, ObjectVersion(len(DATA), ETAG), start, start + PART_BYTES, segment, start))

    def receive(self) -> Any:
        """The worker's next message."""
        return pickle.loads(self._sock.recv(MAX_MESSAGE_BYTES))

    def settle(self) -> None:
        """Returns when the worker has acted on all messages that were sent."""
        self.send(Ping())
        assert self.receive() == Pong()

    def progress(self) -> dict[int, PartProgress]:
        """How far the parts are that are being received."""
        self.send(AskProgress())
        progress = self.receive()
        assert isinstance(progress, Progress)
        return {each.part: each for each in progress.parts}

    def wait_for_bytes(self, part: int, count: int) -> PartProgress:
        """Wait until so many bytes of a part are in memory."""
        deadline = time.monotonic() + PATIENCE_S
        while (progress := self.progress()[part]).received < count:
            assert time.monotonic() < deadline, f"{progress.received} of {count} bytes came"
        return progress

    def memory(self) -> bytes:
        return os.pread(self._memory, len(DATA), 0)

    def hang_up(self) -> None:
        """Close the coordinator's end, as far as the worker's main thread can see."""
        self._sock.shutdown(socket.SHUT_WR)

    def end_parent(self) -> None:
        os.write(self._parent, b".")

    def close(self) -> None:
        # The connection threads first, while there is still someone to send to.
        self._is_closing = True
        for server in self._opened:
            server.close()
        for thread in self._worker._threads:
            thread.fetches.put(_EndingFetch())  # type: ignore[arg-type]
            thread.join(PATIENCE_S)
            thread.connection.close()
            assert not thread.is_alive()
        self._sock.close()
        self.main_thread.join(PATIENCE_S)
        assert not self.main_thread.is_alive()
        self._worker_sock.close()
        for fd in (self._parent_end, self._parent, self._memory):
            os.close(fd)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    """Starts a worker with so many connections."""
    run = ConnectionThread.run

    def run_to_its_end(thread: ConnectionThread) -> None:
        with suppress(_End):
            run(thread)

    def end_process(status: int) -> None:
        raise AssertionError("the worker has no coordinator any more, and would have ended this process")

    with ExitStack() as stack:

        def start(connections: int, **options: float) -> Bench:
            bench = Bench(connections, **options)
            stack.callback(bench.close)
            monkeypatch.setattr("mpreader.pool.worker.connection.open_socket", bench.open_socket)
            return bench

        monkeypatch.setattr(ConnectionThread, "run", run_to_its_end)
        monkeypatch.setattr(os, "_exit", end_process)
        yield start


def part(number: int) -> bytes:
    return DATA[number * PART_BYTES : (number + 1) * PART_BYTES]


def test_part_is_received_into_its_place_in_the_segment(start: Callable[..., Bench]) -> None:
    bench = start(connections=2)
    before_s = time.monotonic()
    bench.fetch(7)
    assert bench.server().serve() == 7
    fetched = bench.receive()
    assert isinstance(fetched, Fetched)
    assert (fetched.part, fetched.connection) == (7, 0)
    assert before_s <= fetched.started_s <= fetched.first_byte_s <= fetched.started_s + fetched.seconds
    assert fetched.processor_wait_s >= 0.0
    assert bench.memory() == bytes(7 * PART_BYTES) + part(7) + bytes(len(DATA) - 8 * PART_BYTES)


def test_parts_wait_while_all_connections_are_busy_and_go_on_in_order(start: Callable[..., Bench]) -> None:
    bench = start(connections=2)
    first, second = bench.occupy(1), bench.occupy(2)
    bench.fetch(3, 4)
    bench.settle()
    assert first.is_silent()
    assert second.is_silent()
    second.respond(2)
    assert (second.serve(), second.serve()) == (3, 4)
    first.respond(1)
    assert {bench.receive().part for _ in range(4)} == {1, 2, 3, 4}
    assert bench.servers.empty(), "a third connection was opened"


def test_parts_wait_where_no_more_threads_are_to_be_had(
    start: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = start(connections=3)
    only = bench.occupy(1)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ConnectionThread, "start", refuse)
    bench.fetch(2, 3)
    bench.settle()
    only.respond(1)
    assert (only.serve(), only.serve()) == (2, 3)
    assert {bench.receive().part for _ in range(3)} == {1, 2, 3}
    assert bench.servers.empty()


def test_connection_used_last_is_used_next(start: Callable[..., Bench]) -> None:
    bench = start(connections=3)
    servers = [bench.occupy(number) for number in range(3)]
    for number in (0, 2, 1):
        servers[number].respond(number)
        assert bench.receive().connection == number
    bench.fetch(3, 4, 5)
    assert (servers[1].read_request(), servers[2].read_request(), servers[0].read_request()) == (3, 4, 5)


def test_connections_that_are_not_needed_are_not_opened(start: Callable[..., Bench]) -> None:
    # Each Fetch answers a Fetched: the thread must be idle by then.
    bench = start(connections=2)
    server = bench.occupy(0)
    server.respond(0)
    for number in range(200):
        assert bench.receive().connection == 0
        bench.fetch(number % 40)
        server.serve()
    assert bench.servers.empty()


def test_part_cancelled_before_it_began_is_not_requested(start: Callable[..., Bench]) -> None:
    bench = start(connections=1)
    server = bench.occupy(1)
    bench.fetch(2)
    bench.send(Cancel(2))
    bench.settle()
    server.respond(1)
    fetched, failed = bench.receive(), bench.receive()
    assert isinstance(fetched, Fetched)
    assert (failed.part, failed.kind, failed.received) == (2, FailureKind.CANCELLED, 0)
    assert server.is_silent(), "the connection is kept"


def test_part_cancelled_while_it_is_received_ends_at_once_and_alone(start: Callable[..., Bench]) -> None:
    bench = start(connections=2)
    first, second = bench.occupy(1), bench.occupy(2)
    first.respond(1, nbytes=PART_BYTES // 2)
    bench.send(Cancel(1))
    failed = bench.receive()
    assert (failed.part, failed.kind) == (1, FailureKind.CANCELLED)
    assert failed.received <= PART_BYTES // 2
    assert bench.memory()[PART_BYTES:][: failed.received] == part(1)[: failed.received]
    second.respond(2)
    assert isinstance(bench.receive(), Fetched)
    bench.fetch(3, 4)  # the broken connection is opened anew
    anew = bench.server()  # before either is answered: a thread that is done would take both parts
    requested = {server: server.read_request() for server in (second, anew)}
    assert set(requested.values()) == {3, 4}
    for server, number in requested.items():
        server.respond(number)


def test_cancel_that_comes_too_late_does_no_harm(start: Callable[..., Bench]) -> None:
    bench = start(connections=1)
    server = bench.occupy(1)
    server.respond(1)
    assert isinstance(bench.receive(), Fetched)
    bench.send(Cancel(1))
    bench.fetch(2)
    assert server.serve() == 2
    assert isinstance(bench.receive(), Fetched)


def test_progress_tells_how_far_each_part_is(start: Callable[..., Bench]) -> None:
    bench = start(connections=2)
    assert bench.progress() == {}
    before_s = time.monotonic()
    first = bench.occupy(1)
    bench.occupy(2)
    bench.fetch(3)
    first.respond(1, nbytes=40)
    progress = bench.wait_for_bytes(1, 40)
    assert before_s <= progress.started_s <= progress.first_byte_s <= time.monotonic()
    assert progress.received == 40
    found = bench.progress()
    assert (found[2].received, found[2].first_byte_s) == (0, 0.0)
    assert set(found) == {1, 2}, "a part that waits for a connection is left out"


def test_numbers_of_a_part_that_has_just_ended_are_left_out(start: Callable[..., Bench]) -> None:
    class Ending:
        """A connection that goes on to another part while it is looked at."""

        part, started_s, first_byte_s, deadline = 1, 1.0, 1.5, float("inf")

        @property
        def received(self) -> int:
            self.part = 2
            return 70

    bench = start(connections=1)
    bench.settle()
    bench._worker._threads.append(SimpleNamespace(connection=Ending()))  # type: ignore[arg-type]
    try:
        assert bench.progress() == {}
    finally:
        bench._worker._threads.clear()


def test_slow_part_is_cut_and_its_rest_comes_by_a_new_connection(start: Callable[..., Bench]) -> None:
    bench = start(connections=1)
    slow = bench.occupy(1)
    slow.respond(1, nbytes=40)
    bench.wait_for_bytes(1, 40)
    bench.send(Cancel(1, FailureKind.SLOW))
    failed = bench.receive()
    assert (failed.part, failed.kind, failed.received) == (1, FailureKind.SLOW, 40)
    assert bench.memory()[PART_BYTES:][:40] == part(1)[:40]
    bench.fetch(1)
    assert bench.server().serve() == 1
    assert isinstance(bench.receive(), Fetched)


def test_slow_part_of_a_chunked_body_is_cut_where_its_bytes_end(start: Callable[..., Bench]) -> None:
    bench = start(connections=1)
    server = bench.occupy(1)
    server.respond_in_chunks(1, (10, 30), rest=7)
    bench.wait_for_bytes(1, 47)
    bench.send(Cancel(1, FailureKind.SLOW))
    assert bench.receive().received == 47
    assert bench.memory()[PART_BYTES:][:PART_BYTES] == part(1)[:47] + bytes(PART_BYTES - 47)


@pytest.mark.parametrize("has_begun", [True, False])
def test_cut_of_a_part_that_has_ended_does_not_strike_it_when_it_is_sent_again(
    start: Callable[..., Bench], *, has_begun: bool
) -> None:
    bench = start(connections=1)
    server = bench.occupy(1)
    if has_begun:
        server.respond(1)
        assert isinstance(bench.receive(), Fetched)
        number = 1
    else:
        number = 2
        bench.fetch(number)
    bench.send(Cancel(number, FailureKind.SLOW))
    if has_begun:
        bench.fetch(number)
    else:
        server.respond(1)
        assert isinstance(bench.receive(), Fetched)
    assert server.serve() == number
    fetched = bench.receive()
    assert (type(fetched), fetched.part) == (Fetched, number)


def test_connection_that_brings_nothing_is_ended_after_the_stall_timeout(start: Callable[..., Bench]) -> None:
    bench = start(connections=1, stall_timeout_s=0.05)
    bench.fetch(1)
    failed = bench.receive()
    assert (failed.part, failed.kind, failed.first_byte_s) == (1, FailureKind.STALLED, 0.0)
    assert failed.seconds >= 0.05


def test_bug_reaches_the_coordinator_and_ends_no_thread(start: Callable[..., Bench]) -> None:
    bench = start(connections=1)
    bench.fetch(1, segment=SEGMENT + 1)  # a coordinator would never send this
    failed = bench.receive()
    assert isinstance(failed, Failed)
    assert (failed.part, failed.kind, failed.detail) == (
        1,
        FailureKind.REFUSED,
        f"worker error: KeyError: {SEGMENT + 1}",
    )
    assert bench.occupy(2) is not None


@pytest.mark.parametrize("is_received", [True, False])
def test_segment_is_unmapped_when_the_coordinator_says_so(start: Callable[..., Bench], is_received: bool) -> None:
    bench = start(connections=1)
    server = bench.occupy(1)
    if is_received:
        server.respond(1)
    else:
        bench.send(Cancel(1))
    bench.receive()
    assert MEMORY in Path("/proc/self/maps").read_text()
    bench.send(UnmapSegment(SEGMENT))
    bench.settle()
    assert MEMORY not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("how", ["closes its end", "is gone"])
def test_worker_ends_with_its_coordinator_whatever_its_threads_do(start: Callable[..., Bench], how: str) -> None:
    bench = start(connections=1)
    bench.occupy(1)
    if how == "is gone":
        bench.end_parent()
    else:
        bench.hang_up()
    bench.main_thread.join(PATIENCE_S)
    assert not bench.main_thread.is_alive()

"""Fault server: serves ranges as S3 does, and injects network faults by schedule, for tests of a client.

It runs in threads of the calling process, speaks HTTP/1.1 with keep-alive, plain or TLS, and answers GET and HEAD
as S3 does (Range, If-Match, ETag, error bodies; no signatures, no listing). This module is responsible for connections
and for the faults that break them; :mod:`mpreader.testing.response` makes the responses::

    data = os.urandom(1 << 20)
    fault = Fault(FaultKind.RESET, at=(1, 3), after_bytes=1000)
    with FaultServer({"/bucket/key": data}, faults=[fault]) as server:
        [view] = mpreader.fetch_ranges(server.url("/bucket/key"), [(0, len(data))])
        assert view == data
        assert any(request.fault is fault for request in server.requests)
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from mpreader.testing.certificate import LoopbackCertificate, server_context
from mpreader.testing.fault import Fault, FaultKind, Schedule
from mpreader.testing.response import Content, Request, StoredObject, byte_range, read_request, respond
from mpreader.testing.s3_server import aws_environment

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FaultServer", "FaultedRequest"]

_CHUNK_BYTES: Final = 256 * 1024
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # struct linger: on, for 0 seconds
# Kinds that strike within the body, whose first after_bytes are sent before.
_CUT_KINDS: Final = frozenset(
    {FaultKind.RESET, FaultKind.EARLY_CLOSE, FaultKind.STALL, FaultKind.TRICKLE, FaultKind.SLOW}
)
# Bytes that come at one time of a body that comes slowly.
_SLOW_STEPS: Final = {FaultKind.TRICKLE: 1, FaultKind.SLOW: 4096}


@dataclass(frozen=True, slots=True)
class FaultedRequest:
    """One request that the server got.

    Attributes:
        method: ``"GET"``, ``"HEAD"``, …
        path: Percent-decoded path without the query.
        range: The Range header; None if there was none.
        headers: All headers, names in lower case.
        connection: Number of the connection that it came on, from 1.
        status: Status of the response.
        fault: The fault that struck it; None if it was answered well.
    """

    method: str
    path: str
    range: str | None
    headers: Mapping[str, str] = field(repr=False)
    connection: int
    status: int
    fault: Fault | None


class FaultServer:
    """Serves objects from memory or files on the loopback address, and injects faults. A context manager.

    Args:
        objects: The objects by their paths: ``{"/bucket/key": bytes or Path}``. Not copied, so don't change them.
        faults: The schedule of faults; see :class:`Fault`. :meth:`inject` replaces it.
        tls: Speak https, with a certificate of its own authority; see :attr:`ca_file`. Needs ``trustme``.
        bytes_per_s: Most bytes per second on one connection, such as S3's 90e6; None: no limit.
    """

    def __init__(
        self,
        objects: Mapping[str, Content],
        faults: Sequence[Fault] = (),
        *,
        tls: bool = False,
        bytes_per_s: float | None = None,
    ) -> None:
        self._objects = {path: StoredObject.of(content) for path, content in objects.items()}
        self._versions = dict.fromkeys(objects, 0)  # number of the newest version of each object
        self._staged: dict[str, StoredObject] = {}
        self._schedule = Schedule(faults)
        self._certificate = LoopbackCertificate() if tls else None
        self._bytes_per_s = bytes_per_s
        self._closing = threading.Event()  # set once, by close(); ends all pauses
        self._changed = threading.Condition()  # guards _requests, and is notified of each new one
        self._requests: list[FaultedRequest] = []
        # Open connections by number, with their threads, so that close() can end both.
        self._connections: dict[int, tuple[socket.socket, threading.Thread]] = {}
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None

    @property
    def endpoint_url(self) -> str:
        """URL of the server, ``http://127.0.0.1:<port>``; an S3 endpoint for GET and HEAD."""
        if self._listener is None:
            raise RuntimeError("the server is not running; enter its context first")
        scheme = "http" if self._certificate is None else "https"
        return f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def ca_file(self) -> Path | None:
        """PEM file of the authority that a client must trust; None without TLS. It is there until :meth:`close`."""
        return None if self._certificate is None else self._certificate.ca_file

    @property
    def requests(self) -> list[FaultedRequest]:
        """All requests since the start, in the order in which they came."""
        with self._changed:
            return list(self._requests)

    def url(self, path: str) -> str:
        """The URL of the object at ``path``."""
        return self.endpoint_url + quote(path)

    def environment(self) -> dict[str, str]:
        """The environment variables that point boto3, and all that is built on it, here."""
        return aws_environment(self.endpoint_url, self.ca_file)

    def put(self, path: str, content: Content, headers: Mapping[str, str] | None = None) -> None:
        """Make or overwrite an object; responses under way go on with the old one.

        Args:
            path: Its path.
            content: Its bytes.
            headers: Headers of all responses about it, such as ``{"Content-Encoding": "gzip"}``. ETag and Last-Modified
                take the place of the usual ones: ``{"ETag": 'W/"1"'}``; "" leaves one out.
        """
        # One assignment, without a lock: a request finds either the old object or the new one.
        self._objects[path] = self._next_version(path, content, headers)

    def stage(self, path: str, content: Content, headers: Mapping[str, str] | None = None) -> None:
        """Keep an object ready, by which a fault of the kind OVERWRITTEN will replace the one at ``path``."""
        self._staged[path] = self._next_version(path, content, headers)

    def inject(self, *faults: Fault) -> None:
        """Follow this schedule from now on, counting from 1 again; without arguments: inject no faults."""
        self._schedule = Schedule(faults)

    def wait_for_requests(self, count: int, timeout_s: float = 30.0) -> None:
        """Block until ``count`` requests have come since the start.

        Raises:
            TimeoutError: Fewer have come in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._requests) >= count, timeout_s):
                raise TimeoutError(f"{len(self._requests)} of {count} requests came in {timeout_s} s")

    def start(self) -> None:
        """Listen, and answer from threads of this process."""
        context = None if self._certificate is None else server_context(self._certificate.server_file)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._acceptor = threading.Thread(target=self._accept, args=(self._listener, context), daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Drop all connections, end all stalls, wait for the threads. Idempotent."""
        self._closing.set()
        if self._listener is not None and self._acceptor is not None:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() alone does not
            self._acceptor.join()
            self._listener.close()
            self._listener = self._acceptor = None
        for connection, thread in list(self._connections.values()):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()
        if self._certificate is not None:
            self._certificate.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "not running" if self._listener is None else self.endpoint_url
        return f"<FaultServer {state}, {len(self._objects)} objects, {len(self._requests)} requests>"

    def _next_version(self, path: str, content: Content, headers: Mapping[str, str] | None) -> StoredObject:
        number = self._versions[path] = self._versions.get(path, -1) + 1
        return StoredObject.of(content, headers, number)

    def _accept(self, listener: socket.socket, context: ssl.SSLContext | None) -> None:
        for number in itertools.count(1):
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # close() has shut the listener down
            # Read anew for each connection, since inject() replaces the schedule.
            if self._schedule.strike(lambda fault: fault.kind is FaultKind.CLOSE_ON_ACCEPT):
                connection.close()
                continue
            thread = threading.Thread(target=self._serve, args=(connection, context, number), daemon=True)
            self._connections[number] = (connection, thread)
            thread.start()

    def _serve(self, plain: socket.socket, context: ssl.SSLContext | None, number: int) -> None:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            connection = stack.enter_context(plain)
            # Head and body are sent one after the other: Nagle's algorithm would hold the body back.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is not None:
                # A duplicate is wrapped: wrapping detaches its socket, but close() must be able to shut down this one.
                connection = stack.enter_context(context.wrap_socket(plain.dup(), server_side=True))
            stream = stack.enter_context(connection.makefile("rb"))
            while (request := read_request(stream)) is not None and self._answer(connection, number, request):
                pass
        del self._connections[number]

    def _answer(self, connection: socket.socket, number: int, request: Request) -> bool:
        """Answer one request; False if the connection must be closed then."""
        stored = self._objects.get(request.path)
        fault = self._schedule.strike(lambda candidate: _matches(candidate, request, stored))
        if fault is not None and fault.kind is FaultKind.OVERWRITTEN:
            stored = self._objects[request.path] = self._staged[request.path]
        response = respond(request, stored, fault)
        entry = FaultedRequest(
            request.method, request.path, request.headers.get("range"), request.headers, number, response.status, fault
        )
        # Logged before anything is sent: a client that has its response must find the request in the list.
        with self._changed:
            self._requests.append(entry)
            self._changed.notify_all()
        if fault is not None and fault.kind is FaultKind.DELAY:
            self._pause(fault.seconds)
        connection.sendall(response.head())
        if fault is None or fault.kind not in _CUT_KINDS:
            self._send(connection, response.body)
            # The client can't tell where the next response would begin.
            misframed = fault is not None and fault.kind in (FaultKind.WRONG_LENGTH, FaultKind.EXTRA_BYTES)
            return not misframed and request.method in ("GET", "HEAD")
        unchanged = fault.unchanged_bytes(len(response.body))
        self._send(connection, response.body[:unchanged])
        return self._break(connection, response.body[unchanged:], fault)

    def _break(self, connection: socket.socket, rest: memoryview, fault: Fault) -> bool:
        """Do what a fault does within a body; False if the connection must be closed then."""
        if fault.kind is FaultKind.RESET:
            # The caller closes the connection, which now sends RST instead of FIN.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        elif fault.kind is FaultKind.STALL:
            self._pause(fault.seconds)
            self._send(connection, rest)
        elif (step := _SLOW_STEPS.get(fault.kind)) is not None:
            for position in range(0, len(rest), step):
                self._pause(fault.seconds)
                connection.sendall(rest[position : position + step])
        return fault.kind is FaultKind.STALL or fault.kind in _SLOW_STEPS

    def _send(self, connection: socket.socket, body: memoryview) -> None:
        """Send a body, no faster than ``bytes_per_s``."""
        if self._bytes_per_s is None:
            connection.sendall(body)
            return
        # Each chunk waits for its time since the start, not for a fixed time after the one before, so that a chunk that
        # was late does not lower the rate.
        started = time.monotonic()
        for sent in range(0, len(body), _CHUNK_BYTES):
            connection.sendall(body[sent : sent + _CHUNK_BYTES])
            due = started + (sent + len(body[sent : sent + _CHUNK_BYTES])) / self._bytes_per_s
            self._pause(max(due - time.monotonic(), 0))

    def _pause(self, seconds: float) -> None:
        """Sleep, but no longer than until :meth:`close` is called: no stall may delay the end of a test.

        Raises:
            ConnectionAbortedError: The server is being closed.
        """
        if self._closing.wait(seconds):
            raise ConnectionAbortedError("the server is being closed")


def _matches(fault: Fault, request: Request, stored: StoredObject | None) -> bool:
    """True if the request is one that the fault counts."""
    if fault.kind is FaultKind.CLOSE_ON_ACCEPT or fault.method != request.method:
        return False
    if fault.path is not None and fault.path != request.path:
        return False
    if fault.covering is None:
        return True
    if stored is None:
        return False
    # Without a Range header, or with one that S3 ignores, all bytes are asked for.
    asked = byte_range(request.headers.get("range"), len(stored.data))
    return fault.covering in (range(len(stored.data)) if asked is None else asked)

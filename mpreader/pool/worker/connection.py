"""Connection of a worker: ranged GETs, one at a time, whose bodies are received straight into shared memory.

Used by the connection threads of :mod:`~mpreader.pool.worker.main`. The only place where errors of sockets, TLS and
HTTP become a ``GetFailed``; opening a socket is done by :mod:`~mpreader.pool.worker.transport`, checking a response by
:mod:`~mpreader.pool.worker.failure`. It does not retry, which is the coordinator's decision, with the one exception
drawn here: the steps of a GET, and the kind of failure that each may end in.

    idle: ``part`` is None, ``deadline`` infinite; perhaps a socket is kept open
      │ get()
      ▼
    cancelled before it began? ─────────────── yes: CANCELLED, the socket is kept
      │ no
      ▼
    a socket to the same server is open, and nothing came in while it was idle?
      │ no: connect (address, TCP, proxy, TLS) ────── UNREACHABLE
      ▼
    send the request, read the head of the response ─ BROKEN; on a kept socket: connect, and request once more.
      │                                               A server may close an idle connection at any moment, also just now
      ▼
    check status, range, version and length ───────── BUSY, EXPIRED, DENIED, MISSING, CHANGED, MALFORMED, REFUSED
      ▼
    receive the body, and count its bytes ─────────── BROKEN, MALFORMED; the bytes received so far are reported
      │
      ▼
    idle: the socket is kept, unless the server said that it closes

Two things end a GET from outside, at any step, by a call of ``abort`` in the main thread: a Cancel message (CANCELLED),
and a deadline that has passed (STALLED). The deadline is moved when the GET begins, when the request is sent, and with
every :data:`CHUNK_BYTES` that arrive. Every failure but the first closes the socket: what is left of a response that
was refused must not be taken for the start of the next one.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from typing import TYPE_CHECKING, Final

from mpreader.pool.worker.failure import GetFailed, check_response
from mpreader.pool.worker.http import HttpSocket, MalformedResponse, Response
from mpreader.pool.worker.messages import FailureKind, Fetch
from mpreader.pool.worker.route import Route
from mpreader.pool.worker.transport import host_and_port, open_socket

if TYPE_CHECKING:
    from collections.abc import Container

__all__ = ["Connection"]

# Bytes received between two looks at the clock, and so the least that a connection must bring per stall timeout.
CHUNK_BYTES: Final = 256 * 1024


class Connection:
    """Keep-alive connection to one server at a time.

    Owned by one thread, the only one that may call ``get`` and ``close``. Another thread may call ``abort`` and read
    ``part`` and ``deadline``.

    Args:
        connect_timeout_s: Longest wait for each step of connecting.
        stall_timeout_s: Longest wait for a response, and for each :data:`CHUNK_BYTES` of a body.

    Attributes:
        part: Number of the part that is being received; None while idle.
        deadline: Time by which the response or the next chunk must be there, by the monotonic clock; infinite while
            idle. It is only stated here; whoever watches it calls ``abort``.
        first_byte_s: Time at which the response to the last GET began, by the same clock; 0 if there was none.
    """

    def __init__(self, connect_timeout_s: float, stall_timeout_s: float) -> None:
        self.part: int | None = None
        self.deadline = float("inf")
        self.first_byte_s = 0.0
        self._connect_timeout_s = connect_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._http: HttpSocket | None = None
        self._origin: object = None  # of _http, which is used again only for an equal one
        # Written by `abort`, in another thread; cleared when a GET begins.
        self._abort_reason: FailureKind | None = None

    def abort(self, reason: FailureKind) -> None:
        """Make the GET in progress, if any, fail soon with ``reason``.

        Called from another thread than the owner's. It may strike the next GET of this connection, if the one that was
        meant ends at this moment: the coordinator must retry a part that fails as CANCELLED though it is still wanted.
        """
        # The reason first, then the socket; `_request` does it the other way round. So a socket that is opened at this
        # moment is either seen here, or `_request` sees the reason.
        self._abort_reason = reason
        http = self._http
        if http is not None:
            # Not close: the descriptor's number could be given to another file while the owner still receives from it.
            # Not SSLSocket's own method either: it takes away the TLS state that the owner is reading with.
            with contextlib.suppress(OSError):  # the owner has closed it already
                socket.socket.shutdown(http.sock, socket.SHUT_RDWR)

    def get(self, fetch: Fetch, into: memoryview, cancelled: Container[int] = ()) -> None:
        """Receive a part.

        Args:
            fetch: Part to receive.
            into: Memory to receive into; its length is the part's. It is written to only before this returns or
                raises.
            cancelled: Numbers of the parts that are not wanted any more, perhaps this one; another thread adds to it.

        Raises:
            GetFailed: The part was not, or not wholly, received. The first ``received`` bytes of ``into`` are right.
        """
        self._abort_reason = None
        self.first_byte_s = 0.0
        self._extend_deadline()
        self.part = fetch.part
        try:
            # After `part` was set, so that no Cancel is lost: one that comes later finds the part here, and aborts it.
            if fetch.part in cancelled:
                raise GetFailed(FailureKind.CANCELLED, "cancelled")
            self._get_or_close(fetch, into)
        finally:
            self.part = None
            self.deadline = float("inf")

    def close(self) -> None:
        """Close the socket, if one is open; the next GET opens a new one."""
        http, self._http = self._http, None
        if http is not None:
            http.close()

    # -- steps of a GET, all in the owner's thread

    def _get_or_close(self, fetch: Fetch, into: memoryview) -> None:
        try:
            self._get(fetch, into)
        except GetFailed as failure:
            self.close()
            if self._abort_reason is not None:  # the failure only shows that the socket was shut down
                raise self._aborted(self._abort_reason, failure.received) from None
            raise

    def _get(self, fetch: Fetch, into: memoryview) -> None:
        is_reused = self._is_reusable(fetch.route)
        try:
            response = self._request(fetch, is_reused)
        except GetFailed as failure:
            if not is_reused or failure.kind is not FailureKind.BROKEN or self._abort_reason is not None:
                raise
            response = self._request(fetch, is_reused=False)
        self.first_byte_s = time.monotonic()
        check_response(response, fetch)
        self._receive(response, into)
        if response.will_close:
            self.close()

    def _is_reusable(self, route: Route) -> bool:
        if self._http is None or self._http.has_unread_bytes or self._origin != _origin(route):
            return False
        # Readable while idle: the server has closed it, or sent bytes that belong to no request.
        poll = select.poll()
        poll.register(self._http.sock, select.POLLIN)
        return not poll.poll(0)

    def _request(self, fetch: Fetch, is_reused: bool) -> Response:
        if not is_reused:
            self.close()
            self._http = self._connect(fetch.route)
            self._origin = _origin(fetch.route)
        http = self._http
        assert http is not None  # for the type checker
        if self._abort_reason is not None:  # it came before there was a socket for `abort` to shut down
            raise GetFailed(FailureKind.BROKEN, "aborted")
        try:
            self._extend_deadline()
            http.send_request("GET", _target(fetch.route), _headers(fetch))
            return http.read_response()
        except (OSError, MalformedResponse) as error:
            raise GetFailed(FailureKind.BROKEN, f"no answer: {_text_of(error)}") from None

    def _connect(self, route: Route) -> HttpSocket:
        try:
            # Twice the stall timeout: the watch on `deadline` should be the one that ends a stalled GET, and name it.
            return HttpSocket(open_socket(route, self._connect_timeout_s, 2 * self._stall_timeout_s))
        except (OSError, MalformedResponse, ValueError) as error:
            raise GetFailed(FailureKind.UNREACHABLE, f"{_server_name(route)}: {_text_of(error)}") from None

    def _receive(self, response: Response, into: memoryview) -> None:
        # Each receive is for all of the rest, and what arrived is counted at once: if the body breaks, no byte that
        # the kernel had is lost, and the part is resumed right behind it.
        received, wanted, next_check = 0, len(into), CHUNK_BYTES
        try:
            while received < wanted:
                count = response.receive_into(into[received:])
                if not count:  # a body may end early without any error
                    raise GetFailed(FailureKind.BROKEN, f"the body ended after {received} of {wanted} bytes", received)
                received += count
                if received >= next_check:
                    self._extend_deadline()
                    next_check = received + CHUNK_BYTES
            # The length of a chunked body is known only at its end, which also has to be read for the next response.
            if response.is_chunked and response.read(1):
                raise GetFailed(FailureKind.MALFORMED, "more bytes than asked for")
        except (OSError, MalformedResponse) as error:
            detail = f"the body broke after {received} of {wanted} bytes: {_text_of(error)}"
            raise GetFailed(FailureKind.BROKEN, detail, received) from None

    def _extend_deadline(self) -> None:
        self.deadline = time.monotonic() + self._stall_timeout_s

    def _aborted(self, reason: FailureKind, received: int) -> GetFailed:
        if reason is FailureKind.STALLED:
            return GetFailed(reason, f"less than {CHUNK_BYTES} bytes in {self._stall_timeout_s:g} s", received)
        return GetFailed(reason, "cancelled", received)


# -- the request


def _origin(route: Route) -> object:
    """Everything that two routes must have in common to share a connection."""
    return (route.tls, route.host, route.port, route.proxy, route.ca_file)


def _target(route: Route) -> str:
    if route.proxy is None or route.tls:  # through a tunnel, the server itself is spoken to
        return route.target
    return f"http://{host_and_port(route)}{route.target}"


def _headers(fetch: Fetch) -> list[tuple[str, str]]:
    headers = [*fetch.route.headers, ("Range", f"bytes={fetch.start}-{fetch.end - 1}"), ("Accept-Encoding", "identity")]
    if fetch.etag:
        headers.append(("If-Match", fetch.etag))
    if fetch.route.proxy is not None and not fetch.route.tls:  # with TLS the proxy got them with CONNECT
        headers.extend(fetch.route.proxy.headers)
    return headers


def _server_name(route: Route) -> str:
    server = f"{route.host}:{route.port}"
    return server if route.proxy is None else f"{server} through proxy {route.proxy.host}:{route.proxy.port}"


def _text_of(error: BaseException) -> str:
    return str(error) or type(error).__name__

"""Connection of a worker: ranged GETs, one at a time, whose bodies are received straight into shared memory.

Used by the connection threads of :mod:`~mpreader.pool.worker.main`. This is the only place where errors of sockets, TLS
and HTTP become a ``GetFailed``. A socket is opened by :mod:`~mpreader.pool.worker.transport`, a response is checked by
:mod:`~mpreader.pool.worker.failure`. It must not retry, which is the coordinator's decision, except in the two
cases that are drawn here, a kept connection and a refused If-Match. The steps of a GET, and the kinds of failure that
each step may end in:

    idle: ``part`` is None, ``deadline`` is infinite; a socket may be kept open
      │ get()
      ▼
    cancelled before it began? ─────────────── yes: CANCELLED, the socket is kept
      │ no
      ▼
    a socket to the same server is open, and nothing was received while it was idle?
      │ no: connect (address, TCP, proxy, TLS) ────── UNREACHABLE
      ▼
    send the request, read the head of the response ─ MALFORMED; BROKEN, but on a kept socket: connect, and request
      │                                               once more, since the server may have closed the idle connection
      ▼
    check status, range, version and length ───────── BUSY, EXPIRED, DENIED, REDIRECTED, MISSING, CHANGED, MALFORMED,
      │                                               REFUSED; where that may be for If-Match only: request once more
      ▼                                               without it
    receive the body, and count its bytes ─────────── BROKEN, MALFORMED; the bytes received so far are reported
      │
      ▼
    idle: the socket is kept, unless the server announced that it closes the connection

The main thread can end a GET at any step by a call of ``abort``: after a Cancel message (CANCELLED), or when the
deadline has passed (STALLED). The deadline is moved when the GET begins, when the request is sent, and with every
:data:`CHUNK_BYTES` that arrive. Every failure except a cancel before the beginning closes the socket, so that the rest
of a refused response can't be taken for the start of the next one.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from typing import TYPE_CHECKING, Final

from mpreader.pool.worker.destination import Destination
from mpreader.pool.worker.failure import GetFailed, check_response, is_condition_refused
from mpreader.pool.worker.http import ConnectionEnded, HttpSocket, MalformedResponse, Response
from mpreader.pool.worker.messages import FailureKind, Fetch, Shorten
from mpreader.pool.worker.route import Route
from mpreader.pool.worker.transport import address_of, addresses, host_and_port, open_socket, server_of
from mpreader.pool.worker.version import Validators, is_strong

if TYPE_CHECKING:
    from collections.abc import Container

    from mpreader.pool.worker.addresses import Address

__all__ = ["Connection"]

# The deadline is moved whenever this many bytes have arrived, so a connection must bring at least this much in each
# stall timeout. A smaller value would cost more looks at the clock.
CHUNK_BYTES: Final = 256 * 1024
# Servers, by origin, that refuse If-Match though the object is the right one. All threads of a worker share it without
# a lock: entries are only added, and one that is missing costs no more than another request.
_refuse_if_match: Final[set[object]] = set()
# Servers that have answered a request with it, or refuse those without it, too.
_take_if_match: Final[set[object]] = set()
_MOST_ORIGINS: Final = 256
# Kinds of failure for which another address may be better.
_STRIKES: Final = frozenset({FailureKind.SLOW, FailureKind.STALLED, FailureKind.BROKEN})


class Connection:
    """Keep-alive connection to one server at a time.

    A connection thread owns it, and only the owner may call ``get`` and ``close``. The main thread may call ``abort``,
    and read the attributes. There is no lock: each attribute is written by one assignment, and the order of
    the assignments is what makes it safe (see the comments there).

    Args:
        connect_timeout_s: Longest wait for each step of connecting.
        stall_timeout_s: Longest wait for a response, and for each :data:`CHUNK_BYTES` of a body.

    Attributes:
        part: Number of the part that is being received; None while idle.
        deadline: Time by which the response, or the next chunk of its body, must have arrived, by the monotonic clock;
            infinite while idle. It is only recorded here: the main thread compares it with the clock, and calls
            ``abort``.
        started_s: Time at which the last GET began, by the same clock.
        first_byte_s: Time at which the response to the last GET began; 0 if there was none.
        received: Bytes of the last GET that are in memory.
        found: Validators of the response to the last GET, if it was accepted, that the expected version does not have.
    """

    def __init__(self, connect_timeout_s: float, stall_timeout_s: float) -> None:
        self.part: int | None = None
        self.deadline = float("inf")
        self.started_s = 0.0
        self.first_byte_s = 0.0
        self.received = 0
        self.found: Validators = ()
        self._connect_timeout_s = connect_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._http: HttpSocket | None = None
        self._shortened: Shorten | None = None
        self._connecting: socket.socket | None = None  # the socket while it connects, before _http has it
        self._address: Address | None = None  # the one that _http is connected to
        self._origin: object = None  # origin of _http, which is used again only for routes of an equal origin
        # Written by `abort` in the main thread; cleared by the owner when a GET begins.
        self._abort_reason: FailureKind | None = None

    def abort(self, reason: FailureKind) -> None:
        """Make the GET in progress, if any, fail soon with ``reason``.

        Called by another thread than the owner. If the GET that is meant ends at this moment, the next GET of this
        connection may be aborted in its place: the coordinator must retry a part that fails as CANCELLED though it is
        still wanted.
        """
        # First write the reason, then read the socket; `_request` first writes the socket, then reads the reason. So
        # if a socket is opened at this moment, either it is seen here, or `_request` sees the reason.
        self._abort_reason = reason
        http, connecting = self._http, self._connecting
        sock = http.sock if http is not None else connecting
        if sock is not None:
            # Not close(): the descriptor's number could be given to another file while the owner still receives from
            # it. Not SSLSocket.shutdown() either: it drops the TLS state that the owner is reading with.
            with contextlib.suppress(OSError):  # the owner may have closed the socket already
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def shorten(self, message: Shorten) -> None:
        """Make the GET in progress end earlier, if it is for the part that is meant, and not past that place.

        Called by another thread than the owner.
        """
        # Stored with the part's number, which the owner compares: it may just begin another part.
        self._shortened = message

    def get(self, fetch: Fetch, into: memoryview, cancelled: Container[int] = ()) -> None:
        """Receive a part.

        Args:
            fetch: Part to receive.
            into: Memory to receive into; its length is that of what is kept of the part. Nothing is written to it after
                this has returned or raised.
            cancelled: Numbers of the parts that are not wanted any more. The main thread may add this part to it at any
                time.

        Raises:
            GetFailed: The part was not, or not wholly, received, and that was not for ``shorten``. Its first
                ``received`` bytes, without those that are skipped, are in ``into``, and right.
        """
        self._abort_reason = None
        self.started_s = time.monotonic()
        self.first_byte_s = 0.0
        self.received = 0
        self.found = ()
        self._shortened = None
        self._extend_deadline()
        # Last: whoever reads the attributes of this part must not read those of the one before it.
        self.part = fetch.part
        try:
            # Checked after `part` was set, so that no Cancel is lost: if the Cancel comes after this check, the main
            # thread finds the part here and calls abort().
            if fetch.part in cancelled:
                raise GetFailed(FailureKind.CANCELLED, "cancelled")
            self._get_or_close(fetch, into)
        finally:
            self.part = None
            self.deadline = float("inf")

    def close(self) -> None:
        """Close the socket, if one is open; the next GET opens a new one."""
        http, self._http, self._address = self._http, None, None
        if http is not None:
            http.close()

    # -- steps of a GET, all in the owner's thread

    def _get_or_close(self, fetch: Fetch, into: memoryview) -> None:
        try:
            self._get(fetch, into)
        except GetFailed as failure:
            address = self._address
            self.close()
            # After abort() the failure is only the consequence of the shut-down socket: report the reason instead.
            if self._abort_reason is not None:
                failure = self._aborted(self._abort_reason, failure.received)
            if failure.kind in _STRIKES:
                addresses.struck(address)
            raise failure from None

    def _get(self, fetch: Fetch, into: memoryview) -> None:
        origin = _origin(fetch.route)
        is_conditional = is_strong(fetch.version.etag) and origin not in _refuse_if_match
        try:
            response = self._accepted(fetch, is_conditional)
            if is_conditional:
                _add(_take_if_match, origin)
        except GetFailed as failure:
            if not is_conditional or not is_condition_refused(failure, origin in _take_if_match):
                raise
            if self._abort_reason is not None:
                raise
            self.close()
            try:
                # If the object was overwritten, this raises an error that names the new version.
                response = self._accepted(fetch, is_conditional=False)
            except GetFailed:
                _add(_take_if_match, origin)
                raise
            _add(_refuse_if_match, origin)
        self._receive(response, fetch, into)
        addresses.served(self._address)
        if response.will_close or self.received < fetch.end - fetch.start:
            self.close()

    def _accepted(self, fetch: Fetch, is_conditional: bool) -> Response:
        """Request a part, and accept the head of the response or raise GetFailed."""
        is_reused = self._is_reusable(fetch.route)
        try:
            response = self._request(fetch, is_reused, is_conditional)
        except GetFailed as failure:
            # On a new connection, and after abort(), it is a real failure. A kept connection may have been closed by
            # the server while the request was on its way, which is no fault: nothing of the response has arrived.
            if not is_reused or failure.kind is not FailureKind.BROKEN or self._abort_reason is not None:
                raise
            response = self._request(fetch, is_reused=False, is_conditional=is_conditional)
        self.first_byte_s = time.monotonic()
        self.found = check_response(response, fetch)
        return response

    def _is_reusable(self, route: Route) -> bool:
        if self._http is None or self._http.has_unread_bytes or self._origin != _origin(route):
            return False
        if addresses.should_leave(*server_of(route), self._address):
            return False
        # If it is readable while idle, the server has closed it, or has sent bytes that belong to no request. poll()
        # and not select(), which takes no descriptors above 1023.
        poll = select.poll()
        poll.register(self._http.sock, select.POLLIN)
        return not poll.poll(0)

    def _request(self, fetch: Fetch, is_reused: bool, is_conditional: bool) -> Response:
        if not is_reused:
            self.close()
            self._http = self._connect(fetch.route)
            self._origin = _origin(fetch.route)
        http = self._http
        assert http is not None  # for the type checker
        # abort() may have been called while there was no socket to shut down. The kind does not matter:
        # `_get_or_close` replaces it by the reason.
        if self._abort_reason is not None:
            raise GetFailed(FailureKind.BROKEN, "aborted")
        try:
            self._extend_deadline()
            http.send_request("GET", _target(fetch.route), _headers(fetch, is_conditional))
            return http.read_response()
        except (OSError, MalformedResponse) as error:
            raise GetFailed(_kind_of(error), f"no answer: {_text_of(error)}") from None

    def _connect(self, route: Route) -> HttpSocket:
        try:
            # Twice the stall timeout: a stalled GET should be ended by the watch on `deadline`, which reports it as
            # STALLED. The kernel's timeout is for the case that this watch fails.
            sock = open_socket(route, self._connect_timeout_s, 2 * self._stall_timeout_s, self._announce)
        except (OSError, MalformedResponse, ValueError) as error:
            raise GetFailed(FailureKind.UNREACHABLE, f"{_server_name(route)}: {_text_of(error)}") from None
        finally:
            self._connecting = None
        self._address = address_of(sock)
        return HttpSocket(sock)

    def _announce(self, sock: socket.socket) -> None:
        self._connecting = sock
        # As in `_request`: abort() may have been called while there was no socket to shut down.
        if self._abort_reason is not None:
            raise ConnectionAbortedError("aborted")

    def _receive(self, response: Response, fetch: Fetch, into: memoryview) -> None:
        # Each receive may fill all that is left, and every byte that arrived is counted at once. So if the body breaks,
        # the part is resumed right behind the last byte, and no byte is downloaded twice.
        received, wanted, next_check = 0, fetch.end - fetch.start, CHUNK_BYTES
        destination = Destination(fetch, into)
        try:
            while received < wanted:
                count = destination.receive(response, wanted - received)
                if not count:  # a body may end early without any error
                    raise GetFailed(FailureKind.BROKEN, f"the body ended after {received} of {wanted} bytes", received)
                received += count
                self.received = received
                if received >= next_check:
                    self._extend_deadline()
                    next_check = received + CHUNK_BYTES
                if self._shortened is not None and self._shortened.part == fetch.part:
                    wanted = min(wanted, self._shortened.nbytes)
            if received < fetch.end - fetch.start:
                return  # shortened: the rest of the response is not read
            # The length of a body that does not state it is known only at its end. The end of a chunked one must be
            # read in any case: left in the socket, it would be taken for the start of the next response.
            if response.length is None and response.read(1):
                raise GetFailed(FailureKind.MALFORMED, "more bytes than asked for")
        except (OSError, MalformedResponse) as error:
            detail = f"the body broke after {received} of {wanted} bytes: {_text_of(error)}"
            raise GetFailed(_kind_of(error), detail, received) from None

    def _extend_deadline(self) -> None:
        self.deadline = time.monotonic() + self._stall_timeout_s

    def _aborted(self, reason: FailureKind, received: int) -> GetFailed:
        if reason is FailureKind.STALLED:
            return GetFailed(reason, f"less than {CHUNK_BYTES} bytes in {self._stall_timeout_s:g} s", received)
        if reason is FailureKind.SLOW:
            return GetFailed(reason, "much slower than other requests, cut", received)
        return GetFailed(reason, "cancelled", received)


# -- the request


def _add(origins: set[object], origin: object) -> None:
    if len(origins) < _MOST_ORIGINS:
        origins.add(origin)


def _origin(route: Route) -> object:
    """Everything that two routes must have in common to share a connection."""
    return (route.tls, route.host, route.port, route.proxy, route.ca_file)


def _target(route: Route) -> str:
    # With TLS the proxy only forwards a tunnel, and the request goes to the server itself. A plain request goes to the
    # proxy, which finds the server by the whole URL.
    if route.proxy is None or route.tls:
        return route.target
    return f"http://{host_and_port(route)}{route.target}"


def _headers(fetch: Fetch, is_conditional: bool) -> list[tuple[str, str]]:
    # Range names the last byte, not the one past it. Accept-Encoding: of a compressed body no byte range would fit.
    headers = [*fetch.route.headers, ("Range", f"bytes={fetch.start}-{fetch.end - 1}"), ("Accept-Encoding", "identity")]
    if is_conditional:
        headers.append(("If-Match", fetch.version.etag))
    if fetch.route.proxy is not None and not fetch.route.tls:  # with TLS the proxy got them with CONNECT
        headers.extend(fetch.route.proxy.headers)
    return headers


def _server_name(route: Route) -> str:
    server = f"{route.host}:{route.port}"
    return server if route.proxy is None else f"{server} through proxy {route.proxy.host}:{route.proxy.port}"


def _kind_of(error: Exception) -> FailureKind:
    """Tell a connection that broke, which may go well the next time, from a server that does not speak HTTP."""
    is_malformed = isinstance(error, MalformedResponse) and not isinstance(error, ConnectionEnded)
    return FailureKind.MALFORMED if is_malformed else FailureKind.BROKEN


def _text_of(error: BaseException) -> str:
    return str(error) or type(error).__name__  # some errors of sockets have no text

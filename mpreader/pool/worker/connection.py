"""One keep-alive connection of a worker, and the ranged GET that receives straight into shared memory.

The only place where errors of ``http``, ``ssl`` and sockets are translated. An answer is accepted only if it
names the right object version, offset and length; its bytes are counted, since a body may end early without a word.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Final

from mpreader.pool.worker.http import Answer, HttpStream, MalformedAnswer
from mpreader.pool.worker.messages import Failed, FailureKind, Fetch
from mpreader.pool.worker.route import Proxy, Route

if TYPE_CHECKING:
    import ssl
    from collections.abc import Container

__all__ = ["Connection", "GetFailed"]

# Bytes received between two looks at the clock; the least that a connection must bring per stall timeout.
CHUNK_BYTES: Final = 256 * 1024
_MAX_ERROR_BODY_BYTES: Final = 16 * 1024
_BUSY_STATUSES: Final = frozenset({408, 429, 500, 502, 503, 504})
_BUSY_CODES: Final = frozenset(
    {"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "OperationAborted"}
)
_EXPIRED_CODES: Final = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"})

_tls_contexts: dict[str | None, ssl.SSLContext] = {}


class GetFailed(Exception):
    """A GET that brought no bytes, or not all."""

    def __init__(self, kind: FailureKind, detail: str, received: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.received = received
        self.retry_after_s = retry_after_s

    def message(self, part: int) -> Failed:
        """The same as a message to the coordinator."""
        return Failed(part, self.kind, self.received, self.detail, self.retry_after_s)


class Connection:
    """A connection to one server at a time, owned by one thread; ``abort`` may be called from another.

    Attributes:
        part: The part that is being received; None while idle.
        deadline: When the next chunk must be there, by the monotonic clock; infinite while idle.
        answered_s: When the answer to the last GET began, by the same clock; 0 if there was none.
    """

    def __init__(self, connect_timeout_s: float, stall_timeout_s: float) -> None:
        self.part: int | None = None
        self.deadline = float("inf")
        self.answered_s = 0.0
        self._connect_timeout_s = connect_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._stream: HttpStream | None = None
        self._peer: object = None
        self._abort_reason: FailureKind | None = None

    def abort(self, reason: FailureKind) -> None:
        """Make the GET that is under way, if any, end soon with ``reason``."""
        self._abort_reason = reason
        stream = self._stream
        if stream is not None:
            with contextlib.suppress(OSError):  # it may be closed already by its own thread
                socket.socket.shutdown(stream.sock, socket.SHUT_RDWR)

    def get(self, fetch: Fetch, into: memoryview, cancelled: Container[int] = ()) -> None:
        """Receive the part into ``into``, which has exactly its length.

        Args:
            fetch: What to receive.
            into: Where to.
            cancelled: Numbers of parts that are not wanted any more, perhaps this one.

        Raises:
            GetFailed: It was not, or not wholly, received; says how many bytes are right.
        """
        self._abort_reason = None
        self.answered_s = 0.0
        self._touch()
        self.part = fetch.part
        try:
            # Looked at when `part` is set: whoever cancels it later finds it there, and aborts.
            if fetch.part in cancelled:
                raise GetFailed(FailureKind.CANCELLED, "cancelled")
            self._get_or_close(fetch, into)
        finally:
            self.part = None
            self.deadline = float("inf")

    def close(self) -> None:
        """Close the connection; the next GET opens a new one."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    # -- steps of a GET

    def _get_or_close(self, fetch: Fetch, into: memoryview) -> None:
        try:
            self._get(fetch, into)
        except GetFailed as failure:
            self.close()
            if self._abort_reason is not None:
                raise self._aborted(failure.received) from None
            raise

    def _get(self, fetch: Fetch, into: memoryview) -> None:
        reused = self._is_reusable(fetch.route)
        try:
            answer = self._ask(fetch, reused)
        except GetFailed as failure:
            # A server may close a connection that it finds idle just when it is used again.
            if not reused or failure.kind is not FailureKind.BROKEN or self._abort_reason is not None:
                raise
            answer = self._ask(fetch, reused=False)
        self.answered_s = time.monotonic()
        check_answer(answer, fetch)
        self._receive(answer, into)
        if answer.will_close:
            self.close()

    def _is_reusable(self, route: Route) -> bool:
        if self._stream is None or self._stream.has_rest or self._peer != _peer_of(route):
            return False
        # Readable while idle: closed by the server, or bytes that nobody asked for.
        poll = select.poll()
        poll.register(self._stream.sock, select.POLLIN)
        return not poll.poll(0)

    def _ask(self, fetch: Fetch, reused: bool) -> Answer:
        if not reused:
            self.close()
            self._stream = self._connect(fetch.route)
            self._peer = _peer_of(fetch.route)
        stream = self._stream
        assert stream is not None  # for the type checker
        if self._abort_reason is not None:  # it came before this stream was there to be shut down
            raise GetFailed(FailureKind.BROKEN, "aborted")
        try:
            self._touch()
            stream.send("GET", _target(fetch.route), _headers(fetch))
            return stream.read_answer()
        except (OSError, MalformedAnswer) as error:
            raise GetFailed(FailureKind.BROKEN, f"no answer: {_describe(error)}") from None

    def _connect(self, route: Route) -> HttpStream:
        try:
            stream = HttpStream(_open(route, self._connect_timeout_s))
        except (OSError, MalformedAnswer, ValueError) as error:
            raise GetFailed(FailureKind.UNREACHABLE, f"{_where(route)}: {_describe(error)}") from None
        _block(stream.sock, 2 * self._stall_timeout_s)
        return stream

    def _receive(self, answer: Answer, into: memoryview) -> None:
        # What arrives together is read together and counted at once: if the body breaks, no byte of it is lost.
        received, wanted, next_look = 0, len(into), CHUNK_BYTES
        try:
            while received < wanted:
                got = answer.receive_into(into[received:])
                if not got:
                    raise GetFailed(FailureKind.BROKEN, f"the body ended after {received} of {wanted} bytes", received)
                received += got
                if received >= next_look:
                    self._touch()
                    next_look = received + CHUNK_BYTES
            if answer.is_chunked and answer.read(1):  # a chunked body says its end only when asked
                raise GetFailed(FailureKind.MALFORMED, "more bytes than asked for")
        except (OSError, MalformedAnswer) as error:
            detail = f"the body broke after {received} of {wanted} bytes: {_describe(error)}"
            raise GetFailed(FailureKind.BROKEN, detail, received) from None

    def _touch(self) -> None:
        self.deadline = time.monotonic() + self._stall_timeout_s

    def _aborted(self, received: int) -> GetFailed:
        reason = self._abort_reason or FailureKind.CANCELLED
        if reason is FailureKind.STALLED:
            return GetFailed(reason, f"less than {CHUNK_BYTES} bytes in {self._stall_timeout_s:g} s", received)
        return GetFailed(reason, "cancelled", received)


# -- opening


def _open(route: Route, timeout_s: float) -> socket.socket:
    server = (route.host, route.port) if route.proxy is None else (route.proxy.host, route.proxy.port)
    sock = _open_socket(*server, timeout_s)
    try:
        if route.proxy is not None and route.tls:
            _ask_for_tunnel(sock, route, route.proxy)
        if route.tls:
            sock = _tls_context(route.ca_file).wrap_socket(sock, server_hostname=route.host)
    except BaseException:
        sock.close()
        raise
    return sock


def _ask_for_tunnel(sock: socket.socket, route: Route, proxy: Proxy) -> None:
    stream = HttpStream(sock)
    stream.send("CONNECT", _host_and_port(route), [("Host", _host_and_port(route)), *proxy.headers])
    answer = stream.read_answer()
    if answer.status != 200:
        raise OSError(f"the proxy refuses to connect: HTTP {answer.status}")


def _open_socket(host: str, port: int, timeout_s: float) -> socket.socket:
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    random.shuffle(addresses)  # S3 answers with several addresses: spread the connections over them
    last_error: OSError = OSError(f"no address for {host}")
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(timeout_s)
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            sock.close()
            last_error = error
        else:
            return sock
    raise last_error


def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    import ssl  # costs a worker's start 10 ms

    context = _tls_contexts.get(ca_file)
    if context is None:
        if ca_file is None:
            context = ssl.create_default_context()
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            if os.path.isdir(ca_file):
                context.load_verify_locations(capath=ca_file)
            else:
                context.load_verify_locations(cafile=ca_file)
        _tls_contexts[ca_file] = context
    return context


def _block(sock: socket.socket, timeout_s: float) -> None:
    # The watch on `deadline` ends what takes too long; this is for the case that nobody watches. Kept by the kernel:
    # Python's own timeout asks it with a system call before each receive whether there is anything.
    timeval = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    sock.settimeout(None)


# -- the request


def _peer_of(route: Route) -> object:
    return (route.tls, route.host, route.port, route.proxy, route.ca_file)


def _where(route: Route) -> str:
    server = f"{route.host}:{route.port}"
    return server if route.proxy is None else f"{server} through proxy {route.proxy.host}:{route.proxy.port}"


def _target(route: Route) -> str:
    if route.proxy is None or route.tls:
        return route.target
    return f"http://{_host_and_port(route)}{route.target}"


def _host_and_port(route: Route) -> str:
    host = f"[{route.host}]" if ":" in route.host else route.host
    return f"{host}:{route.port}"


def _headers(fetch: Fetch) -> list[tuple[str, str]]:
    headers = [*fetch.route.headers, ("Range", f"bytes={fetch.start}-{fetch.end - 1}"), ("Accept-Encoding", "identity")]
    if fetch.etag:
        headers.append(("If-Match", fetch.etag))
    if fetch.route.proxy is not None and not fetch.route.tls:
        headers.extend(fetch.route.proxy.headers)
    return headers


# -- the answer


def check_answer(answer: Answer, fetch: Fetch) -> None:
    """Accept the answer to a GET only if the body to come is exactly what was asked for.

    Raises:
        GetFailed: It is not; nothing of a body that may be the object has been read.
    """
    if answer.status != 206:
        raise _refusal(answer)
    expected = f"bytes {fetch.start}-{fetch.end - 1}/"
    content_range = answer.header("content-range")
    if not content_range.startswith(expected):
        raise GetFailed(FailureKind.MALFORMED, f"asked for {expected!r}, answered with Content-Range {content_range!r}")
    etag = answer.header("etag")
    if fetch.etag and etag != fetch.etag:
        kind = FailureKind.CHANGED if etag else FailureKind.MALFORMED
        raise GetFailed(kind, f"the answer is for ETag {etag or '(none)'}, not {fetch.etag}")
    total = content_range[len(expected) :]
    if total not in (str(fetch.object_size), "*"):
        # Under the right ETag it is a wrong answer, not another object.
        kind = FailureKind.MALFORMED if fetch.etag else FailureKind.CHANGED
        raise GetFailed(kind, f"the object has {total} bytes now, not {fetch.object_size}")
    if answer.header("content-encoding", "identity") not in ("identity", "", "aws-chunked"):
        raise GetFailed(FailureKind.MALFORMED, "the answer is compressed, its bytes are not the object's")
    if answer.length is not None and answer.length != fetch.end - fetch.start:
        detail = f"Content-Length {answer.length}, not the {fetch.end - fetch.start} bytes asked for"
        raise GetFailed(FailureKind.MALFORMED, detail)


def _refusal(answer: Answer) -> GetFailed:
    status = answer.status
    code, text = ("", "") if status < 300 else _error_body(answer)
    detail = f"HTTP {status}" + (f" {code}" if code else "") + (f" ({text})" if text else "")
    kind = _kind_of(status, code, text)
    if status == 200:
        detail += ": the server sends the whole object in place of a range"
    return GetFailed(kind, detail, retry_after_s=_retry_after(answer))


def _kind_of(status: int, code: str, text: str) -> FailureKind:
    if code in _EXPIRED_CODES or (status == 403 and "expired" in text.lower()):
        return FailureKind.EXPIRED
    if status in _BUSY_STATUSES or code in _BUSY_CODES:
        return FailureKind.BUSY
    return {
        200: FailureKind.MALFORMED,
        401: FailureKind.DENIED,
        403: FailureKind.DENIED,
        404: FailureKind.MISSING,
        410: FailureKind.MISSING,
        412: FailureKind.CHANGED,
        416: FailureKind.CHANGED,  # the plan was checked against the size that HEAD gave
    }.get(status, FailureKind.REFUSED)


def _error_body(answer: Answer) -> tuple[str, str]:
    # Only code and message are kept: the rest of S3's error document may echo what was signed.
    try:
        body = answer.read(_MAX_ERROR_BODY_BYTES).decode("utf-8", "replace")
    except (OSError, MalformedAnswer):
        return "", ""
    code, message = (re.search(rf"<{tag}>([^<]*)</{tag}>", body) for tag in ("Code", "Message"))
    return (code[1][:100] if code else ""), (message[1][:300] if message else "")


def _retry_after(answer: Answer) -> float:
    text = answer.header("retry-after")
    return min(float(text), 60.0) if text.isdigit() else 0.0


def _describe(error: BaseException) -> str:
    return str(error) or type(error).__name__

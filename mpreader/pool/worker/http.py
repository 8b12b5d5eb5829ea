"""HTTP/1.1 client of a worker: sends a request, parses the head of the response, receives its body into memory.

Used by :mod:`~mpreader.pool.worker.connection` for GET and by :mod:`~mpreader.pool.worker.transport` for CONNECT. It
knows nothing of objects, parts and retries, and must not reconnect: an ``OSError`` of the socket passes through.

Python's own ``http.client`` would take half of a worker's start-up time and ten times as long for each request, for
features that are not needed here. A server is not trusted: everything that it may send is bounded in size, and a
response that can't be parsed with certainty is refused, because a wrong guess would put wrong bytes into a tensor.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable

__all__ = ["ConnectionEnded", "HttpSocket", "MalformedResponse", "Response"]

# Bounds against a server that sends a head, or a line of a chunked body, without an end.
MAX_HEAD_BYTES = 64 * 1024
_MAX_LINE_BYTES = 4096
# Bytes of one receive into the buffer. Small: the bytes of a body that come with the head are copied out of it once
# more, while the rest of the body is received straight into shared memory.
_RECEIVE_BYTES = 4096
# Most responses with a status of 1xx before the one that counts.
_MAX_INTERIM_RESPONSES = 32
# Signs in the beginning of a head that no head has: a line that ends with LF alone, a NUL, another protocol than
# HTTP/1, and a line without colon. A CR may be the last byte that has come.
_MALFORMED_HEAD = re.compile(
    rb"(?<!\r)\n|\r(?!\n|\Z)|\x00|\A(?!HTTP/1\.[01] )(?!(?:H|HT|HTT|HTTP|HTTP/|HTTP/1|HTTP/1\.|HTTP/1\.[01])?\Z)"
    rb"|\r\n(?!\r)[^\r\n:]*\r\n"
)
_MALFORMED_LINE = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\x00")
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: .*)?")
# At most 15 hexadecimal digits, so that a server can't make us parse a number of any length.
_CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,15}")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")


class MalformedResponse(Exception):
    """The server sent something that is not an HTTP/1.1 response, or closed the connection before its end."""


class ConnectionEnded(MalformedResponse):
    """The server closed the connection before the end of a response, which may go well the next time."""


class HttpSocket:
    """A connected socket that sends requests and reads responses, with a buffer of bytes that were received early.

    Used by one thread at a time. Another thread may shut ``sock`` down, which ends a blocked call with an error.

    Attributes:
        sock: Socket in blocking mode, plain or TLS.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        # Bytes that were received together with a head or a chunk's size, and belong to what follows. All further
        # bytes of a body are received into the caller's memory, not into this buffer.
        self._buffer = bytearray()
        # Only a TLS socket has `read`. Its `recv_into` is a Python function that calls `read`, and each call brings no
        # more than a TLS record of 16 KiB: the direct call saves one Python call for each record.
        self._tls_read: Callable[[int, memoryview], int] | None = getattr(sock, "read", None)

    @property
    def has_unread_bytes(self) -> bool:
        """True if bytes are buffered that the last response did not claim.

        Such a connection can't be used again: the next response would seem to start with those bytes.
        """
        return bool(self._buffer)

    def send_request(self, method: str, target: str, headers: list[tuple[str, str]]) -> None:
        """Send a request without a body.

        Args:
            method: HTTP method.
            target: Request target, percent-encoded: path and query, whole URL (plain proxy) or host:port (CONNECT).
            headers: Names and values, sent in this order; nothing is added to them.

        Raises:
            OSError: The connection is broken.
            ValueError: The target or a header holds a control character, so that a server could take one line for
                two. Nothing was sent.
        """
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
        if any(map(_CONTROL_CHARACTER.search, lines)):
            raise ValueError("a control character in the URL or in a header")
        # One call of sendall, so that the whole request goes out at once. HTTP/1.1 heads are latin-1; any other
        # character raises UnicodeEncodeError, which is a ValueError.
        self.sock.sendall("\r\n".join(lines).encode("latin-1"))

    def read_response(self) -> Response:
        """Read the head of the next response; interim responses (1xx) are skipped.

        The body is received through the returned object, and must be received before the next call.

        Raises:
            MalformedResponse: The server sent something else, or closed the connection.
            OSError: The connection is broken.
        """
        for _ in range(_MAX_INTERIM_RESPONSES):
            response = Response(self, self._read_head())
            if response.status >= 200:
                return response
        raise MalformedResponse(f"{_MAX_INTERIM_RESPONSES} interim responses, and none that is the last")

    def receive_into(self, into: memoryview, flags: int = 0) -> int:
        """Receive up to ``len(into)`` bytes, buffered ones first.

        Args:
            into: Memory to receive into.
            flags: ``socket.MSG_TRUNC`` if the bytes are not needed: TCP then drops them, and copies nothing.

        Returns:
            Number of bytes received; 0 if the server has closed the connection.

        Raises:
            OSError: The connection is broken.
        """
        if not self._buffer:
            return self.sock.recv_into(into, 0, flags) if self._tls_read is None else self._tls_read(len(into), into)
        count = min(len(into), len(self._buffer))
        into[:count] = self._buffer[:count]
        del self._buffer[:count]
        return count

    def read_line(self) -> bytes:
        """Read one line of a chunked body, such as a chunk's size; the CRLF at its end is left out.

        Raises:
            MalformedResponse: The line is too long, or the server has closed the connection.
            OSError: The connection is broken.
        """
        return self._read_until(b"\r\n", _MAX_LINE_BYTES, _MALFORMED_LINE)

    def close(self) -> None:
        """Close the socket; only its owning thread may call this, never one that wants to end a blocked call."""
        self.sock.close()

    def _read_head(self) -> str:
        return self._read_until(b"\r\n\r\n", MAX_HEAD_BYTES, _MALFORMED_HEAD).decode("latin-1")

    def _read_until(self, end: bytes, max_bytes: int, malformed: re.Pattern[bytes]) -> bytes:
        while (count := self._buffer.find(end)) < 0:
            # At once, not when the connection stalls: the end that is waited for would never come.
            if malformed.search(self._buffer):
                raise MalformedResponse(f"not HTTP/1.1: {bytes(self._buffer[:80])!r}")
            self._receive_more(max_bytes)
        found = bytes(self._buffer[:count])
        del self._buffer[: count + len(end)]
        return found

    def _receive_more(self, max_bytes: int) -> None:
        # Checked before more is received: a server that sends an endless line must not fill the memory.
        if len(self._buffer) >= max_bytes:
            raise MalformedResponse(f"no end in the first {max_bytes} bytes")
        received = self.sock.recv(_RECEIVE_BYTES)
        if not received:
            when = f"after {len(self._buffer)} bytes of an answer" if self._buffer else "without an answer"
            raise ConnectionEnded(f"the server closed the connection {when}")
        self._buffer += received


class Response:
    """The parsed head of a response; its body is received from the socket on demand.

    Attributes:
        status: Status code, 100 to 999.
        length: Bytes of the body by ``Content-Length``; None if there is no such header, or the body is chunked.
        is_chunked: True if the body comes in chunks, each of which begins with its size.
        will_close: True if the server ends the connection after this response.
        headers: Values by name in lower case; where a header is repeated, all values, joined by commas.
    """

    def __init__(self, http: HttpSocket, head: str) -> None:
        status_line, *lines = head.split("\r\n")
        match = _STATUS_LINE.fullmatch(status_line)
        if match is None:
            raise MalformedResponse(f"not HTTP/1.1: {status_line[:80]!r}")
        self.status = int(match[2])
        self._http = http
        self.headers = _parse_headers(lines)
        self.is_chunked = self._parse_is_chunked()
        # Where a head has both, the chunks decide where the body ends (RFC 9112, section 6.3).
        self.length = None if self.is_chunked else self._parse_content_length()
        # HTTP/1.1 keeps a connection open unless it says "close", HTTP/1.0 only if it says "keep-alive".
        tokens = self.header("connection").lower()
        is_kept_open = "keep-alive" in tokens if match[1] == "0" else "close" not in tokens
        # A body of unknown length ends where the connection ends.
        self.will_close = not is_kept_open or (self.length is None and not self.is_chunked)
        # Bytes of the body that are still to be received. None: unknown, or the body is chunked.
        self._body_left = self.length
        # Bytes of the current chunk that are still to be received. 0: the size of the next chunk has to be read first.
        # -1: the last chunk was read.
        self._chunk_left = 0

    def header(self, name: str, default: str = "") -> str:
        """Value of a header; where it is repeated, all values, joined by commas.

        Args:
            name: Name in lower case.
            default: Value to return if the response has no such header.
        """
        return self.headers.get(name, default)

    def receive_into(self, into: memoryview, flags: int = 0) -> int:
        """Receive up to ``len(into)`` bytes of the body.

        Bytes behind a body of known length stay in the socket: they belong to the next response.

        Args:
            into: Memory to receive into.
            flags: As for :meth:`HttpSocket.receive_into`.

        Returns:
            Number of bytes received; 0 at the end of the body, and also if the server closed the connection too early.
            The caller must count the bytes to tell one from the other.

        Raises:
            MalformedResponse: The body is chunked, and a chunk is malformed or cut off.
            OSError: The connection is broken.
        """
        if self.is_chunked:
            return self._receive_chunk_into(into, flags)
        if self._body_left is not None:
            into = into[: self._body_left]
        count = self._http.receive_into(into, flags)
        if self._body_left is not None:
            self._body_left -= count
        return count

    def read(self, max_bytes: int) -> bytes:
        """Read the first ``max_bytes`` bytes of the body, or all of it where it is shorter.

        Raises:
            MalformedResponse: As for :meth:`receive_into`.
            OSError: The connection is broken.
        """
        body, received = bytearray(max_bytes), 0
        while received < max_bytes and (count := self.receive_into(memoryview(body)[received:])):
            received += count
        return bytes(body[:received])

    def _receive_chunk_into(self, into: memoryview, flags: int) -> int:
        if self._chunk_left == 0:
            self._chunk_left = self._read_chunk_size()
        if self._chunk_left < 0:
            return 0
        count = self._http.receive_into(into[: self._chunk_left], flags)
        self._chunk_left -= count
        # A line break follows the last byte of a chunk, which is read here as an empty line.
        if count and not self._chunk_left and self._http.read_line():
            raise MalformedResponse("a chunk is longer than it says")
        return count

    def _read_chunk_size(self) -> int:
        """Read the line before a chunk; returns the chunk's size, or -1 after the last chunk."""
        size = self._http.read_line().split(b";")[0].strip()  # extensions, such as a signature, come after a semicolon
        if not _CHUNK_SIZE.fullmatch(size):
            raise MalformedResponse(f"not the size of a chunk: {size[:80]!r}")
        if int(size, 16) > 0:
            return int(size, 16)
        # A size of 0 ends the body. The trailers behind it are read and dropped: left in the socket, they would be
        # taken for the start of the next response.
        while self._http.read_line():
            pass
        return -1

    def _parse_is_chunked(self) -> bool:
        coding = self.header("transfer-encoding", "identity").strip().lower()
        # Others, such as "gzip, chunked", change the bytes of the body.
        if coding not in ("identity", "chunked"):
            raise MalformedResponse(f"unknown Transfer-Encoding {coding[:80]!r}")
        return coding == "chunked"

    def _parse_content_length(self) -> int | None:
        # A header that came twice has both values here, joined by a comma. Equal lengths are accepted; different ones
        # are refused, since it is unknown which of them is the body's end.
        lengths = {length.strip() for length in self.header("content-length").split(",")}
        length = lengths.pop()
        if not length and not lengths:
            return None
        if lengths or not re.fullmatch("[0-9]{1,18}", length):
            raise MalformedResponse(f"not a Content-Length: {self.header('content-length')[:80]!r}")
        return int(length)


def _parse_headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        # This also refuses a line that starts with a space, which once continued the line before it (obsolete since
        # RFC 7230).
        if not colon or not name or name != name.strip():
            raise MalformedResponse(f"not a header: {line[:80]!r}")
        name, value = name.lower(), value.strip()
        if _CONTROL_CHARACTER.search(line.replace("\t", "")):
            raise MalformedResponse(f"a control character in a header: {line[:80]!r}")
        # A proxy may repeat a header; the same value twice says no more than once.
        headers[name] = value if headers.get(name, value) == value else f"{headers[name]}, {value}"
    return headers

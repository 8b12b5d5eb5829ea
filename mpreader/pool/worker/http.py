"""HTTP/1.1 as a worker speaks it: a request is sent, the head of its answer is read, its body received into memory.

Python's own client costs a worker half of its start, and each request ten times as much, for what is not needed here.
Everything that a server may send is bounded; what is not understood is refused.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable

__all__ = ["Answer", "HttpStream", "MalformedAnswer"]

MAX_HEAD_BYTES = 64 * 1024
_RECEIVE_BYTES = 4096
_MAX_LINE_BYTES = 4096
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: .*)?")

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class MalformedAnswer(Exception):
    """What came is no HTTP/1.1 answer, or one that ends too early."""


class HttpStream:
    """A connected socket, and what was received from it beyond what was asked for.

    Attributes:
        sock: The socket, blocking; a TLS socket as well.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._received = bytearray()
        # A TLS socket's own method: `recv_into` is a detour to it, which counts at 16 KiB a call.
        self._read: Callable[[int, memoryview], int] | None = getattr(sock, "read", None)

    @property
    def has_rest(self) -> bool:
        """Whether bytes are left that belong to no answer."""
        return bool(self._received)

    def send(self, method: str, target: str, headers: list[tuple[str, str]]) -> None:
        """Send a request without a body.

        Raises:
            OSError: The connection is broken.
            ValueError: A control character would make one line two; nothing was sent.
        """
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
        if any(map(_CONTROL.search, lines)):
            raise ValueError("a control character in the URL or in a header")
        self.sock.sendall("\r\n".join(lines).encode("latin-1"))

    def read_answer(self) -> Answer:
        """Read the head of the next answer, interim ones left out.

        Raises:
            MalformedAnswer: It is none.
            OSError: The connection is broken.
        """
        while True:
            answer = Answer(self, self._read_head())
            if answer.status >= 200:
                return answer

    def receive_into(self, into: memoryview) -> int:
        """Receive up to ``len(into)`` bytes, those first that are there already; 0: the server has closed."""
        if not self._received:
            return self.sock.recv_into(into) if self._read is None else self._read(len(into), into)
        count = min(len(into), len(self._received))
        into[:count] = self._received[:count]
        del self._received[:count]
        return count

    def read_line(self) -> bytes:
        """Read a line of a chunked body, without its end.

        Raises:
            MalformedAnswer: It is too long, or the server has closed.
        """
        while (end := self._received.find(b"\r\n")) < 0:
            self._receive_more(_MAX_LINE_BYTES)
        line = bytes(self._received[:end])
        del self._received[: end + 2]
        return line

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()

    def _read_head(self) -> str:
        while (end := self._received.find(b"\r\n\r\n")) < 0:
            self._receive_more(MAX_HEAD_BYTES)
        head = self._received[:end].decode("latin-1")
        del self._received[: end + 4]
        return head

    def _receive_more(self, most: int) -> None:
        if len(self._received) >= most:
            raise MalformedAnswer(f"no end in the first {most} bytes")
        received = self.sock.recv(_RECEIVE_BYTES)
        if not received:
            what = f"after {len(self._received)} bytes of an answer" if self._received else "without an answer"
            raise MalformedAnswer(f"the server closed the connection {what}")
        self._received += received


class Answer:
    """The head of an answer, and its body as it comes.

    Attributes:
        status: Three digits.
        length: Bytes of the body, where the head tells.
        is_chunked: Whether the body comes in chunks that tell their lengths.
        will_close: Whether the connection ends with this answer.
    """

    def __init__(self, stream: HttpStream, head: str) -> None:
        status_line, *lines = head.split("\r\n")
        match = _STATUS_LINE.fullmatch(status_line)
        if match is None:
            raise MalformedAnswer(f"not HTTP/1.1: {status_line[:80]!r}")
        self.status = int(match[2])
        self._stream = stream
        self._headers = _parse_headers(lines)
        self.is_chunked = self._is_chunked()
        self.length = None if self.is_chunked else self._content_length()
        tokens = self.header("connection").lower()
        is_kept = "keep-alive" in tokens if match[1] == "0" else "close" not in tokens
        self.will_close = not is_kept or (self.length is None and not self.is_chunked)
        self._chunk_left = 0
        self._left = self.length

    def header(self, name: str, default: str = "") -> str:
        """A header's value; of a repeated one all of them, with commas in between.

        Args:
            name: In small letters.
            default: What to return where there is none.
        """
        return self._headers.get(name, default)

    def receive_into(self, into: memoryview) -> int:
        """Receive up to ``len(into)`` bytes of the body; 0: it has ended, or the server has closed.

        Raises:
            MalformedAnswer: A chunk is malformed.
            OSError: The connection is broken.
        """
        if self.is_chunked:
            return self._receive_chunk(into)
        if self._left is not None:
            into = into[: self._left]
        count = self._stream.receive_into(into) if len(into) else 0
        if self._left is not None:
            self._left -= count
        return count

    def read(self, most: int) -> bytes:
        """The first ``most`` bytes of the body, or all of it where it is shorter."""
        body, received = bytearray(most), 0
        while received < most and (count := self.receive_into(memoryview(body)[received:])):
            received += count
        return bytes(body[:received])

    def _receive_chunk(self, into: memoryview) -> int:
        if self._chunk_left == 0:
            size = self._stream.read_line().split(b";")[0].strip()
            if not re.fullmatch(rb"[0-9a-fA-F]{1,15}", size):
                raise MalformedAnswer(f"not the size of a chunk: {size[:80]!r}")
            self._chunk_left = int(size, 16)
            if self._chunk_left == 0:
                while self._stream.read_line():  # trailers
                    pass
                self._chunk_left = -1
        if self._chunk_left < 0:
            return 0
        count = self._stream.receive_into(into[: self._chunk_left])
        self._chunk_left -= count
        if count and not self._chunk_left and self._stream.read_line():
            raise MalformedAnswer("a chunk is longer than it says")
        return count

    def _is_chunked(self) -> bool:
        coding = self.header("transfer-encoding", "identity").strip().lower()
        if coding not in ("identity", "chunked"):
            raise MalformedAnswer(f"unknown Transfer-Encoding {coding[:80]!r}")
        return coding == "chunked"

    def _content_length(self) -> int | None:
        lengths = {length.strip() for length in self.header("content-length").split(",")}
        length = lengths.pop()
        if not length and not lengths:
            return None
        if lengths or not re.fullmatch("[0-9]{1,18}", length):
            raise MalformedAnswer(f"not a Content-Length: {self.header('content-length')[:80]!r}")
        return int(length)


def _parse_headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():  # a line that continues another one is refused, too
            raise MalformedAnswer(f"not a header: {line[:80]!r}")
        name, value = name.lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers

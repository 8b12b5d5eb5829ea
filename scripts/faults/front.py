"""Front of a fault server: passes requests on, and behaves as some stores and proxies do with addresses and signatures.

:class:`mpreader.testing.FaultServer` knows faults of bodies and of versions. What depends on a signature in the URL, on
the request's method, or on the bytes of the response's head is done here, before it.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from typing_extensions import Self

_REFUSAL: Final = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
_FORBIDDEN: Final = b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n"
_REDIRECT: Final = b"HTTP/1.1 %s\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n"

Answer = Callable[[bytes, bytes, str], "bytes | None"]  # (method, target, URL behind) -> response, None: pass it on
Change = Callable[[bytes, bytes], bytes]  # (method, head of a response) -> the head that is sent


def _refuse_presigned(method: bytes, target: bytes, _: str) -> bytes | None:
    if b"X-Amz-Signature=" not in target:
        return None
    return _FORBIDDEN % len(_REFUSAL) + (b"" if method == b"HEAD" else _REFUSAL)


def _redirect_all(_: bytes, target: bytes, behind: str) -> bytes | None:
    return _REDIRECT % (b"301 Moved Permanently", behind.encode() + target)


def _redirect_gets(method: bytes, target: bytes, behind: str) -> bytes | None:
    return _REDIRECT % (b"307 Temporary Redirect", behind.encode() + target) if method == b"GET" else None


def _pass_on(*_: object) -> None:
    return None


def _without_length(method: bytes, head: bytes) -> bytes:
    return re.sub(rb"Content-Length: \d+\r\n", b"", head) if method == b"HEAD" else head


def _bare_lf(_: bytes, head: bytes) -> bytes:
    return head.replace(b"\r\n", b"\n")


FRONTS: Final[dict[str, tuple[Answer, Change]]] = {
    "presigned": (_refuse_presigned, lambda _, head: head),
    "redirects": (_redirect_all, lambda _, head: head),
    "redirected GETs": (_redirect_gets, lambda _, head: head),
    "no length": (_pass_on, _without_length),
    "bare LF": (_pass_on, _bare_lf),
}


class Front:
    """A server before a fault server. Use it as a context manager.

    Args:
        kind: A key of FRONTS.
        behind: URL of the fault server. It is spoken to in http, but may be the https URL that clients are sent to.

    Attributes:
        url: URL of the front.
        requests: Methods and targets that it got, in order.
    """

    def __init__(self, kind: str, behind: str) -> None:
        self._answer, self._change = FRONTS[kind]
        self._behind = behind
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[tuple[str, str]] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as requests:
            while head := b"".join(_head(requests)):
                method, target, _ = head.split(b" ", 2)
                self.requests.append((method.decode(), target.decode("latin-1").partition("?")[0]))
                answer = self._answer(method, target, self._behind)
                if answer is not None:
                    connection.sendall(answer)
                else:
                    self._pass_on(connection, method, head)

    def _pass_on(self, connection: socket.socket, method: bytes, head: bytes) -> None:
        address = urlsplit(self._behind)
        with socket.create_connection((address.hostname, address.port)) as behind, behind.makefile("rb") as responses:
            behind.sendall(head)
            head = b"".join(_head(responses))
            connection.sendall(self._change(method, head))
            length = re.search(rb"Content-Length: (\d+)", head)
            if method != b"HEAD" and length is not None:
                connection.sendall(responses.read(int(length[1])))


def _head(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a request's or a response's head, up to the empty one."""
    while line := stream.readline():
        yield line
        if line == b"\r\n":
            return

"""Responses of S3 to GET and HEAD, and the wrong ones that a fault asks for.

:mod:`mpreader.testing.fault_server` reads requests and sends responses with it. The embedded S3 uses
:func:`byte_range`, so that both servers understand a Range header alike. Responses are computed without any I/O, so
that tests can check them without a server.
"""

from __future__ import annotations

import gzip
import hashlib
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import unquote

from mpreader.testing.fault import Fault, FaultKind

__all__ = ["Content", "Request", "Response", "StoredObject", "byte_range", "read_request", "respond"]

Content = bytes | bytearray | memoryview | Path

_MAX_HEAD_BYTES: Final = 64 * 1024
_FIRST_MODIFIED_S: Final = 1767225600  # 1 January 2026: Last-Modified of the first version of an object
_REASONS: Final = {200: "OK", 206: "Partial Content"}
# The header that a server with this fault does not understand.
_IGNORED: Final = {
    FaultKind.WHOLE_OBJECT: "range",
    FaultKind.OTHER_ETAG: "if-match",
    FaultKind.OTHER_MODIFIED: "if-match",
}
# Headers with which a fault says another thing of the version; "": it leaves the header out.
_WRONG_VERSIONS: Final = {
    FaultKind.NO_ETAG: {"ETag": ""},
    FaultKind.NO_VALIDATORS: {"ETag": "", "Last-Modified": ""},
    FaultKind.OTHER_ETAG: {"ETag": '"another-version"'},
    FaultKind.OTHER_MODIFIED: {"ETag": "", "Last-Modified": formatdate(_FIRST_MODIFIED_S - 1, usegmt=True)},
}
_ERRORS: Final = {
    403: ("AccessDenied", "Access Denied"),
    404: ("NoSuchKey", "The specified key does not exist."),
    405: ("MethodNotAllowed", "The specified method is not allowed against this resource."),
    412: ("PreconditionFailed", "At least one of the pre-conditions you specified did not hold"),
    416: ("InvalidRange", "The requested range is not satisfiable"),
    500: ("InternalError", "We encountered an internal error. Please try again."),
    503: ("SlowDown", "Please reduce your request rate."),
}


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object that is served.

    Attributes:
        data: Its bytes.
        etag: Its ETag; empty: it has none.
        headers: Further headers of all responses about it, its Last-Modified among them.
    """

    data: memoryview
    etag: str
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Content, headers: Mapping[str, str] | None = None, version: int = 0) -> StoredObject:
        """Serve ``content`` without copying it; a path names a file that must stay as it is.

        Args:
            content: The bytes.
            headers: Headers to add, or to send in place of the usual ETag and Last-Modified; "": don't send it.
            version: Number of the version, from 0. Each has a Last-Modified of its own.
        """
        # Mapped, not read: scripts/bench serves checkpoints of gigabytes where nginx is missing.
        if isinstance(content, Path):
            with content.open("rb") as file:
                content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        data = memoryview(content).cast("B").toreadonly()
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        usual = {"ETag": f'"{digest}"', "Last-Modified": formatdate(_FIRST_MODIFIED_S + version, usegmt=True)}
        sent = {name: value for name, value in {**usual, **(headers or {})}.items() if value}
        return cls(data, sent.pop("ETag", ""), sent)


@dataclass(frozen=True, slots=True)
class Request:
    """Head of a request.

    Attributes:
        method: ``"GET"``, ``"HEAD"``, …
        path: The path, percent-decoded and without the query.
        headers: The headers, names in lower case.
    """

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Response:
    """A response.

    Attributes:
        status: HTTP status.
        headers: The headers, names as they are sent.
        body: Bytes to send behind the headers: a view of the stored object, where it is unchanged.
    """

    status: int
    headers: Mapping[str, str]
    body: memoryview

    def head(self) -> bytes:
        """Status line and headers, as they are sent."""
        lines = [f"HTTP/1.1 {self.status} {_REASONS.get(self.status, 'Error')}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def read_request(stream: BinaryIO) -> Request | None:
    """Read the next request of a connection; None when the client has closed it.

    Raises:
        ConnectionError: The client speaks no HTTP, or the head of its request is too long.
    """
    lines: list[str] = []
    size = 0
    while line := stream.readline(_MAX_HEAD_BYTES):
        size += len(line)
        if size > _MAX_HEAD_BYTES:
            raise ConnectionError("the request's head is too long")
        text = line.decode("latin-1").rstrip("\r\n")
        if text:
            lines.append(text)
        elif lines:  # the empty line that ends the head; HTTP lets empty lines before a request be skipped
            words = lines[0].split(" ")
            if len(words) != 3:
                raise ConnectionError("this is not an HTTP request")
            fields = (header.partition(":") for header in lines[1:])
            headers = {name.strip().lower(): value.strip() for name, _, value in fields}
            return Request(words[0], unquote(words[1].partition("?")[0]), headers)
    return None


def respond(request: Request, stored: StoredObject | None, fault: Fault | None) -> Response:
    """Compute S3's response to a request, made wrong as ``fault`` says.

    Args:
        request: The request.
        stored: The object at its path; None: there is none.
        fault: The fault that strikes the request. A fault of the connection leaves the response as it is.
    """
    kind = None if fault is None else fault.kind
    if fault is not None and kind is FaultKind.STATUS:
        return _error(request, fault.status, fault.code)
    if request.method not in ("GET", "HEAD"):
        return _error(request, 405)
    if stored is None:
        return _error(request, 404)
    if fault is not None and kind is FaultKind.NO_IF_MATCH and "if-match" in request.headers:
        return _error(request, fault.status, fault.code)
    # These faults are made by ignoring a header: a server that knows no ranges sends the whole object, and one that
    # compares no ETags sends another version.
    ignored = _IGNORED.get(kind) if kind else None
    headers = {name: value for name, value in request.headers.items() if name != ignored}
    if kind is FaultKind.WEAK_ETAG:
        stored = replace(stored, etag=f"W/{stored.etag.removeprefix('W/')}")
    response = _right_response(replace(request, headers=headers), stored)
    # An error that is right, such as 416, stays as it is: the faults are about bodies of the object.
    return response if fault is None or response.status >= 300 else _wrong_response(response, request, stored, fault)


def byte_range(header: str | None, size: int) -> range | None:
    """Bytes of an object of ``size`` bytes that a Range header asks for.

    Returns:
        The positions, empty if the object has none of them; None if S3 would ignore the header.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    # S3 ignores units that it doesn't know, and several ranges in one header.
    if match is None or match[0] == "bytes=-":
        return None
    if not match[1]:
        return range(max(size - int(match[2]), 0), size)
    first, last = int(match[1]), int(match[2] or size)
    return range(first, min(last + 1, size)) if first <= last or not match[2] else None


def _right_response(request: Request, stored: StoredObject) -> Response:
    # Compared strongly, as RFC 9110 says: a weak ETag never fits.
    condition = request.headers.get("if-match", "*")
    if condition != "*" and (condition != stored.etag or condition.startswith("W/")):
        return _error(request, 412)
    size = len(stored.data)
    asked = byte_range(request.headers.get("range"), size)
    if asked is not None and not asked:
        return _error(request, 416)
    start, end = (0, size) if asked is None else (asked.start, asked.stop)
    headers = {
        "Content-Type": "binary/octet-stream",
        "Content-Length": str(end - start),
        "Accept-Ranges": "bytes",
        **stored.headers,
    }
    if stored.etag:
        headers["ETag"] = stored.etag
    if asked is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    body = stored.data[start:end] if request.method == "GET" else memoryview(b"")
    return Response(200 if asked is None else 206, headers, body)


def _error(request: Request, status: int, code: str = "") -> Response:
    usual_code, message = _ERRORS.get(status, ("InternalError", "Injected by the test"))
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code or usual_code}</Code><Message>{message}</Message><RequestId>0</RequestId></Error>"
    ).encode()
    headers = {"Content-Type": "application/xml", "Content-Length": str(len(body))}
    return Response(status, headers, memoryview(b"" if request.method == "HEAD" else body))


def _wrong_response(response: Response, request: Request, stored: StoredObject, fault: Fault) -> Response:
    """Change what the fault is about, and leave everything else of the response right."""
    headers, body, size = dict(response.headers), response.body, len(stored.data)
    asked = byte_range(request.headers.get("range"), size) or range(size)
    start, end = asked.start, asked.stop
    match fault.kind:
        case FaultKind.WRONG_LENGTH:
            headers["Content-Length"] = str(end - start + fault.delta)
            body = body[: end - start + fault.delta]  # no more than is announced; if there is less, it ends early
        case FaultKind.WRONG_RANGE:
            headers["Content-Range"] = f"bytes {start + fault.delta}-{end - 1 + fault.delta}/{size}"
        case FaultKind.WRONG_TOTAL:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size + fault.delta}"
        case FaultKind.EXTRA_BYTES:
            body = memoryview(bytes(body) + b"\xff" * fault.delta)
        case kind if kind in _WRONG_VERSIONS:
            headers.update(_WRONG_VERSIONS[kind])
            headers = {name: value for name, value in headers.items() if value}
        case FaultKind.COMPRESSED:
            del headers["Content-Length"]
            headers.update({"Content-Encoding": "gzip", "Transfer-Encoding": "chunked"})
            body = memoryview(_chunks(gzip.compress(body)) if request.method == "GET" else b"")
        case FaultKind.FLIPPED_BIT if body:
            flipped = bytearray(body)
            # covering is a position in the object, after_bytes one in the body.
            position = fault.unchanged_bytes(len(body)) if fault.covering is None else fault.covering - start
            flipped[min(position, len(flipped) - 1)] ^= 1
            body = memoryview(flipped)
    return Response(response.status, headers, body)


def _chunks(body: bytes) -> bytes:
    """Write a body as a single chunk, and the end of the chunks."""
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)

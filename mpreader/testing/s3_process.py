"""Process of the embedded S3 server: moto behind a keep-alive HTTP server, and a shortcut for ranged GETs.

moto reads a whole object for every range of it, which is too slow to load checkpoints from. The shortcut answers a
plain, authorised, satisfiable ranged GET of an object's newest version from the file in which moto keeps it; moto
answers all other requests. Only :mod:`mpreader.testing.s3_server` runs this module, in a process of its own: nothing
else may import it, since it needs moto.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import ssl
import sys
import threading
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.exceptions import S3ClientError
from moto.s3.models import FakeKey, s3_backends
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler
from werkzeug.test import run_wsgi_app

from mpreader.testing.certificate import server_context
from mpreader.testing.request_log import LOG_PATH
from mpreader.testing.response import byte_range

__all__ = ["serve"]

_TLS_CHUNK_BYTES: Final = 1024 * 1024
# Headers that change the response in ways that only moto knows.
_ODD_HEADERS: Final = ("If-None-Match", "If-Modified-Since", "If-Unmodified-Since")
# A URL that was presigned has one of these, by the version of the signature.
_SIGNATURES: Final = frozenset({"Signature", "X-Amz-Signature"})
# Parameters of a presigned URL; others, such as versionId, ask for something special.
_PLAIN_QUERY: Final = re.compile(r"x-amz-.*|x-id|signature|awsaccesskeyid|expires", re.IGNORECASE)


def serve(port: int, certificate_file: str | None) -> None:
    """Serve on 127.0.0.1 until the standard input ends; print the URL as the first line.

    Args:
        port: TCP port, 0 for any free one.
        certificate_file: PEM file of the certificate and its private key, to speak https. None: http.
    """
    with _Server(port, None if certificate_file is None else server_context(certificate_file)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        scheme = "http" if certificate_file is None else "https"
        print(f"{scheme}://127.0.0.1:{server.port}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            sys.stdin.buffer.read()  # its end tells that the owner has ended, however that happened
        # Not the interpreter's usual end, in which moto warns of every object that it still holds.
        os._exit(0)


class _Server(ThreadedWSGIServer):
    """HTTP server with a thread for each connection.

    Attributes:
        log_entries: Fields of an ``S3Request`` for each request, in the order of the responses.
        moto_lock: Held while moto, or one of its objects, is used.
    """

    def __init__(self, port: int, context: ssl.SSLContext | None) -> None:
        self.log_entries: list[dict[str, Any]] = []
        # moto is not thread-safe: it closes and rewinds files of objects that another of its threads is reading.
        self.moto_lock = threading.Lock()
        super().__init__("127.0.0.1", port, DomainDispatcherApplication(create_backend_app), _Handler)
        if context is not None:
            # The handshake is left to the connection's thread: here a client that sends nothing would block accept().
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
            self.ssl_context = context


class _Handler(WSGIRequestHandler):
    """Answers the requests of one connection, in its thread."""

    server: _Server
    disable_nagle_algorithm = True  # head and body are sent one after the other

    def run_wsgi(self) -> None:
        if self.path == LOG_PATH:
            self._answer(HTTPStatus.OK, {}, json.dumps(self.server.log_entries).encode())
        elif not self._answer_range():
            self._answer_with_moto()

    def log(self, type: str, message: str, *args: Any) -> None:
        """Print nothing: the requests are in the log that S3Server fetches."""

    def _begin(self, status: int) -> None:
        # Logged before anything is sent: a client that has its response must find the request in the log.
        path = unquote(urlsplit(self.path).path)
        entry = {"method": self.command, "path": path, "range": self.headers["Range"], "status": int(status)}
        self.server.log_entries.append(entry)
        self.send_response(status)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self._begin(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in map(str.lower, headers):  # keep-alive needs one; of a HEAD moto knows the right one
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer_with_moto(self) -> None:
        # werkzeug's own run_wsgi closes the connection after each answer, and waits 10 ms before it does.
        environ = self.make_environ()
        length = int(self.headers["Content-Length"] or 0)
        chunked = bool(environ.get("wsgi.input_terminated"))
        # The body is read here, not by moto under its lock: a slow client would hold up all others.
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read() if chunked else self.rfile.read(length))
        with self.server.moto_lock:
            body, status, headers = run_wsgi_app(self.server.app, environ, buffered=True)
        self._answer(int(status.split()[0]), dict(headers.items()), b"".join(body))

    def _answer_range(self) -> bool:
        """Answer a ranged GET from the object's file; False if moto must answer it."""
        with self.server.moto_lock:
            key = self._plain_key()
            asked = None if key is None else byte_range(self.headers["Range"], key.size)
            if key is None or not asked or self.headers.get("If-Match", key.etag) not in (key.etag, "*"):
                return False
            stored = _stored_headers(key)  # under the lock, since moto computes the ETag from the buffer
            key._value_buffer.flush()  # moto writes through a buffer
            file = os.dup(key._value_buffer.fileno())  # stays open when moto closes its own, as when it is overwritten
        # Sent without the lock, by position: moto's threads may move the offset that the two descriptors share.
        try:
            self._begin(HTTPStatus.PARTIAL_CONTENT)
            self.send_header("Content-Range", f"bytes {asked.start}-{asked.stop - 1}/{key.size}")
            self.send_header("Content-Length", str(len(asked)))
            for name, value in stored.items():
                self.send_header(name, value)
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            _send(self.connection, file, asked.start, asked.stop)
        finally:
            os.close(file)
        return True

    def _plain_key(self) -> FakeKey | None:
        """The object, if the request is a GET of a range of it with nothing special about it; else None."""
        url = urlsplit(self.path)
        query = {name for name, _ in parse_qsl(url.query, keep_blank_values=True)}
        authorised = "Authorization" in self.headers or not query.isdisjoint(_SIGNATURES)
        odd_query = not all(map(_PLAIN_QUERY.fullmatch, query))
        odd_headers = any(name in self.headers for name in _ODD_HEADERS)
        bucket, _, name = unquote(url.path).removeprefix("/").partition("/")
        if self.command != "GET" or "Range" not in self.headers or not authorised or odd_query or odd_headers:
            return None
        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        try:
            key = backend.get_object(bucket, name)
            has_policy = backend.get_bucket(bucket).policy is not None
        except S3ClientError:
            return None  # moto answers with this error
        plain = isinstance(key, FakeKey) and key.storage_class == "STANDARD" and not key.encryption and not has_policy
        return key if plain else None


def _stored_headers(key: FakeKey) -> dict[str, str]:
    """Headers that S3 sends with every response about an object: what it says of the version, and what was stored."""
    headers = {"content-type": "binary/octet-stream"}
    headers.update((name.lower(), str(value)) for name, value in {**key.response_dict, **key.metadata}.items())
    # The length of the whole object, and what only moto sends.
    for name in ("content-length", "x-amz-sdk-checksum-algorithm", "x-amz-content-sha256"):
        headers.pop(name, None)
    return headers


def _send(connection: socket.socket, file: int, start: int, end: int) -> None:
    tls = isinstance(connection, ssl.SSLSocket)  # sendfile() would send the bytes past it, unencrypted
    while start < end:
        if tls:
            chunk = os.pread(file, min(end - start, _TLS_CHUNK_BYTES), start)
            connection.sendall(chunk)
            start += len(chunk)
        else:
            start += os.sendfile(connection.fileno(), file, start, end - start)

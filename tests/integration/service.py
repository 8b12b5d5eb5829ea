"""Service: an S3 of a few objects that answers as a test wants, and checks signatures as S3 does.

Not by botocore, whose signatures it checks: what both got wrong alike would pass. moto checks none.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

if TYPE_CHECKING:
    import pytest
    from typing_extensions import Self

# Keys that URLs, signatures and paths get wrong.
ODD_KEYS = (
    "plain",
    "with space+plus",
    "ünïcödé/键/😀",
    "a#b?c=d&e;f",
    "100%25%2F%",
    "../up/../and/./down",
    "/leading",
    "two//slashes",
    "~t*'()!",
    'q"<>\\^`{|}',
)
ACCESS_KEY = "AKIAOFTHESERVICE0000"
SECRET_KEY = "the/secret+key/of/the/Service0123456789a"
MODIFIED = "Thu, 01 Jan 2026 00:00:00 GMT"


class Call(NamedTuple):
    """A request as it came; ``path`` is percent-decoded, names of headers are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]

    @property
    def raw_path(self) -> str:
        # Not urlsplit: it would take a path that begins with two slashes for a host.
        return self.target.partition("?")[0]

    @property
    def path(self) -> str:
        return unquote(self.raw_path)

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    @property
    def is_presigned(self) -> bool:
        return "X-Amz-Signature" in self.query


class Answer(NamedTuple):
    """A response, with exactly these headers; the body of one to HEAD is left out."""

    status: int
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = b""


Hook = Callable[[Call], "Answer | bytes | None"]
"""Answers a request in the service's place: with bytes as they are, after which it hangs up; None: it does not."""


def error(status: int, code: str, message: str = "said the service", *headers: tuple[str, str]) -> Answer:
    """An error as S3 words it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return Answer(status, (("Content-Type", "application/xml"), ("Content-Length", str(len(body))), *headers), body)


def set_environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """Set these variables for boto3 and mpreader, in place of the developer's own settings of AWS and of proxies."""
    for name in [*os.environ]:
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    usual = {
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "MPREADER_PROGRESS": "0",
    }
    for name, value in {**usual, **variables}.items():
        monkeypatch.setenv(name, value)


class Service(ThreadingHTTPServer):
    """An S3 at ``url``; used in a ``with`` statement.

    Args:
        objects: Objects by path, ``/bucket/key`` or, for virtual hosts, ``/key``.
        hook: Answers first.
        credentials: Secret keys by access key; requests must be signed by one of them. None: nothing is checked.
        token: Session token that a request must have signed; None: it must have none.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        objects: Mapping[str, bytes],
        hook: Hook = lambda _: None,
        credentials: Mapping[str, str] | None = None,
        token: str | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects = dict(objects)
        self.hook = hook
        self.credentials = credentials
        self.token = token
        self.seen: list[Call] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep quiet: a client may close at any time."""

    def calls(self, method: str) -> list[Call]:
        """Requests by this method, so far."""
        return [call for call in list(self.seen) if call.method == method]

    def usual(self, call: Call) -> Answer:
        """The answer of S3."""
        refusal = self._refusal(call)
        if refusal is not None:
            return refusal
        if "list-type" in call.query:
            return self._listing(call)
        data = self.objects.get(call.path)
        if data is None:
            return error(404, "NoSuchKey")
        facts = [
            ("ETag", f'"{hashlib.md5(data).hexdigest()}"'),
            ("Last-Modified", MODIFIED),
            ("Accept-Ranges", "bytes"),
        ]
        wanted = call.headers.get("if-match")
        if wanted is not None and wanted != facts[0][1]:
            return error(412, "PreconditionFailed")
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", ""))
        if match is None:
            return Answer(200, [*facts, ("Content-Length", str(len(data)))], data)
        start, end = int(match[1]), min(len(data), int(match[2]) + 1 if match[2] else len(data))
        if start >= len(data):
            return error(416, "InvalidRange", "", ("Content-Range", f"bytes */{len(data)}"))
        facts += [("Content-Range", f"bytes {start}-{end - 1}/{len(data)}"), ("Content-Length", str(end - start))]
        return Answer(206, facts, data[start:end])

    def _listing(self, call: Call) -> Answer:
        bucket, prefix = call.path.strip("/"), call.query.get("prefix", "")
        keys = [path.removeprefix(f"/{bucket}/") for path in self.objects if path.startswith(f"/{bucket}/{prefix}")]
        entries = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(self.objects[f'/{bucket}/{key}'])}</Size></Contents>" for key in keys
        )
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()
        return Answer(200, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))], body)

    def _refusal(self, call: Call) -> Answer | None:
        if self.credentials is None:
            return None
        wrong = signature_mistake(call, self.credentials, self.token)
        return error(403, "SignatureDoesNotMatch", wrong) if wrong else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        call = Call(self.command, self._target(), headers)
        self.server.seen.append(call)
        answer = self.server.hook(call)
        if answer is None:
            answer = self.server.usual(call)
        if isinstance(answer, bytes):
            self.close_connection = True
            self.wfile.write(answer)
            return
        head = f"HTTP/1.1 {answer.status} Said\r\n" + "".join(f"{name}: {value}\r\n" for name, value in answer.headers)
        body = b"" if self.command == "HEAD" else answer.body
        self.wfile.write(f"{head}\r\n".encode("latin-1") + body)

    def _target(self) -> str:
        if not self.path.startswith("http://"):
            return self.path
        parts = urlsplit(self.path)  # as a proxy is asked
        return f"{parts.path}?{parts.query}" if parts.query else parts.path


def signature_mistake(call: Call, credentials: Mapping[str, str], token: str | None = None) -> str:
    """What is wrong with a request's SigV4 signature, in its headers or its query; "" if it is right."""
    if call.is_presigned:
        fields = {name: call.query.get(f"X-Amz-{name}", "") for name in ("Credential", "SignedHeaders", "Signature")}
        date, payload = call.query.get("X-Amz-Date", ""), "UNSIGNED-PAYLOAD"
        found = call.query.get("X-Amz-Security-Token")
    else:
        fields = dict(
            re.findall(r"(Credential|SignedHeaders|Signature)=([^,\s]+)", call.headers.get("authorization", ""))
        )
        date, payload = call.headers.get("x-amz-date", ""), call.headers.get("x-amz-content-sha256", "")
        found = call.headers.get("x-amz-security-token")
    if set(fields) != {"Credential", "SignedHeaders", "Signature"}:
        return "there is no signature"
    key, _, scope = fields["Credential"].partition("/")
    if key not in credentials:
        return f"the access key {key} is unknown"
    if found != token:
        return f"the session token is {found}"
    unsigned = {name for name in call.headers if name.startswith("x-amz-")} - set(fields["SignedHeaders"].split(";"))
    if unsigned or "host" not in fields["SignedHeaders"].split(";"):
        return f"not signed: {unsigned or 'host'}"
    at = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
    if abs((datetime.now(timezone.utc) - at).total_seconds()) > 900:
        return "the date is another"
    signature = _signature(call, credentials[key], scope, fields["SignedHeaders"], date, payload)
    return "" if hmac.compare_digest(signature, fields["Signature"]) else "the signature is another"


def _signature(call: Call, secret: str, scope: str, signed: str, date: str, payload: str) -> str:
    query = sorted(
        (quote(name, safe="-_.~"), quote(value, safe="-_.~"))
        for name, value in call.query.items()
        if name != "X-Amz-Signature"
    )
    canonical = "\n".join(
        (
            call.method,
            call.raw_path,
            "&".join(f"{name}={value}" for name, value in query),
            *(f"{name}:{' '.join(call.headers.get(name, '').split())}" for name in signed.split(";")),
            "",
            signed,
            payload,
        )
    )
    to_sign = f"AWS4-HMAC-SHA256\n{date}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    step = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        step = hmac.digest(step, part.encode(), "sha256")
    return hmac.new(step, to_sign.encode(), "sha256").hexdigest()

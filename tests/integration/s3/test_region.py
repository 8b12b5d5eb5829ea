"""A bucket of another region, against a server that refuses signatures as S3 does (moto takes them all)."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

from mpreader import AccessDenied, PoolConfig, RangeFetcher, S3Client, S3ClientConfig, TransportError
from mpreader.dcp import load_checkpoint
from mpreader.sources.s3 import S3Source

_HOME = "eu-west-1"
_DATA = b"in another region"


class _Handler(BaseHTTPRequestHandler):
    """One object, for signatures of its region alone; the path says in which way the others are refused."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def _answer(self) -> None:
        scope = re.search(r"Credential=[^/]+/\d+/([^/]+)/s3/", unquote(self.headers.get("Authorization", self.path)))
        region = scope[1] if scope else ""
        self.server.seen.append((self.command, region))
        if "nowhere" in self.path:
            self._send(301, _error("PermanentRedirect"), {})
        elif "denied" in self.path:
            self._send(403, _error("ExpiredToken" if "expired" in self.path else "AccessDenied"), {})
        elif "payer" in self.path and self.headers.get("x-amz-request-payer") != "requester":
            self._send(403, _error("AccessDenied"), {})
        elif region == _HOME:
            self._send(206 if "Range" in self.headers else 200, _DATA, self._facts())
        elif "moved" in self.path:
            self._send(301, _error("PermanentRedirect"), self._hint())
        else:
            body = _error("AuthorizationHeaderMalformed", f"<Region>{_HOME}</Region>")
            self._send(400, body, self._hint())

    def _facts(self) -> dict[str, str]:
        last = len(_DATA) - 1
        return {
            "ETag": '"etag"',
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            "Content-Range": f"bytes 0-{last}/{len(_DATA)}",
        }

    def _hint(self) -> dict[str, str]:
        return {} if "unhelpful" in self.path else {"x-amz-bucket-region": _HOME}

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[tuple[str, str]] = []


def _error(code: str, more: str = "") -> bytes:
    return f"<Error><Code>{code}</Code><Message>said the server</Message>{more}</Error>".encode()


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def client(server: _Server, aws_environment: None) -> Iterator[S3Client]:
    client = S3Client(
        "us-east-1", endpoint=f"http://127.0.0.1:{server.server_port}", s3client_config=S3ClientConfig(max_attempts=2)
    )
    yield client
    client.close()


@pytest.mark.parametrize("key", ["key", "moved"])
@pytest.mark.row("403, 404, wrong region")
def test_source_follows_the_bucket_and_signs_routes_for_its_region(client: S3Client, server: _Server, key: str) -> None:
    source = S3Source(client, "bucket", key)
    assert source.open()[:2] == (len(_DATA), '"etag"')
    assert server.seen[0] == ("HEAD", "us-east-1")

    route = source.route()
    connection = http.client.HTTPConnection(route.host, route.port, timeout=10)
    connection.request("GET", route.target, headers=dict(route.headers))
    assert connection.getresponse().read() == _DATA
    connection.close()

    del server.seen[:]
    client.head_object("bucket", key)
    assert server.seen == [("HEAD", _HOME)]  # what was found out once is known


def test_reader_follows_the_bucket(client: S3Client) -> None:
    assert client.get_object("bucket", "moved").read() == _DATA


@pytest.mark.row("403, 404, wrong region")
def test_source_that_can_not_follow_says_which_setting_to_change(client: S3Client) -> None:
    with pytest.raises(TransportError, match=r"another region.*region=.*\[region us-east-1, endpoint http://127"):
        S3Source(client, "unhelpful", "moved").open()


def _fetch(client: S3Client, bucket: str) -> object:
    with RangeFetcher(client.s3client_config, PoolConfig(workers=1)) as fetcher:
        return fetcher.fetch(f"s3://{bucket}/key", [(0, 1)])


@pytest.mark.parametrize("bucket", ["nowhere", "nowhere--use1-az4--x-s3"], ids=["bucket", "directory-bucket"])
@pytest.mark.parametrize(
    "use",
    [
        lambda client, bucket: client.head_object(bucket, "key"),
        lambda client, bucket: next(client.list_objects(bucket)),
        lambda client, bucket: client.call("head_bucket", bucket),
        lambda client, bucket: client.get_object(bucket, "key").read(),
        lambda client, bucket: client.put_object(bucket, "key").close(),
        lambda client, bucket: client.copy_object("bucket", "key", bucket, "key"),
        _fetch,
        lambda client, bucket: load_checkpoint(f"s3://{bucket}/run", s3client_config=client.s3client_config),
    ],
    ids=["head", "list", "head-bucket", "read", "write", "copy", "fetch", "load"],
)
def test_redirect_that_names_no_region_is_an_error_that_says_what_to_check(
    client: S3Client, server: _Server, use: Callable[[S3Client, str], object], bucket: str
) -> None:
    with pytest.raises(TransportError, match=r"redirects the request.*check endpoint_url.*region=.*HTTP 301"):
        use(client, bucket)
    assert len(server.seen) < 10


@pytest.mark.parametrize(("key", "said"), [("denied", "AccessDenied"), ("denied-expired", "ExpiredToken")])
def test_refused_head_tells_the_reason_that_only_a_get_is_given(client: S3Client, key: str, said: str) -> None:
    with pytest.raises(AccessDenied, match=f"HTTP 403 {said}: said the server"):
        S3Source(client, "bucket", key).open()


def test_requester_pays_is_said_in_every_request(client: S3Client, server: _Server) -> None:
    with pytest.raises(AccessDenied, match="requester_pays=True"):
        client.head_object("bucket", "payer")
    config = S3ClientConfig(region=_HOME, endpoint_url=f"http://127.0.0.1:{server.server_port}", requester_pays=True)
    paying = S3Client(s3client_config=config)
    assert paying.head_object("bucket", "payer").size == len(_DATA)
    assert paying.get_object("bucket", "payer").read() == _DATA
    paying.close()

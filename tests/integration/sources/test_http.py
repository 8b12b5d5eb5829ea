"""HttpSource against real HTTP servers."""

from __future__ import annotations

import base64
import http.client
import pickle
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mpreader import AccessDenied, ObjectMissing, PoolConfig, RangeFetcher, S3Client, TransportError
from mpreader.pool.worker.route import Route
from mpreader.pool.worker.version import ObjectVersion
from mpreader.sources.http import HttpSource
from mpreader.sources.s3 import S3Source
from mpreader.testing import Fault, FaultKind, FaultServer

DATA = bytes(range(256)) * 10
Answer = tuple[int, dict[str, str], bytes]


class _Server(ThreadingHTTPServer):
    """Answers by a function of the request."""

    daemon_threads = True

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.seen: list[tuple[str, str, str | None]] = []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def _answer(self) -> None:
        self.server.seen.append((self.command, self.path, self.headers["Authorization"]))
        status, headers, body = self.server.answer(self)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


Start = Callable[[Callable[[BaseHTTPRequestHandler], Answer]], _Server]


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[tuple[_Server, threading.Thread]] = []

    def run(answer: Callable[[BaseHTTPRequestHandler], Answer]) -> _Server:
        server = _Server(answer)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        running.append((server, thread))
        return server

    yield run
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def _url(server: _Server, path: str, user: str = "") -> str:
    return f"http://{user}127.0.0.1:{server.server_port}{path}"


def _fetch(route: Route, start: int, end: int) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(route.host, route.port, timeout=30)
    connection.request("GET", route.target, headers={**dict(route.headers), "Range": f"bytes={start}-{end - 1}"})
    response = connection.getresponse()
    answer = response.status, response.read()
    connection.close()
    return answer


def test_source_tells_version_and_route() -> None:
    with FaultServer({"/dir/a b+ü%": DATA}) as server:
        source = HttpSource(server.endpoint_url + "/dir/a b+ü%25?secret=1#fragment")
        version = source.open()
        assert version.size == len(DATA)
        assert version.etag.startswith('"')
        route = source.route()
        assert route.target == "/dir/a%20b+%C3%BC%25?secret=1"
        assert _fetch(route, 5, 50) == (206, DATA[5:50])
        assert [request.method for request in server.requests] == ["HEAD", "GET"]
        assert source.bucket == server.endpoint_url.removeprefix("http://")
        assert source.key.startswith("/dir/")
        assert "secret" not in f"{source!r} {route!r} {source.key}"


def test_source_speaks_tls_with_the_authority_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer({"/key": DATA}, tls=True) as server:
        with pytest.raises(TransportError, match=r"(?i)certificate"):
            HttpSource(server.url("/key")).open()
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            monkeypatch.setenv(name, str(server.ca_file))
            source = HttpSource(server.url("/key"))
            assert source.open().size == len(DATA)
            assert (source.route().tls, source.route().ca_file) == (True, str(server.ca_file))
            monkeypatch.delenv(name)


def test_source_survives_a_busy_server() -> None:
    with FaultServer({"/key": DATA}, [Fault(FaultKind.STATUS, at=(1, 2), method="HEAD", status=503)]) as server:
        assert HttpSource(server.url("/key"), max_attempts=3).open().size == len(DATA)
        server.inject(Fault(FaultKind.STATUS, method="HEAD", status=503))
        with pytest.raises(TransportError, match="HTTP 503"):
            HttpSource(server.url("/key"), max_attempts=2).open()


def test_source_asks_again_soon_whatever_a_busy_server_says(start: Start) -> None:
    def answer(request: BaseHTTPRequestHandler) -> Answer:
        return (200, {}, DATA) if len(server.seen) > 1 else (503, {"Retry-After": "3600"}, b"")

    server = start(answer)
    assert HttpSource(_url(server, "/key")).open().size == len(DATA)


def test_source_opens_a_url_that_is_presigned_for_get(bucket: str) -> None:
    client = S3Client()
    for key, data in (("key", DATA), ("empty", b"")):
        with client.put_object(bucket, key) as writer:
            writer.write(data)
        route = S3Source(client, bucket, key).route()
        source = HttpSource(f"http://{dict(route.headers)['Host']}{route.target}")
        assert source.open()[:2] == (len(data), client.head_object(bucket, key).etag)
        assert source.route().target == route.target
    client.close()


@pytest.mark.parametrize("status", [403, 405, 501])
@pytest.mark.parametrize("size", [0, len(DATA)])
def test_source_asks_by_get_where_head_is_refused(start: Start, status: int, size: int) -> None:
    def answer(request: BaseHTTPRequestHandler) -> Answer:
        if request.command == "HEAD":
            return status, {}, b""
        assert request.headers["Range"] == "bytes=0-0"
        content_range = f"bytes 0-0/{size}" if size else "bytes */0"
        return 206 if size else 416, {"Content-Range": content_range, "ETag": '"tag"'}, DATA[:1] if size else b""

    assert HttpSource(_url(start(answer), "/key")).open() == ObjectVersion(size, '"tag"')


@pytest.mark.parametrize("etag", ["", 'W/"weak"', '"strong"'])
def test_source_tells_every_validator_of_the_server(start: Start, etag: str) -> None:
    server = start(lambda request: (200, {"ETag": etag, "X-Goog-Generation": "7"}, DATA))
    assert HttpSource(_url(server, "/key")).open() == ObjectVersion(len(DATA), etag, (("x-goog-generation", "7"),))


@pytest.mark.parametrize("size", [0, 1])
def test_source_of_a_byte_may_be_answered_with_all_of_it(start: Start, size: int) -> None:
    def answer(request: BaseHTTPRequestHandler) -> Answer:
        return (405, {}, b"") if request.command == "HEAD" else (200, {"ETag": '"tag"'}, b"x" * size)

    assert HttpSource(_url(start(answer), "/key")).open() == ObjectVersion(size, '"tag"')


@pytest.mark.parametrize("refuses_head", [False, True])
def test_server_without_ranges_serves_whatever_is_asked_for_at_once(start: Start, refuses_head: bool) -> None:
    def answer(request: BaseHTTPRequestHandler) -> Answer:
        is_refused = refuses_head and request.command == "HEAD"
        return (405, {}, b"") if is_refused else (200, {"Accept-Ranges": "none", "ETag": '"1"'}, DATA)

    url = _url(start(answer), "/key")
    with RangeFetcher(pool_config=PoolConfig(1, 1)) as fetcher:
        assert fetcher.fetch_object(url) == DATA
        assert fetcher.fetch(url, [(0, 10), (20, None)])[1] == DATA[20:]
        with pytest.raises(TransportError, match="whole object in place of a range"):
            fetcher.fetch(url, [(0, 10)])


GZIP = {"Content-Encoding": "gzip"}


@pytest.mark.parametrize(
    ("head", "get", "expected"),
    [
        # Stored so: the range is one of as many bytes as HEAD has stated.
        ((200, GZIP, DATA), (206, {**GZIP, "Content-Range": f"bytes 0-0/{len(DATA)}"}, DATA[:1]), "gzip"),
        ((200, GZIP, b""), (416, {"Content-Range": "bytes */0"}, b""), ""),
        ((200, GZIP, b""), (416, {}, b""), ""),
        ((200, GZIP, b"x"), (200, GZIP, b"x"), "gzip"),
        # Compressed for HEAD only: the range is one of the plain bytes, which can be read.
        ((200, GZIP, b"x" * 40), (206, {"Content-Range": f"bytes 0-0/{len(DATA)}"}, DATA[:1]), ""),
    ],
)
def test_source_with_an_encoding_is_read_as_it_is_stored(
    start: Start, head: Answer, get: Answer, expected: str
) -> None:
    server = start(lambda request: head if request.command == "HEAD" else get)
    version = HttpSource(_url(server, "/key")).open()
    size = int(get[1].get("Content-Range", f"/{len(get[2])}").rpartition("/")[2])
    assert (version.size, version.encoding) == (size, expected)


@pytest.mark.parametrize(
    "get",
    [
        (206, {**GZIP, "Content-Range": f"bytes 0-0/{len(DATA)}"}, DATA[:1]),
        (200, GZIP, b"x" * 40),
        (200, {**GZIP, "Content-Length": "", "Connection": "close"}, b"x" * 40),
    ],
)
def test_source_that_compresses_whatever_is_asked_says_so(start: Start, get: Answer) -> None:
    server = start(lambda request: (200, GZIP, b"x" * 40) if request.command == "HEAD" else get)
    with pytest.raises(TransportError, match="compresses"):
        HttpSource(_url(server, "/key")).open()


def test_source_sends_the_password_to_its_own_server_only(start: Start) -> None:
    other = start(lambda request: (200, {}, DATA))

    def answer(request: BaseHTTPRequestHandler) -> Answer:
        if request.path == "/start":
            return 302, {"Location": "/second"}, b""
        return 307, {"Location": _url(other, "/end?signed=1")}, b""

    first = start(answer)
    source = HttpSource(_url(first, "/start", user="me:p%40ss@"))
    source.open()
    basic = "Basic " + base64.b64encode(b"me:p@ss").decode()
    assert first.seen == [("HEAD", "/start", basic), ("HEAD", "/second", basic)]
    assert other.seen == [("HEAD", "/end?signed=1", None)]
    route = source.route()
    assert (route.port, route.target) == (other.server_port, "/end?signed=1")
    assert route.headers == (("Host", f"127.0.0.1:{other.server_port}"),)
    assert not any(secret in f"{source!r}{route!r}" for secret in ("p%40ss", "p@ss", "signed"))

    direct = HttpSource(_url(other, "/direct", user="me:p%40ss@"))
    direct.open()
    assert ("Authorization", basic) in direct.route().headers


def test_source_follows_redirects_anew_for_every_further_route(start: Start) -> None:
    def answer(request: BaseHTTPRequestHandler) -> Answer:
        if request.path == "/start":
            return 302, {"Location": f"/signed?number={len(server.seen)}"}, b""
        return 200, {}, DATA

    server = start(answer)
    source = HttpSource(_url(server, "/start"))
    source.open()
    targets = [source.route().target, source.route().target, pickle.loads(pickle.dumps(source)).route().target]
    assert targets == ["/signed?number=1", "/signed?number=3", "/signed?number=5"]


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        ((404, {}, b""), ObjectMissing, "nothing at this URL"),
        ((410, {}, b""), ObjectMissing, "nothing at this URL"),
        ((401, {}, b""), AccessDenied, "user:password@"),
        ((403, {}, b""), AccessDenied, "HTTP 403"),
        ((200, {"Content-Encoding": "gzip"}, DATA), TransportError, "compresses"),
        ((200, {"Content-Length": "", "Connection": "close"}, DATA), TransportError, "only the whole"),
        ((302, {"Location": "/again"}, b""), TransportError, "more than 10 redirects"),
        ((302, {"Location": "file:///etc/passwd"}, b""), TransportError, "not an http"),
        ((418, {}, b""), TransportError, "HTTP 418"),
        ((206, {"Content-Range": "bytes 0-0/*"}, DATA[:1]), TransportError, "does not tell its size"),
    ],
)
def test_source_that_can_not_be_read_says_why(
    start: Start, answer: Answer, kind: type[TransportError], said: str
) -> None:
    url = _url(start(lambda request: answer), "/key?token=secret", user="me:pass@")
    with pytest.raises(TransportError, match=said) as caught:
        HttpSource(url).open()
    assert type(caught.value) is kind
    assert caught.value.key == "/key"
    assert not any(secret in str(caught.value) for secret in ("secret", "me:pass@"))


def test_source_that_is_not_there_names_the_host() -> None:
    with pytest.raises(TransportError, match=r"no answer from 127\.0\.0\.1:1"):
        HttpSource("http://127.0.0.1:1/key?token=secret", max_attempts=2).open()


def test_source_goes_through_the_proxy(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    proxied: list[str | None] = []

    def answer(request: BaseHTTPRequestHandler) -> Answer:
        proxied.append(request.headers["Proxy-Authorization"])
        return 200, {}, DATA

    proxy = start(answer)
    monkeypatch.setenv("HTTP_PROXY", _url(proxy, "", user="me:word@"))
    source = HttpSource("http://store.invalid/key")
    assert source.open().size == len(DATA)
    assert proxy.seen[0][1] == "http://store.invalid/key"
    assert proxied == ["Basic bWU6d29yZA=="]
    route = source.route()
    assert route.proxy is not None
    assert (route.host, route.proxy.port) == ("store.invalid", proxy.server_port)
    assert "bWU6d29yZA" not in repr(route)


@pytest.mark.parametrize(("status", "kind"), [(403, AccessDenied), (404, ObjectMissing), (410, ObjectMissing)])
def test_refusal_may_be_compressed(start: Start, status: int, kind: type[TransportError]) -> None:
    server = start(lambda _: (status, {"Content-Encoding": "gzip"}, b"the page"))
    with pytest.raises(kind, match=f"HTTP {status}"):
        HttpSource(_url(server, "/a")).open()

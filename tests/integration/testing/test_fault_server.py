"""The fault server misbehaves exactly as its schedule says, and is S3 otherwise."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import pickle
import random
import socket
import ssl
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mpreader.testing import Fault, FaultKind, FaultServer, random_faults, scattered_faults

if TYPE_CHECKING:
    from typing_extensions import Self

KEY = "/bucket/a key"
DATA = random.Random(0).randbytes(300_000)
ETAG = f'"{hashlib.md5(DATA).hexdigest()}"'


def connect(server: FaultServer) -> http.client.HTTPConnection:
    host = server.endpoint_url.partition("//")[2]
    if server.ca_file is not None:
        return http.client.HTTPSConnection(host, context=ssl.create_default_context(cafile=server.ca_file), timeout=30)
    return http.client.HTTPConnection(host, timeout=30)


class Client:
    """One keep-alive connection; `get` gives status, headers and body."""

    def __init__(self, server: FaultServer) -> None:
        self.connection = connect(server)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def open(self, range: str | None = "bytes=100-199", method: str = "GET", **headers: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if range is not None:
            named["Range"] = range
        self.connection.request(method, "/bucket/a%20key?X-Amz-Signature=1", headers=named)
        return self.connection.getresponse()

    def get(self, range: str | None = "bytes=100-199", method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
        with self.open(range, method, **headers) as response:
            return response.status, response.headers, response.read()


@pytest.mark.parametrize("tls", [False, True])
def test_server_answers_ranges_on_one_connection(tls: bool) -> None:
    with FaultServer({KEY: DATA}, tls=tls) as server, Client(server) as client:
        for asked, start, end in (("bytes=0-0", 0, 1), ("bytes=5-", 5, 300_000), ("bytes=-7", 299_993, 300_000)):
            status, headers, body = client.get(asked, If_Match=ETAG)
            assert (status, body) == (206, DATA[start:end])
            assert headers["Content-Range"] == f"bytes {start}-{end - 1}/300000"
            assert headers["ETag"] == ETAG
        for ignored in (None, "bytes=-", "bytes=9-5", "bytes=0-1,5-6", "items=0-1"):
            assert client.get(ignored)[::2] == (200, DATA)
        status, headers, body = client.get(range=None, method="HEAD")
        assert (status, headers["Content-Length"], body) == (200, "300000", b"")
        assert {request.connection for request in server.requests} == {1}
        assert [request.method for request in server.requests] == ["GET"] * 8 + ["HEAD"]


@pytest.mark.parametrize(
    ("range", "headers", "path", "status", "code"),
    [
        ("bytes=300000-", {}, KEY, 416, b"InvalidRange"),
        ("bytes=300000-300005", {}, KEY, 416, b"InvalidRange"),
        ("bytes=-0", {}, KEY, 416, b"InvalidRange"),
        ("bytes=0-9", {"If_Match": '"other"'}, KEY, 412, b"PreconditionFailed"),
        ("bytes=0-9", {}, "/bucket/other", 404, b"NoSuchKey"),
    ],
)
def test_server_refuses_as_s3_does(range: str, headers: dict[str, str], path: str, status: int, code: bytes) -> None:
    with FaultServer({path: DATA}) as server, Client(server) as client:
        got, _, body = client.get(range, **headers)
        assert got == status
        assert b"<Code>" + code + b"</Code>" in body
        assert client.get(range="bytes=1-2", method="HEAD")[2] == b""


def test_server_serves_files_and_new_versions(tmp_path: Path) -> None:
    file = tmp_path / "object"
    file.write_bytes(DATA)
    with FaultServer({KEY: file}) as server, Client(server) as client:
        assert client.get()[2] == DATA[100:200]
        server.put(KEY, b"x" * 300)
        assert client.get(If_Match=ETAG)[0] == 412
        assert client.get()[2] == b"x" * 100


def test_reset_breaks_the_connection_after_the_given_bytes() -> None:
    with FaultServer({KEY: DATA}, [Fault(FaultKind.RESET, at=(2,), after_bytes=30)]) as server:
        with Client(server) as client:
            assert client.get()[2] == DATA[100:200]
            response = client.open()
            assert response.read(30) == DATA[100:130]
            with pytest.raises(ConnectionResetError):
                response.read(1)
            response.close()
        with Client(server) as client:
            assert client.get()[2] == DATA[100:200]
        assert [request.connection for request in server.requests] == [1, 1, 2]
        assert [request.fault is None for request in server.requests] == [True, False, True]


@pytest.mark.parametrize("tls", [False, True])
def test_early_close_ends_the_body_short(tls: bool) -> None:
    with FaultServer({KEY: DATA}, [Fault(FaultKind.EARLY_CLOSE, after_bytes=30)], tls=tls) as server:
        with Client(server) as client, pytest.raises(http.client.IncompleteRead) as caught:
            client.get()
        assert caught.value.partial == DATA[100:130]


def test_close_on_accept_strikes_connections() -> None:
    with FaultServer({KEY: DATA}, [Fault(FaultKind.CLOSE_ON_ACCEPT, at=(1,))]) as server:
        with Client(server) as client, pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
            client.get()
        with Client(server) as client:
            assert client.get()[0] == 206
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("fault", "status", "changed", "body"),
    [
        (Fault(FaultKind.WRONG_RANGE, delta=3), 206, {"Content-Range": "bytes 103-202/300000"}, DATA[100:200]),
        (Fault(FaultKind.WRONG_TOTAL, delta=-1), 206, {"Content-Range": "bytes 100-199/299999"}, DATA[100:200]),
        (Fault(FaultKind.WRONG_LENGTH, delta=-2), 206, {"Content-Length": "98"}, DATA[100:198]),
        (Fault(FaultKind.WHOLE_OBJECT), 200, {"Content-Length": "300000", "Content-Range": None}, DATA),
        (Fault(FaultKind.NO_ETAG), 206, {"ETag": None}, DATA[100:200]),
        (Fault(FaultKind.OTHER_ETAG), 206, {"ETag": '"another-version"'}, DATA[100:200]),
        (Fault(FaultKind.NO_VALIDATORS), 206, {"ETag": None, "Last-Modified": None}, DATA[100:200]),
        (
            Fault(FaultKind.OTHER_MODIFIED),
            206,
            {"ETag": None, "Last-Modified": "Wed, 31 Dec 2025 23:59:59 GMT"},
            DATA[100:200],
        ),
    ],
    ids=lambda value: value.kind.name if isinstance(value, Fault) else "",
)
def test_wrong_answer_is_wrong_only_where_asked(
    fault: Fault, status: int, changed: dict[str, str | None], body: bytes
) -> None:
    with FaultServer({KEY: DATA}) as server, Client(server) as client:
        _, right, _ = client.get()
    with FaultServer({KEY: DATA}, [fault]) as server, Client(server) as client:
        got_status, got, got_body = client.get(If_Match='"old"' if fault.kind.name.startswith("OTHER") else ETAG)
    assert (got_status, got_body) == (status, body)
    assert {name: got[name] for name in {*right, *got, *changed} if got[name] != right[name]} == {
        name: value for name, value in changed.items() if value != right[name]
    }


def test_weak_etag_fits_no_condition() -> None:
    with FaultServer({KEY: DATA}, [Fault(FaultKind.WEAK_ETAG)]) as server, Client(server) as client:
        status, headers, body = client.get()
        assert (status, headers["ETag"], body) == (206, f"W/{ETAG}", DATA[100:200])
        assert [client.get(If_Match=etag)[0] for etag in (ETAG, f"W/{ETAG}", "*")] == [412, 412, 206]
        assert client.get(range=None, method="HEAD")[1]["ETag"] == ETAG


def test_condition_may_be_refused_with_any_status() -> None:
    with FaultServer({KEY: DATA}, [Fault(FaultKind.NO_IF_MATCH, status=501)]) as server, Client(server) as client:
        assert client.get(If_Match=ETAG)[0] == 501
        assert client.get()[2] == DATA[100:200]


def test_compressed_body_is_of_the_range_but_not_its_bytes() -> None:
    with FaultServer({KEY: DATA}, [Fault(FaultKind.COMPRESSED)]) as server, Client(server) as client:
        status, headers, body = client.get()
        assert (status, headers["Content-Encoding"], headers["Content-Length"]) == (206, "gzip", None)
        assert headers["Content-Range"] == "bytes 100-199/300000"
        assert gzip.decompress(body) == DATA[100:200]


def test_object_is_overwritten_just_before_the_response_that_was_chosen() -> None:
    with FaultServer({KEY: DATA}, [Fault(FaultKind.OVERWRITTEN, at=(2,))]) as server, Client(server) as client:
        server.stage(KEY, DATA[::-1], {"ETag": 'W/"2"', "X-Goog-Generation": "7"})
        answers = [client.get() for _ in range(3)]
    assert [body for _, _, body in answers] == [DATA[100:200], *[DATA[::-1][100:200]] * 2]
    (_, first, _), (_, second, _), (_, third, _) = answers
    assert (first["ETag"], first["X-Goog-Generation"]) == (ETAG, None)
    assert (
        (second["ETag"], second["X-Goog-Generation"]) == (third["ETag"], third["X-Goog-Generation"]) == ('W/"2"', "7")
    )
    assert first["Last-Modified"] != second["Last-Modified"] == third["Last-Modified"]


def test_headers_of_an_object_may_be_chosen() -> None:
    with FaultServer({}) as server, Client(server) as client:
        server.put(KEY, DATA, {"ETag": "", "Last-Modified": "", "Content-Encoding": "zstd"})
        for method in ("GET", "HEAD"):
            _, headers, _ = client.get(method=method)
            assert (headers["ETag"], headers["Last-Modified"], headers["Content-Encoding"]) == (None, None, "zstd")


def test_too_long_content_length_ends_with_the_connection() -> None:
    with FaultServer({KEY: DATA}, [Fault(FaultKind.WRONG_LENGTH, delta=5)]) as server, Client(server) as client:
        with pytest.raises(http.client.IncompleteRead) as caught:
            client.get()
        assert (caught.value.partial, caught.value.expected) == (DATA[100:200], 5)


def test_extra_bytes_follow_the_body() -> None:
    with FaultServer({KEY: DATA}, [Fault(FaultKind.EXTRA_BYTES, delta=4)]) as server:
        host, port = server.endpoint_url.partition("//")[2].split(":")
        with socket.create_connection((host, int(port)), timeout=30) as raw:
            raw.sendall(b"GET /bucket/a%20key HTTP/1.1\r\nHost: x\r\nRange: bytes=1-2\r\n\r\n")
            received = b""
            while chunk := raw.recv(65536):
                received += chunk
    assert b"Content-Length: 2\r\n" in received
    assert received.endswith(b"\r\n\r\n" + DATA[1:3] + b"\xff" * 4)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault(FaultKind.STATUS, status=503), b"SlowDown"),
        (Fault(FaultKind.STATUS, status=500), b"InternalError"),
        (Fault(FaultKind.STATUS, status=403, code="ExpiredToken"), b"ExpiredToken"),
    ],
)
def test_status_has_the_error_body_of_s3_and_keeps_the_connection(fault: Fault, code: bytes) -> None:
    with FaultServer({KEY: DATA}, [fault]) as server, Client(server) as client:
        status, _, body = client.get()
        assert status == fault.status
        assert b"<Code>" + code + b"</Code>" in body
        server.inject()
        assert client.get()[0] == 206
        assert [(request.status, request.connection) for request in server.requests] == [(fault.status, 1), (206, 1)]


def test_flipped_bit_hits_the_byte_of_the_object_once() -> None:
    fault = Fault(FaultKind.FLIPPED_BIT, at=(1,), covering=150)
    with FaultServer({KEY: DATA}, [fault]) as server, Client(server) as client:
        assert client.get("bytes=0-99")[2] == DATA[:100]
        wrong = client.get()[2]
        assert [index for index in range(100) if wrong[index] != DATA[100 + index]] == [50]
        assert client.get()[2] == DATA[100:200]


def test_stall_goes_on_after_its_time_and_delay_comes_before_the_head() -> None:
    stall = Fault(FaultKind.STALL, at=(1,), after_bytes=40, seconds=0.2)
    delay = Fault(FaultKind.DELAY, at=(2,), seconds=0.2)
    with FaultServer({KEY: DATA}, [stall, delay]) as server, Client(server) as client:
        response = client.open()
        first = response.read(40)
        stalled = time.monotonic()
        assert first + response.read() == DATA[100:200]
        assert time.monotonic() - stalled > 0.1
        delayed = time.monotonic()
        client.open().read()
        assert time.monotonic() - delayed > 0.15


def test_trickle_sends_byte_by_byte() -> None:
    fault = Fault(FaultKind.TRICKLE, after_bytes=97, seconds=0.05)
    with FaultServer({KEY: DATA}, [fault]) as server, Client(server) as client:
        started = time.monotonic()
        assert client.get()[2] == DATA[100:200]
        assert time.monotonic() - started >= 0.15


def test_slow_body_comes_in_pieces() -> None:
    fault = Fault(FaultKind.SLOW, after_bytes=1, seconds=0.05)
    with FaultServer({KEY: DATA}, [fault]) as server, Client(server) as client:
        for _ in range(2):  # the connection is kept
            started = time.monotonic()
            assert client.get(range="bytes=0-8193")[2] == DATA[:8194]
            assert time.monotonic() - started >= 0.15


def test_close_ends_a_stall_at_once() -> None:
    with FaultServer({KEY: DATA}, [Fault(FaultKind.STALL, seconds=3600)]) as server, Client(server) as client:
        client.connection.request("GET", "/bucket/a%20key")
        server.wait_for_requests(1)
        server.close()


def test_bytes_per_s_limits_a_connection() -> None:
    with FaultServer({KEY: DATA}, bytes_per_s=1e6) as server, Client(server) as client:
        started = time.monotonic()
        assert client.get(range=None)[2] == DATA
        assert time.monotonic() - started >= 0.25


def test_until_s_ends_a_brown_out() -> None:
    with FaultServer({KEY: DATA}, [Fault(FaultKind.STATUS, until_s=0.3)]) as server, Client(server) as client:
        started = time.monotonic()
        assert client.get()[0] == 503
        while client.get()[0] == 503:
            assert time.monotonic() - started < 30
        assert time.monotonic() - started >= 0.25


def test_faults_count_what_they_match() -> None:
    faults = [
        Fault(FaultKind.STATUS, at=(1,), method="HEAD", status=500),
        Fault(FaultKind.STATUS, at=(2,), path=KEY, status=503),
        Fault(FaultKind.STATUS, at=(1,), path="/other", status=500),
    ]
    with FaultServer({KEY: DATA}, faults) as server, Client(server) as client:
        statuses = [client.get(method=method)[0] for method in ("GET", "HEAD", "GET", "HEAD", "GET")]
        assert statuses == [206, 500, 503, 206, 206]


def test_random_faults_repeat_with_their_seed_and_pickle() -> None:
    faults = random_faults(7, gets=200, rate=0.3)
    assert faults == random_faults(7, gets=200, rate=0.3) == pickle.loads(pickle.dumps(faults))
    assert faults != random_faults(8, gets=200, rate=0.3)
    assert 30 < len(faults) < 90
    assert random_faults(7, rate=0) == ()


def test_scattered_faults_strike_one_request_of_each_hundred_after_a_share_of_its_body() -> None:
    fault = Fault(FaultKind.EARLY_CLOSE)
    faults = scattered_faults(fault, seed=3, requests=1000)
    assert faults == scattered_faults(fault, seed=3, requests=1000) != scattered_faults(fault, seed=4, requests=1000)
    struck = [number for number in range(1, 2001) if any(each.at and number in each.at for each in faults)]
    assert [(number - 1) // 100 for number in struck] == list(range(10))
    [only] = scattered_faults(fault, seed=3, every=1, requests=1)
    with FaultServer({KEY: DATA}, [only]) as server:
        with Client(server) as client, pytest.raises(http.client.IncompleteRead) as caught:
            client.get()
        assert len(caught.value.partial) == int((only.after_share or 0) * 100)
        with Client(server) as client:
            assert client.get()[2] == DATA[100:200]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": FaultKind.RESET, "after_bytes": -1},
        {"kind": FaultKind.STALL, "seconds": -1},
        {"kind": FaultKind.STALL, "after_share": 1.1},
        {"kind": FaultKind.EXTRA_BYTES, "delta": 0},
        {"kind": FaultKind.STATUS, "status": 200},
    ],
)
def test_fault_refuses_senseless_numbers(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must not|needs"):
        Fault(**wrong)


def test_server_survives_a_client_that_speaks_no_http() -> None:
    with FaultServer({KEY: DATA}) as server, Client(server) as client:
        host, port = server.endpoint_url.partition("//")[2].split(":")
        with socket.create_connection((host, int(port)), timeout=30) as raw:
            raw.sendall(b"\x16\x03\x01 nonsense\n\n")
            assert raw.recv(1) == b""
        assert client.get()[0] == 206


def test_server_that_does_not_run_has_no_url() -> None:
    server = FaultServer({KEY: DATA})
    with pytest.raises(RuntimeError, match="not running"):
        server.url(KEY)
    with server:
        assert server.url(KEY).endswith("/bucket/a%20key")
    with pytest.raises(RuntimeError, match="not running"):
        server.url(KEY)

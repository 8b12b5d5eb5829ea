"""Streams against a server that misbehaves: exact bytes of one version, or a typed error."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator

import pytest

from mpreader import ObjectChanged, PlanError, S3Client, S3ClientConfig, ShortRead, TransportError
from mpreader.s3.stream import PinnedObject
from mpreader.testing import Fault, FaultKind, FaultServer

DATA = os.urandom(3_000_000)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"/bucket/key": DATA, "/bucket/empty": b""}) as server:
        yield server


@pytest.fixture
def client(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Client]:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    client = S3Client(s3client_config=S3ClientConfig(max_attempts=3))
    yield client
    client.close()


def test_stream_sends_any_range(client: S3Client) -> None:
    pinned = PinnedObject(client, "bucket", "key")
    size = len(DATA)
    for start, end in ((None, None), (5, None), (None, 7), (10, 2_000_000), (size - 1, size), (9, 9), (9, 8)):
        assert b"".join(pinned.stream(start, end)) == DATA[start:end]


def test_stream_of_nothing_is_empty(client: S3Client) -> None:
    assert list(PinnedObject(client, "bucket", "empty").stream()) == []
    assert list(PinnedObject(client, "bucket", "key").stream(len(DATA))) == []


@pytest.mark.parametrize(("start", "end"), [(0, len(DATA) + 1), (len(DATA), len(DATA) + 5)])
def test_stream_refuses_a_range_past_the_end(client: S3Client, start: int, end: int) -> None:
    with pytest.raises(PlanError):
        list(PinnedObject(client, "bucket", "key").stream(start, end))


@pytest.mark.parametrize(
    "fault",
    [
        Fault(FaultKind.RESET, at=(1, 2), after_bytes=1_500_000),
        Fault(FaultKind.EARLY_CLOSE, at=(1, 2), after_bytes=1_500_000),
        Fault(FaultKind.RESET, at=(1, 2), after_bytes=0),
        Fault(FaultKind.STATUS, at=(1, 2), status=503),
        Fault(FaultKind.WRONG_LENGTH, at=(1,), delta=-5),
        Fault(FaultKind.WRONG_LENGTH, at=(1,), delta=5),
        Fault(FaultKind.WRONG_RANGE, at=(1, 2)),
        Fault(FaultKind.WRONG_TOTAL, at=(1, 2)),
        Fault(FaultKind.WHOLE_OBJECT, at=(1, 2)),
        Fault(FaultKind.EXTRA_BYTES, at=(1, 2), delta=10),
    ],
    ids=lambda fault: fault.kind.name,
)
def test_stream_survives_a_transient_fault(
    client: S3Client, server: FaultServer, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # boto3's back-off, and our own
    server.inject(fault)
    assert b"".join(PinnedObject(client, "bucket", "key").stream()) == DATA
    assert any(request.fault is not None for request in server.requests)


def test_stream_resumes_where_the_body_broke_with_the_pinned_version(client: S3Client, server: FaultServer) -> None:
    server.inject(Fault(FaultKind.EARLY_CLOSE, at=(1,), after_bytes=1_500_000))
    assert b"".join(PinnedObject(client, "bucket", "key").stream(100)) == DATA[100:]
    first, second = server.requests
    assert first.range == "bytes=100-"
    assert "if-match" not in first.headers
    start = int(second.range.removeprefix("bytes=").split("-")[0]) if second.range else 0
    assert 100 + 1_000_000 < start <= 100 + 1_500_000
    assert second.headers["if-match"].startswith('"')


def test_stream_gives_up_after_max_attempts_without_progress(client: S3Client, server: FaultServer) -> None:
    server.inject(Fault(FaultKind.WHOLE_OBJECT))
    with pytest.raises(ShortRead, match=r"s3://bucket/key: no bytes from 10 on came in 3 attempts") as caught:
        list(PinnedObject(client, "bucket", "key").stream(10, 20))
    assert (caught.value.range, caught.value.attempts, len(server.requests)) == ((10, 20), 3, 3)


def test_stream_of_an_overwritten_object_mixes_no_bytes(client: S3Client, server: FaultServer) -> None:
    pinned = PinnedObject(client, "bucket", "key")
    assert b"".join(pinned.stream(0, 10)) == DATA[:10]
    server.put("/bucket/key", bytes(len(DATA)))
    with pytest.raises(ObjectChanged) as caught:
        list(pinned.stream(10, 20))
    assert caught.value.range == (10, 20)


def test_stream_overwritten_while_it_is_read_mixes_no_bytes(client: S3Client, server: FaultServer) -> None:
    server.inject(Fault(FaultKind.EARLY_CLOSE, at=(1,), after_bytes=1_500_000))
    stream = PinnedObject(client, "bucket", "key").stream()
    received = [next(stream)]
    server.put("/bucket/key", bytes(len(DATA)))
    with pytest.raises(ObjectChanged):
        received.extend(stream)
    assert DATA.startswith(b"".join(received))


def test_stream_does_not_trust_a_server_that_ignores_if_match(client: S3Client, server: FaultServer) -> None:
    pinned = PinnedObject(client, "bucket", "key")
    pinned.info()
    server.inject(Fault(FaultKind.OTHER_ETAG))
    with pytest.raises(ObjectChanged, match="another-version"):
        list(pinned.stream(0, 10))
    server.inject(Fault(FaultKind.NO_ETAG))
    with pytest.raises(ShortRead, match="no ETag"):
        list(pinned.stream(0, 10))


def test_head_that_names_no_etag_after_one_was_seen_is_an_error_of_mpreader(
    client: S3Client, server: FaultServer
) -> None:
    pinned = PinnedObject(client, "bucket", "key")
    assert b"".join(pinned.stream(0, 10)) == DATA[:10]
    server.inject(Fault(FaultKind.NO_ETAG, method="HEAD"))
    with pytest.raises(TransportError, match="no ETag"):
        pinned.info()


def test_stream_sends_its_request_at_once(client: S3Client, server: FaultServer) -> None:
    stream = PinnedObject(client, "bucket", "key").stream(0, 1000)
    assert [request.range for request in server.requests] == ["bytes=0-999"]
    assert next(stream) == DATA[:1000]


def test_stream_that_is_dropped_leaves_no_connection(client: S3Client, server: FaultServer) -> None:
    stream = PinnedObject(client, "bucket", "key").stream()
    next(stream)
    del stream  # the fixture of all tests looks for the socket
    assert b"".join(PinnedObject(client, "bucket", "key").stream(0, 10)) == DATA[:10]


def test_pinned_object_pickles_with_its_version(client: S3Client, server: FaultServer) -> None:
    pinned = PinnedObject(client, "bucket", "key")
    assert pinned.info().size == len(DATA)
    copy = pickle.loads(pickle.dumps(pinned))
    server.put("/bucket/key", bytes(len(DATA)))
    with pytest.raises(ObjectChanged):
        list(copy.stream(0, 10))
    copy._client.close()

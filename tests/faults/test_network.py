"""Faults of servers and networks: a fetch ends in exact bytes or in one error that says what to do."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from mpreader import (
    AccessDenied,
    ObjectChanged,
    ObjectMissing,
    PlanError,
    PoolConfig,
    PoolTimeout,
    RangeFetcher,
    S3ClientConfig,
    ShortRead,
    TransportError,
)
from mpreader.config import KiB, MiB
from mpreader.pool.pool import Pool
from mpreader.pool.requests import SlotRead
from mpreader.pool.source import ObjectVersion
from mpreader.pool.worker.route import Route
from mpreader.ranges import Part
from mpreader.testing import Fault, FaultKind, FaultServer, random_faults

if TYPE_CHECKING:
    from tests.faults.conftest import Serve

pytestmark = pytest.mark.timeout(60)

DATA = os.urandom(2 * MiB)
PART = 512 * KiB
SETTINGS = {"workers": 1, "connections_per_worker": 4, "max_memory": 16 * MiB, "part_size": PART}


@pytest.fixture
def server(serve: Serve) -> FaultServer:
    return serve({"/object": DATA})


@pytest.fixture
def make_fetcher() -> Iterator[Callable[..., RangeFetcher]]:
    fetchers: list[RangeFetcher] = []

    def make(max_attempts: int = 10, **settings: Any) -> RangeFetcher:
        config = PoolConfig(**{**SETTINGS, **settings})
        fetchers.append(RangeFetcher(S3ClientConfig(max_attempts=max_attempts), config))
        return fetchers[-1]

    yield make
    for fetcher in fetchers:
        fetcher.close()


@pytest.fixture
def fetcher(make_fetcher: Callable[..., RangeFetcher]) -> RangeFetcher:
    return make_fetcher()


ROW_OF = {
    FaultKind.RESET: "connection reset in a body",
    FaultKind.EARLY_CLOSE: "connection closed early (FIN) in a body",
    FaultKind.CLOSE_ON_ACCEPT: "connection closed early (FIN) in a body",
    FaultKind.WRONG_LENGTH: "wrong Content-Length, Content-Range or total size",
    FaultKind.WRONG_RANGE: "wrong Content-Length, Content-Range or total size",
    FaultKind.WRONG_TOTAL: "wrong Content-Length, Content-Range or total size",
    FaultKind.WHOLE_OBJECT: "200 with the whole object instead of 206",
    FaultKind.EXTRA_BYTES: "extra bytes after the body",
    FaultKind.NO_ETAG: "ETag missing or different in a 206",
    FaultKind.OTHER_ETAG: "ETag missing or different in a 206",
    FaultKind.STALL: "server stalls, or trickles",
    FaultKind.TRICKLE: "server stalls, or trickles",
    FaultKind.DELAY: "server stalls, or trickles",
}
ROW_OF_STATUS = {
    403: "403, 404, wrong region",
    404: "403, 404, wrong region",
    412: "object overwritten between GETs",
    416: "object overwritten between GETs",  # by a shorter one
}


def proving(fault: Fault, *values: object) -> Any:
    """Parameters of a test, marked with the row of the fault matrix that they prove."""
    row = ROW_OF.get(fault.kind) or ROW_OF_STATUS.get(fault.status, "500, 503 SlowDown, a brown-out")
    if fault.code:
        row = "expired token or signature in a load"
    return pytest.param(fault, *values, marks=pytest.mark.row(row))


def starts(server: FaultServer) -> list[int]:
    """First byte of each GET, in the order in which they came."""
    gets = [request for request in server.requests if request.method == "GET"]
    return [int(re.findall(r"\d+", request.range or "")[0]) for request in gets]


# -- what goes well in the end


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.row(ROW_OF[kind])) for kind in (FaultKind.RESET, FaultKind.EARLY_CLOSE)],
)
def test_body_that_breaks_is_resumed_where_it_broke(
    fetcher: RangeFetcher, server: FaultServer, kind: FaultKind
) -> None:
    server.inject(Fault(kind, at=(1,), after_bytes=300_000), Fault(kind, at=(2,), after_bytes=100_000))
    [view] = fetcher.fetch(server.url("/object"), [(1000, 1000 + PART)])
    assert view == DATA[1000 : 1000 + PART]
    first, second, third = starts(server)
    assert first == 1000
    if kind is FaultKind.EARLY_CLOSE:
        assert (second, third) == (301_000, 401_000)
    else:  # a reset may throw away what had arrived, but never adds to it
        assert 1000 <= second <= 301_000
        assert second <= third <= second + 100_000
    etag = f'"{hashlib.md5(DATA).hexdigest()}"'
    assert all(request.headers["if-match"] == etag for request in server.requests if request.method == "GET")
    assert fetcher.stats.retries == 2


@pytest.mark.parametrize(
    "fault",
    [
        proving(Fault(FaultKind.WRONG_LENGTH, at=(1, 3), delta=-7)),
        proving(Fault(FaultKind.WRONG_LENGTH, at=(1, 3), delta=7)),
        proving(Fault(FaultKind.WRONG_RANGE, at=(1, 3))),
        proving(Fault(FaultKind.WRONG_TOTAL, at=(1, 3))),
        proving(Fault(FaultKind.WHOLE_OBJECT, at=(1, 3))),
        proving(Fault(FaultKind.EXTRA_BYTES, at=range(1, 5), delta=70_000)),
        proving(Fault(FaultKind.NO_ETAG, at=(1, 3))),
        proving(Fault(FaultKind.CLOSE_ON_ACCEPT, at=(2, 4))),
        proving(Fault(FaultKind.STATUS, at=(1, 3), status=500)),
        proving(Fault(FaultKind.STATUS, at=(1, 3), status=503)),
        proving(Fault(FaultKind.STATUS, at=(1, 3), status=429)),
        proving(Fault(FaultKind.STALL, at=(1, 3), seconds=60, after_bytes=1000)),
        proving(Fault(FaultKind.STALL, at=(1, 3), seconds=60, after_bytes=0)),
        proving(Fault(FaultKind.TRICKLE, at=(1, 3), seconds=0.02, after_bytes=300_000)),
        proving(Fault(FaultKind.DELAY, at=(1, 3), seconds=60)),
    ],
    ids=lambda fault: f"{fault.kind.name} {fault.delta if 'WRONG' in fault.kind.name else fault.status}",
)
@pytest.mark.usefixtures("_no_delays")
def test_fault_that_passes_is_survived(
    make_fetcher: Callable[..., RangeFetcher], server: FaultServer, fault: Fault
) -> None:
    server.inject(fault)
    fetcher = make_fetcher(stall_timeout_s=0.5)
    [view] = fetcher.fetch(server.url("/object"), [(0, len(DATA))])
    assert view == DATA
    assert any(request.fault is fault for request in server.requests) or fault.kind is FaultKind.CLOSE_ON_ACCEPT


@pytest.mark.row("500, 503 SlowDown, a brown-out")
def test_brown_out_is_outlived_with_growing_delays(fetcher: RangeFetcher, server: FaultServer) -> None:
    server.inject(Fault(FaultKind.STATUS, status=503, until_s=1.5))
    [view] = fetcher.fetch(server.url("/object"), [(0, len(DATA))])
    assert view == DATA
    assert len(starts(server)) <= 4 * 5, "the server was asked over and over while it asked for less"


@pytest.mark.row("server stalls, or trickles")
def test_stalled_connection_is_replaced_in_time(make_fetcher: Callable[..., RangeFetcher], server: FaultServer) -> None:
    server.inject(Fault(FaultKind.STALL, at=(1,), seconds=3600, after_bytes=300 * KiB))
    started = time.monotonic()
    [view] = make_fetcher(stall_timeout_s=0.5).fetch(server.url("/object"), [(0, PART)])
    assert view == DATA[:PART]
    assert time.monotonic() - started > 0.4, "it was given too little time"
    assert starts(server) == [0, 300 * KiB]
    connections = [request.connection for request in server.requests if request.method == "GET"]
    assert len(set(connections)) == 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.row("random plans, faults and kills (storm)")
def test_random_plan_under_random_faults_is_exact(
    make_fetcher: Callable[..., RangeFetcher], serve: Serve, seed: int
) -> None:
    import random

    chance = random.Random(seed)
    server = serve({"/object": DATA}, *random_faults(seed, gets=60, rate=0.3))
    bounds = [sorted(chance.choices(range(len(DATA) + 1), k=2)) for _ in range(25)]
    fetcher = make_fetcher(workers=2, stall_timeout_s=0.5, part_size=128 * KiB)
    views = fetcher.fetch(server.url("/object"), [(start, end) for start, end in bounds], max_gap_size=1000)
    for (start, end), view in zip(bounds, views, strict=True):
        assert view == DATA[start:end], f"seed {seed}, bytes {start}-{end}"
    assert any(request.fault for request in server.requests)


# -- what can't go well


@pytest.mark.parametrize(
    ("fault", "cls", "text", "most_gets"),
    [
        proving(Fault(FaultKind.RESET), ShortRead, "broke", 3),
        proving(Fault(FaultKind.EARLY_CLOSE), ShortRead, "ended after 0", 3),
        proving(Fault(FaultKind.WRONG_LENGTH, delta=-1), TransportError, "Content-Length", 3),
        proving(Fault(FaultKind.WRONG_RANGE), TransportError, "Content-Range", 3),
        proving(Fault(FaultKind.WRONG_TOTAL), TransportError, "bytes now", 3),
        proving(Fault(FaultKind.WHOLE_OBJECT), TransportError, "whole object", 3),
        proving(Fault(FaultKind.NO_ETAG), TransportError, "ETag", 3),
        proving(Fault(FaultKind.OTHER_ETAG), ObjectChanged, "overwritten", 1),
        proving(Fault(FaultKind.STATUS, status=503), TransportError, "SlowDown", 3),
        proving(Fault(FaultKind.STALL, seconds=60), TransportError, "MPREADER_STALL_TIMEOUT_S", 3),
        proving(Fault(FaultKind.STATUS, status=403), AccessDenied, "AccessDenied", 2),  # as for 412
        proving(Fault(FaultKind.STATUS, status=404), ObjectMissing, "NoSuchKey", 1),
        proving(Fault(FaultKind.STATUS, status=412), ObjectChanged, "PreconditionFailed", 2),  # then without If-Match
        proving(Fault(FaultKind.STATUS, status=416), ObjectChanged, "InvalidRange", 1),
        proving(Fault(FaultKind.STATUS, status=403, code="ExpiredToken"), AccessDenied, "ExpiredToken", 2),
    ],
    ids=lambda value: (
        value.kind.name + (f" {value.code or value.status}" if value.status != 503 else "")
        if isinstance(value, Fault)
        else ""
    ),
)
@pytest.mark.usefixtures("_no_delays")
def test_fault_that_stays_is_one_error_after_few_attempts(
    make_fetcher: Callable[..., RangeFetcher],
    server: FaultServer,
    fault: Fault,
    cls: type[TransportError],
    text: str,
    most_gets: int,
) -> None:
    server.inject(fault)
    fetcher = make_fetcher(max_attempts=3, stall_timeout_s=0.3)
    with pytest.raises(cls) as caught:
        fetcher.fetch(server.url("/object"), [(5, 1005)])
    error = caught.value
    assert text in str(error)
    assert "object bytes 5-1005" in str(error)
    assert (error.bucket, error.key, error.range) == (server.endpoint_url.partition("//")[2], "/object", (5, 1005))
    assert len(starts(server)) == most_gets
    assert error.attempts == (1 if fault.status in (403, 412) and not fault.code else most_gets)
    server.inject()
    [view] = fetcher.fetch(server.url("/object"), [(5, 1005)])
    assert view == DATA[5:1005], "the fetcher must go on after an error"


@pytest.mark.row("object overwritten between GETs")
def test_object_overwritten_between_two_gets_is_never_mixed(
    make_fetcher: Callable[..., RangeFetcher], server: FaultServer
) -> None:
    size = 64 * KiB
    fetcher = make_fetcher(max_memory=4 * size, part_size=size)  # most is still to be asked for when the first is there
    received = 0
    with pytest.raises(ObjectChanged, match="Load again") as caught:  # noqa: PT012  # which view it is, is left open
        for index, view in fetcher.stream(server.url("/object"), [(n, n + size) for n in range(0, len(DATA), size)]):
            assert view == DATA[index * size :][:size]
            server.put("/object", bytes(len(DATA)))
            received += 1
    assert 1 <= received <= 8
    assert caught.value.attempts == 1


@pytest.mark.row("server stalls, or trickles")
def test_part_that_takes_too_long_in_all_is_a_timeout(
    make_fetcher: Callable[..., RangeFetcher], server: FaultServer
) -> None:
    server.inject(Fault(FaultKind.TRICKLE, seconds=0.05, after_bytes=0))  # for hours
    with pytest.raises(PoolTimeout, match="MPREADER_TIMEOUT_S"):
        make_fetcher(stall_timeout_s=30, timeout_s=0.5).fetch(server.url("/object"), [(0, PART)])


def test_parts_that_wait_for_their_turn_do_not_time_out(
    make_fetcher: Callable[..., RangeFetcher], server: FaultServer
) -> None:
    # 16 parts of 0.15 s, one after the other: longer than the deadline of each.
    server.inject(Fault(FaultKind.DELAY, seconds=0.15))
    fetcher = make_fetcher(connections_per_worker=1, part_size=128 * KiB, timeout_s=1.5)
    assert fetcher.fetch_object(server.url("/object")) == DATA


@pytest.mark.row("403, 404, wrong region")
def test_missing_object_is_a_file_not_found_error(fetcher: RangeFetcher, server: FaultServer) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        fetcher.fetch(server.url("/nothing"), [(0, 10)])


@pytest.mark.row("100,000 tiny ranges; one 5 GB item; zero-length range; range past the end")
def test_range_past_the_end_is_refused_before_any_get(fetcher: RangeFetcher, server: FaultServer) -> None:
    with pytest.raises(PlanError, match=str(len(DATA))):
        fetcher.fetch(server.url("/object"), [(0, len(DATA) + 1)])
    assert starts(server) == []


# -- routes


class Routed:
    """A source with routes of the test's choice. See :class:`mpreader.pool.source.Source`."""

    bucket, key, uri = "bucket", "object", "s3://bucket/object"
    version = None

    def __init__(self, *routes: Route, max_attempts: int = 2) -> None:
        self.routes = list(routes)
        self.asked = 0
        self.max_attempts = max_attempts

    def open(self) -> ObjectVersion:
        return ObjectVersion(len(DATA), f'"{hashlib.md5(DATA).hexdigest()}"')

    def route(self) -> Route:
        self.asked += 1
        return self.routes.pop(0) if len(self.routes) > 1 else self.routes[0]


@pytest.fixture
def read() -> Iterator[Callable[[Routed], bytes]]:
    pools: list[Pool] = []

    def take(source: Routed) -> bytes:
        pools.append(Pool(PoolConfig(**SETTINGS, connect_timeout_s=2.0)))
        transfer = pools[-1].read([source], [SlotRead(0, PART, (Part(0, PART),))])
        try:
            return bytes(transfer.take(0))
        finally:
            transfer.close()

    yield take
    for pool in pools:
        pool.close()


def route(server: FaultServer, target: str = "/object", ca_file: str | None = None) -> Route:
    scheme, _, address = server.endpoint_url.partition("://")
    host, _, port = address.partition(":")
    return Route(scheme == "https", host, int(port), target, (("Host", address),), None, ca_file)


@pytest.mark.parametrize(("status", "code"), [(403, "ExpiredToken"), (400, "ExpiredToken"), (403, "RequestExpired")])
@pytest.mark.row("expired token or signature in a load")
def test_expired_signature_is_renewed_once_and_the_load_goes_on(
    read: Callable[[Routed], bytes], serve: Serve, status: int, code: str
) -> None:
    expired = Fault(FaultKind.STATUS, path="/object", status=status, code=code)
    server = serve({"/object": DATA, "/renewed": DATA}, expired)
    source = Routed(route(server), route(server, "/renewed"))
    assert read(source) == DATA[:PART]
    assert source.asked == 2
    assert [request.path for request in server.requests] == ["/object", "/renewed"]


@pytest.mark.row("expired token or signature in a load")
def test_signature_that_expires_again_at_once_is_access_denied(
    read: Callable[[Routed], bytes], server: FaultServer
) -> None:
    server.inject(Fault(FaultKind.STATUS, status=403, code="ExpiredToken"))
    source = Routed(route(server), max_attempts=10)
    with pytest.raises(AccessDenied, match="clock"):
        read(source)
    assert source.asked == 2
    assert len(server.requests) == 2


@pytest.mark.row("refused connection, unknown host, TLS failure")
def test_refused_connection_is_retried_and_then_named(read: Callable[[Routed], bytes]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(TransportError, match=f"127.0.0.1:{port}.*refused.*2 attempts.*endpoint_url"):
        read(Routed(Route(False, "127.0.0.1", port, "/object")))


@pytest.mark.row("refused connection, unknown host, TLS failure")
def test_unknown_host_is_retried_and_then_named(read: Callable[[Routed], bytes]) -> None:
    with pytest.raises(TransportError, match=r"no-such-host\.invalid:443.*2 attempts"):
        read(Routed(Route(True, "no-such-host.invalid", 443, "/object")))


@pytest.mark.row("refused connection, unknown host, TLS failure")
def test_tls_is_read_with_the_right_authority_and_refused_with_another(
    read: Callable[[Routed], bytes], serve: Serve
) -> None:
    server, other = serve({"/object": DATA}, tls=True), serve({}, tls=True)
    assert read(Routed(route(server, ca_file=str(server.ca_file)))) == DATA[:PART]
    with pytest.raises(TransportError, match=r"CERTIFICATE_VERIFY_FAILED.*CA bundle"):
        read(Routed(route(server, ca_file=str(other.ca_file))))


@pytest.mark.row("connection reset in a body", "connection closed early (FIN) in a body")
def test_tls_body_that_breaks_is_resumed(read: Callable[[Routed], bytes], serve: Serve) -> None:
    faults = [
        Fault(kind, at=(at,), after_bytes=300_000) for at, kind in ((1, FaultKind.RESET), (2, FaultKind.EARLY_CLOSE))
    ]
    server = serve({"/object": DATA}, *faults, tls=True)
    assert read(Routed(route(server, ca_file=str(server.ca_file)))) == DATA[:PART]


def test_connections_are_reused(fetcher: RangeFetcher, server: FaultServer) -> None:
    for _ in range(5):
        fetcher.fetch(server.url("/object"), [(0, len(DATA))])
    gets = [request.connection for request in server.requests if request.method == "GET"]
    assert len(gets) == 20
    assert len(set(gets)) <= 4

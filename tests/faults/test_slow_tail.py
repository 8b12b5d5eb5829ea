"""Slow answers: those that are much slower than others are cut and requested again, and none in vain."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from mpreader import PoolConfig, RangeFetcher, S3ClientConfig
from mpreader.config import KiB, MiB
from mpreader.telemetry import events
from mpreader.telemetry.events import RequestEvent
from mpreader.testing import Fault, FaultKind, FaultServer

if TYPE_CHECKING:
    from tests.faults.conftest import Serve

# No slow answer of these tests ends by itself, and no timeout ends it: a test that ends has cut it.
pytestmark = [pytest.mark.timeout(60), pytest.mark.row("one answer is much slower than the others")]
FOR_EVER_S = 3600.0
TIMEOUTS = {"stall_timeout_s": FOR_EVER_S, "timeout_s": FOR_EVER_S, "worker_timeout_s": 60.0}

DATA = os.urandom(20 * MiB)
PART = 512 * KiB
RANGES = [(start, start + PART) for start in range(0, len(DATA), PART)]
# A part takes 30 ms.
BYTES_PER_S = 16e6


@pytest.fixture
def make_fetcher() -> Iterator[Callable[..., RangeFetcher]]:
    fetchers: list[RangeFetcher] = []

    def make(max_attempts: int = 10, **settings: Any) -> RangeFetcher:
        size = {"workers": 2, "connections_per_worker": 4, "max_memory": 32 * MiB, "part_size": PART}
        config = PoolConfig(**{**size, **TIMEOUTS, **settings})
        fetchers.append(RangeFetcher(S3ClientConfig(max_attempts=max_attempts), config))
        return fetchers[-1]

    yield make
    for fetcher in fetchers:
        fetcher.close()


def fetch_all(fetcher: RangeFetcher, server: FaultServer, ranges: Sequence[tuple[int, int]] = RANGES) -> None:
    views = fetcher.fetch(server.url("/object"), ranges)
    assert all(view == DATA[start:end] for view, (start, end) in zip(views, ranges, strict=True))


SLOW = [
    pytest.param({"kind": FaultKind.DELAY}, id="no first byte"),
    pytest.param({"kind": FaultKind.STALL}, id="head only"),
    pytest.param({"kind": FaultKind.STALL, "after_bytes": 100_000}, id="silent in the middle"),
    pytest.param({"kind": FaultKind.STALL, "after_bytes": PART - 1}, id="silent before the last byte"),
]


@pytest.mark.parametrize("where", [(1,), (20,), (40,), (1, 20, 40)], ids=str)
@pytest.mark.parametrize("slow", SLOW)
def test_slow_answer_is_cut_and_its_rest_requested_from_the_byte_reached(
    serve: Serve, make_fetcher: Callable[..., RangeFetcher], slow: dict[str, Any], where: tuple[int, ...]
) -> None:
    server = serve({"/object": DATA}, Fault(**slow, at=where, seconds=FOR_EVER_S), bytes_per_s=BYTES_PER_S)
    fetcher = make_fetcher(max_attempts=1)  # a cut is no failure, which would end it
    fetch_all(fetcher, server)
    # On a host that is itself busy there may be more.
    assert fetcher.stats.slow_cut
    assert fetcher.stats.retries == 0
    assert fetcher.stats.bytes == len(DATA), "no byte was received twice"


def test_answer_that_trickles_is_cut(serve: Serve, make_fetcher: Callable[..., RangeFetcher]) -> None:
    trickle = Fault(FaultKind.TRICKLE, at=(7, 30), after_bytes=1000, seconds=0.01)  # its part would take 80 minutes
    server = serve({"/object": DATA}, trickle, bytes_per_s=BYTES_PER_S)
    fetcher = make_fetcher()
    fetch_all(fetcher, server)
    assert (fetcher.stats.slow_cut >= 2, fetcher.stats.bytes) == (True, len(DATA))


def test_slow_answers_over_tls_are_cut(
    serve: Serve, make_fetcher: Callable[..., RangeFetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = (Fault(FaultKind.STALL, at=(9,), after_bytes=100_000, seconds=FOR_EVER_S),)
    server = serve({"/object": DATA}, *slow, tls=True, bytes_per_s=BYTES_PER_S)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(server.ca_file))
    fetcher = make_fetcher()
    fetch_all(fetcher, server)
    assert (fetcher.stats.slow_cut >= 1, fetcher.stats.bytes) == (True, len(DATA))


def test_next_fetch_knows_what_is_slow(serve: Serve, make_fetcher: Callable[..., RangeFetcher]) -> None:
    server = serve({"/object": DATA}, bytes_per_s=BYTES_PER_S)
    fetcher = make_fetcher()
    fetch_all(fetcher, server)
    # One range alone has no others to be compared with.
    server.inject(Fault(FaultKind.DELAY, at=(1,), seconds=FOR_EVER_S))
    fetch_all(fetcher, server, RANGES[:1])
    assert fetcher.stats.slow_cut >= 1


def test_cut_is_seen_by_observers_and_in_the_log(
    serve: Serve, make_fetcher: Callable[..., RangeFetcher], caplog: pytest.LogCaptureFixture
) -> None:
    slow = Fault(FaultKind.STALL, at=(9,), after_bytes=100_000, seconds=FOR_EVER_S)
    server = serve({"/object": DATA}, slow, bytes_per_s=BYTES_PER_S)
    fetcher = make_fetcher()
    seen: list[RequestEvent] = []
    events.add_observer(seen.append)
    try:
        with caplog.at_level(logging.DEBUG, "mpreader"):
            fetch_all(fetcher, server)
    finally:
        events.remove_observer(seen.append)
    [cut] = [event for event in seen if event.outcome == "slow" and event.received == 100_000]
    [rest] = [event for event in seen if event.start == cut.start + cut.received]
    assert rest.end == cut.end
    assert {event.attempt for event in seen} == {1}, "a cut is no failure"
    assert any(message.startswith("request slow: ") for message in caplog.messages)
    assert f" {fetcher.stats.slow_cut} slow ones cut" in str(fetcher.stats)


# -- where no cut would help


@pytest.mark.parametrize(
    ("faults", "bytes_per_s"),
    [
        pytest.param((), 2e6, id="every connection is slow"),
        pytest.param((Fault(FaultKind.DELAY, seconds=0.3),), None, id="every first byte is late"),
        pytest.param((Fault(FaultKind.STALL, after_bytes=1000, seconds=0.5),), None, id="every body pauses"),
        pytest.param((Fault(FaultKind.DELAY, at=range(20, 80), seconds=0.3),), None, id="all become slow"),
    ],
)
def test_server_that_is_slow_for_all_sees_no_cut(
    serve: Serve, make_fetcher: Callable[..., RangeFetcher], faults: tuple[Fault, ...], bytes_per_s: float | None
) -> None:
    server = serve({"/object": DATA}, *faults, bytes_per_s=bytes_per_s)
    fetcher = make_fetcher()
    fetch_all(fetcher, server)
    assert fetcher.stats.slow_cut == 0
    assert fetcher.stats.requests == len(RANGES)


def test_cuts_are_a_share_of_the_requests_where_most_are_slow(
    serve: Serve, make_fetcher: Callable[..., RangeFetcher]
) -> None:
    slow = Fault(FaultKind.DELAY, at=[n for n in range(1, 1000) if n % 3], seconds=0.5)
    server = serve({"/object": DATA}, slow, bytes_per_s=BYTES_PER_S)
    fetcher = make_fetcher()
    fetch_all(fetcher, server)
    # Two at first, one for each ten that succeed, and one for every two seconds of the six that this may take.
    assert fetcher.stats.slow_cut <= 2 + len(RANGES) // 10 + 3


def test_overloaded_server_is_met_by_back_off_and_not_by_cuts(
    serve: Serve, make_fetcher: Callable[..., RangeFetcher]
) -> None:
    server = serve({"/object": DATA}, Fault(FaultKind.STATUS, at=range(10, 20), status=503), bytes_per_s=BYTES_PER_S)
    fetcher = make_fetcher()
    fetch_all(fetcher, server)
    assert (fetcher.stats.slow_cut, fetcher.stats.retries) == (0, 10)

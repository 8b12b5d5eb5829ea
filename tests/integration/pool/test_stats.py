"""The numbers: of a fetcher, of a load; what observers and logs are told of each request."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from mpreader import PoolConfig, RangeFetcher
from mpreader.config import KiB, MiB
from mpreader.telemetry.events import RequestEvent, add_observer, remove_observer
from mpreader.testing import Fault, FaultKind, FaultServer

pytestmark = pytest.mark.timeout(60)

DATA = os.urandom(4 * MiB)
CONFIG = PoolConfig(workers=2, connections_per_worker=2, max_memory=8 * MiB, part_size=64 * KiB)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"/object": DATA}) as server:
        yield server


@pytest.fixture
def events() -> Iterator[list[RequestEvent]]:
    seen: list[RequestEvent] = []
    add_observer(seen.append)
    yield seen
    remove_observer(seen.append)


def test_over_read_is_what_lies_between_the_ranges_of_a_request(server: FaultServer) -> None:
    with RangeFetcher(pool_config=CONFIG) as fetcher:
        fetcher.fetch(
            server.url("/object"), [(0, 1000), (1500, 2000), (1800, 3000), (200_000, 200_010)], max_gap_size=600
        )
        assert fetcher.stats.over_read == 500
        assert fetcher.stats.bytes == 3000 + 10


def test_a_slow_consumer_and_a_slow_network_are_told_apart(server: FaultServer) -> None:
    ranges = [(start, start + 64 * KiB) for start in range(0, len(DATA), 64 * KiB)]
    config = PoolConfig(workers=1, connections_per_worker=2, max_memory=512 * KiB, part_size=64 * KiB)
    with RangeFetcher(pool_config=config) as fetcher:
        stream = fetcher.stream(server.url("/object"), ranges, max_gap_size=0)
        next(stream)
        while not fetcher.stats.consumer_seconds:  # memory fills up, then nothing is received any more
            pass
        for _, view in stream:
            del view
        busy = fetcher.stats
        server.inject(Fault(FaultKind.DELAY, seconds=0.5))
        fetcher.fetch(server.url("/object"), [(0, 10)])
        waited = fetcher.stats
    assert waited.seconds - busy.seconds >= 0.5
    assert waited.consumer_seconds == busy.consumer_seconds


def test_observers_hear_of_each_request_and_of_its_failure(server: FaultServer, events: list[RequestEvent]) -> None:
    server.inject(Fault(FaultKind.EARLY_CLOSE, at=(1,), covering=0, after_bytes=1000))
    with RangeFetcher(pool_config=CONFIG) as fetcher:
        fetcher.fetch(server.url("/object"), [(0, MiB)])
        stats = fetcher.stats
    assert len(events) == len(server.requests) - 1  # one of these is the HEAD
    assert sum(event.received for event in events) == MiB
    failed = [event for event in events if event.outcome != "ok"]
    assert [(event.start, event.received, event.attempt) for event in failed] == [(0, 1000, 1)]
    again = next(event for event in events if event.start == 1000)
    assert (again.outcome, again.attempt) == ("ok", 2)
    assert stats.retries == 1
    assert {event.worker for event in events} <= {0, 1}
    assert {event.connection for event in events} <= {0, 1}
    assert all(event.started_s <= event.first_byte_s <= event.ended_s for event in events)


def test_an_observer_that_fails_stops_no_download(server: FaultServer, caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: RequestEvent) -> None:
        raise RuntimeError("observer")

    add_observer(fail)
    try:
        with RangeFetcher(pool_config=CONFIG) as fetcher:
            assert fetcher.fetch(server.url("/object"), [(0, 10)]) == [DATA[:10]]
    finally:
        remove_observer(fail)
    assert "an observer of requests failed" in caplog.text


def test_debug_log_has_a_line_and_a_structure_for_each_request_without_secrets(
    server: FaultServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="mpreader")
    with RangeFetcher(pool_config=CONFIG) as fetcher:
        fetcher.fetch(server.url("/object") + "?X-Amz-Signature=secret", [(0, 10)])
    lines = [record for record in caplog.records if hasattr(record, "mpreader")]
    assert len(lines) == 1
    fields = lines[0].mpreader
    assert (fields["start"], fields["end"], fields["received"], fields["outcome"]) == (0, 10, 10, "ok")
    assert lines[0].getMessage().startswith("request ok: http://")
    assert "secret" not in caplog.text + repr(fields)

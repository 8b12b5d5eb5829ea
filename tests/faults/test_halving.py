"""Ends of large requests that idle connections take over: every byte once, whatever happens to the halves."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from mpreader import ObjectChanged, PoolConfig, PoolTimeout, RangeFetcher, S3ClientConfig
from mpreader.config import MiB
from mpreader.testing import Fault, FaultKind, FaultServer

if TYPE_CHECKING:
    from tests.faults.conftest import Serve

pytestmark = pytest.mark.timeout(60)

DATA = os.urandom(4 * MiB)
BYTES_PER_S = 2e6  # one connection would take two seconds


@pytest.fixture
def fetcher() -> Iterator[RangeFetcher]:
    config = PoolConfig(workers=2, connections_per_worker=4, max_memory=32 * MiB, part_size=4 * MiB)
    with RangeFetcher(S3ClientConfig(max_attempts=3), config) as fetcher:
        yield fetcher


def ranges(server: FaultServer) -> list[tuple[int, int]]:
    """[start, end) that each GET asked for, by the start."""
    gets = [request for request in server.requests if request.method == "GET"]
    found = [tuple(map(int, re.findall(r"\d+", request.range or ""))) for request in gets]
    return sorted((first, last + 1) for first, last in found)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_one_large_part_is_received_by_several_connections_and_every_byte_once(
    serve: Serve, fetcher: RangeFetcher, monkeypatch: pytest.MonkeyPatch, tls: bool
) -> None:
    server = serve({"/object": DATA}, tls=tls, bytes_per_s=BYTES_PER_S)
    if tls:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(server.ca_file))
    [view] = fetcher.fetch(server.url("/object"), [(0, len(DATA))])
    assert view == DATA
    starts = [start for start, _ in ranges(server)]
    assert len(starts) > 1
    assert len(set(starts)) == len(starts)
    # What had come in the moment in which a request was told to end earlier may come twice.
    assert len(DATA) <= fetcher.stats.bytes < 1.2 * len(DATA)
    assert (fetcher.stats.retries, fetcher.stats.slow_cut) == (0, 0)


def test_halves_of_a_part_with_gaps_fit_together(serve: Serve, fetcher: RangeFetcher) -> None:
    server = serve({"/object": DATA}, bytes_per_s=BYTES_PER_S)
    wanted = [(start, start + 10_000) for start in range(0, len(DATA) - 10_000, 60_000)]
    views = fetcher.fetch(server.url("/object"), wanted, max_gap_size=MiB)  # one request, but for the halves
    assert views == [DATA[start:end] for start, end in wanted]
    assert len(ranges(server)) > 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault(FaultKind.RESET, at=range(2, 5), after_bytes=50_000),
        Fault(FaultKind.EARLY_CLOSE, at=range(2, 5), after_bytes=50_000),
        Fault(FaultKind.STATUS, at=range(2, 5), status=503),
        Fault(FaultKind.RESET, at=(1,), after_bytes=300_000),
        Fault(FaultKind.EARLY_CLOSE, at=(1,), after_bytes=300_000),
    ],
    ids=lambda fault: f"{fault.kind.name} {fault.at}",
)
def test_halves_that_fail_are_requested_again(serve: Serve, fetcher: RangeFetcher, fault: Fault) -> None:
    server = serve({"/object": DATA}, fault, bytes_per_s=BYTES_PER_S)
    [view] = fetcher.fetch(server.url("/object"), [(0, len(DATA))])
    assert view == DATA
    assert fetcher.stats.retries >= 1


def test_object_that_is_overwritten_before_a_half_is_requested_is_never_mixed(
    serve: Serve, fetcher: RangeFetcher
) -> None:
    server = serve({"/object": DATA}, Fault(FaultKind.OVERWRITTEN, at=(2,)), bytes_per_s=BYTES_PER_S)
    server.stage("/object", os.urandom(len(DATA)))
    with pytest.raises(ObjectChanged):
        fetcher.fetch(server.url("/object"), [(0, len(DATA))])


def test_workers_that_are_killed_meanwhile_are_replaced(serve: Serve, fetcher: RangeFetcher) -> None:
    server = serve({"/object": DATA}, bytes_per_s=BYTES_PER_S)

    def kill_workers() -> None:
        server.wait_for_requests(4)  # a HEAD, and a part of which two halves were taken
        coordinator = fetcher._engine.pool.coordinator
        assert coordinator is not None
        for pid in coordinator.workers.pids:
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_workers)
    thread.start()
    [view] = fetcher.fetch(server.url("/object"), [(0, len(DATA))])
    thread.join()
    assert view == DATA
    assert fetcher.stats.restarts == 2


def test_fetch_that_is_given_up_leaves_no_half_behind(serve: Serve, fetcher: RangeFetcher) -> None:
    server = serve({"/object": DATA}, bytes_per_s=BYTES_PER_S / 20)
    with pytest.raises(PoolTimeout):
        fetcher.fetch(server.url("/object"), [(0, len(DATA))], timeout_s=2.0)
    assert len(ranges(server)) > 1
    # All memory comes back: another fetch of as much as there is finds room.
    quick = serve({"/object": DATA * 8})
    [view] = fetcher.fetch(quick.url("/object"), [(0, 8 * len(DATA))])
    assert view == DATA * 8

"""Slow answers: those that are much slower than others are cut and requested again, and none in vain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from mpreader import AsyncRangeFetcher, ObjectChanged, PoolConfig, PoolTimeout, RangeFetcher, S3ClientConfig
from mpreader.config import KiB, MiB
from mpreader.fsspec.filesystem import RangeFileSystem
from mpreader.telemetry import events
from mpreader.telemetry.events import RequestEvent
from mpreader.testing import Fault, FaultKind, FaultServer

if TYPE_CHECKING:
    from tests.faults.conftest import Serve

pytestmark = pytest.mark.timeout(60)

LATE = pytest.mark.row("one answer among many: its first byte is late")
FAR_BELOW = pytest.mark.row("one answer among many: its rate is far below the others'")
SILENT = pytest.mark.row("one answer among many: it falls silent in its body")
ALL_SLOW = pytest.mark.row("a slow server: all answers are slow")
PAUSE = pytest.mark.row("a slow server: it pauses as a whole")

# No slow answer of these tests ends by itself, and no timeout ends it: a test that ends has cut it.
FOR_EVER_S = 3600.0
TIMEOUTS = {"stall_timeout_s": FOR_EVER_S, "timeout_s": FOR_EVER_S, "worker_timeout_s": 60.0}

DATA = os.urandom(20 * MiB)
PART = 512 * KiB
RANGES = [(start, start + PART) for start in range(0, len(DATA), PART)]
# A part takes 30 ms.
BYTES_PER_S = 16e6
# Where no cut would help, there is none, unless the host is so busy that a thread waits for a processor while its peers
# do not. If peers were chosen wrongly, there would be as many as the budget allows, which are more.
BUSY_HOST_CUTS = 2


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


def pids(fetcher: RangeFetcher) -> list[int]:
    coordinator = fetcher._engine.pool.coordinator
    assert coordinator is not None
    return coordinator.workers.pids


SLOW = [
    pytest.param({"kind": FaultKind.DELAY}, id="no first byte", marks=LATE),
    pytest.param({"kind": FaultKind.STALL}, id="head only", marks=SILENT),
    pytest.param({"kind": FaultKind.STALL, "after_bytes": 100_000}, id="silent in the middle", marks=SILENT),
    pytest.param({"kind": FaultKind.STALL, "after_bytes": PART - 1}, id="silent before the last byte", marks=SILENT),
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


@FAR_BELOW
@pytest.mark.parametrize(
    "slow",
    [
        pytest.param({"kind": FaultKind.TRICKLE, "seconds": 0.01}, id="a part in 80 minutes"),
        pytest.param({"kind": FaultKind.SLOW, "seconds": 1.0}, id="a part in two minutes"),
        pytest.param({"kind": FaultKind.SLOW, "seconds": 0.02}, id="a part in three seconds"),
    ],
)
def test_answer_at_a_far_lower_rate_is_cut(
    serve: Serve, make_fetcher: Callable[..., RangeFetcher], slow: dict[str, Any]
) -> None:
    server = serve({"/object": DATA}, Fault(**slow, at=(7, 30), after_bytes=1000), bytes_per_s=BYTES_PER_S)
    fetcher = make_fetcher()
    fetch_all(fetcher, server)
    assert (fetcher.stats.slow_cut >= 2, fetcher.stats.bytes) == (True, len(DATA))


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        pytest.param({"workers": 1, "connections_per_worker": 1}, 256 * KiB, id="one connection"),
        pytest.param({"connections_per_worker": 32, "max_memory": 64 * MiB}, 128 * KiB, id="64 connections"),
        pytest.param({"part_size": 64 * KiB}, 64 * KiB, id="small parts"),
        pytest.param({"part_size": 64 * KiB}, 1, id="single bytes"),
    ],
)
@SILENT
def test_slow_answers_are_cut_whatever_the_numbers_and_sizes(
    serve: Serve, make_fetcher: Callable[..., RangeFetcher], settings: dict[str, Any], part: int
) -> None:
    faults = [Fault(FaultKind.STALL, at=(9,), seconds=FOR_EVER_S), Fault(FaultKind.DELAY, at=(30,), seconds=FOR_EVER_S)]
    server = serve({"/object": DATA}, *faults, bytes_per_s=BYTES_PER_S)
    ranges = [(start, start + part) for start in range(0, 40 * part * 2, 2 * part)]
    fetcher = make_fetcher(**settings)
    views = fetcher.fetch(server.url("/object"), ranges, max_gap_size=0)
    assert [bytes(view) for view in views] == [DATA[start:end] for start, end in ranges]
    assert fetcher.stats.slow_cut >= 2


@pytest.mark.parametrize("etag", ['W/"1"', ""])
@SILENT
def test_slow_answers_are_cut_where_if_match_can_not_be_sent(
    serve: Serve, make_fetcher: Callable[..., RangeFetcher], etag: str
) -> None:
    slow = Fault(FaultKind.STALL, at=(9,), after_bytes=100_000, seconds=FOR_EVER_S)
    server = serve({"/object": DATA}, slow, bytes_per_s=BYTES_PER_S)
    server.put("/object", DATA, {"ETag": etag})
    fetcher = make_fetcher()
    fetch_all(fetcher, server)
    assert fetcher.stats.slow_cut >= 1


@SILENT
def test_rest_of_a_slow_answer_is_never_of_another_version(
    serve: Serve, make_fetcher: Callable[..., RangeFetcher]
) -> None:
    slow = Fault(FaultKind.STALL, at=(9,), after_bytes=100_000, seconds=FOR_EVER_S)
    overwritten = Fault(FaultKind.OVERWRITTEN, at=(10,))
    server = serve({"/object": DATA}, slow, overwritten, bytes_per_s=BYTES_PER_S)
    server.stage("/object", bytes(len(DATA)), {"ETag": 'W/"other"'})
    fetcher = make_fetcher()
    with pytest.raises(ObjectChanged):
        fetch_all(fetcher, server)


@LATE
@pytest.mark.parametrize("kind", ["asyncio", "fsspec"])
def test_slow_answers_are_cut_in_all_ways_to_fetch(serve: Serve, kind: str) -> None:
    late = Fault(FaultKind.DELAY, at=(9,), seconds=FOR_EVER_S)
    server = serve({"/bucket/object": DATA}, late, bytes_per_s=BYTES_PER_S)
    assert read_all(kind, server) == DATA
    gets = [request for request in server.requests if request.method == "GET"]
    assert len({request.range for request in gets}) < len(gets), "none was requested again"


def read_all(kind: str, server: FaultServer) -> bytes:
    config = PoolConfig(workers=2, connections_per_worker=4, max_memory=32 * MiB, part_size=PART, **TIMEOUTS)
    if kind == "asyncio":

        async def read() -> bytes:
            async with AsyncRangeFetcher(pool_config=config) as fetcher:
                return b"".join(await fetcher.fetch(server.url("/bucket/object"), RANGES))

        return asyncio.run(read())
    filesystem = RangeFileSystem(
        endpoint_url=server.endpoint_url, anon=True, pool_config=config, skip_instance_cache=True
    )
    with contextlib.closing(filesystem):
        return bytes(filesystem.cat_file("bucket/object"))


@SILENT
def test_slow_answers_over_tls_are_cut(
    serve: Serve, make_fetcher: Callable[..., RangeFetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = (Fault(FaultKind.STALL, at=(9,), after_bytes=100_000, seconds=FOR_EVER_S),)
    server = serve({"/object": DATA}, *slow, tls=True, bytes_per_s=BYTES_PER_S)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(server.ca_file))
    fetcher = make_fetcher()
    fetch_all(fetcher, server)
    assert (fetcher.stats.slow_cut >= 1, fetcher.stats.bytes) == (True, len(DATA))


@LATE
def test_next_fetch_knows_what_is_slow(serve: Serve, make_fetcher: Callable[..., RangeFetcher]) -> None:
    server = serve({"/object": DATA}, bytes_per_s=BYTES_PER_S)
    fetcher = make_fetcher()
    fetch_all(fetcher, server)
    # One range alone has no others to be compared with.
    server.inject(Fault(FaultKind.DELAY, at=(1,), seconds=FOR_EVER_S))
    fetch_all(fetcher, server, RANGES[:1])
    assert fetcher.stats.slow_cut >= 1


@SILENT
def test_worker_that_dies_while_its_answers_are_slow_loses_nothing(
    serve: Serve, make_fetcher: Callable[..., RangeFetcher]
) -> None:
    slow = Fault(FaultKind.STALL, at=range(4, 12, 2), after_bytes=100_000, seconds=FOR_EVER_S)
    server = serve({"/object": DATA}, slow, bytes_per_s=BYTES_PER_S)
    fetcher = make_fetcher()

    def kill() -> None:
        server.wait_for_requests(8)
        os.kill(pids(fetcher)[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    fetch_all(fetcher, server)
    thread.join()
    assert fetcher.stats.restarts == 1


@LATE
def test_part_that_is_slow_again_and_again_ends_in_a_timeout(
    serve: Serve, make_fetcher: Callable[..., RangeFetcher]
) -> None:
    server = serve({"/object": DATA}, bytes_per_s=BYTES_PER_S)
    fetcher = make_fetcher(timeout_s=1.5)
    fetch_all(fetcher, server)
    server.inject(Fault(FaultKind.DELAY, covering=5 * PART, seconds=FOR_EVER_S))
    with pytest.raises(PoolTimeout, match=r"within 1\.5 s"):
        fetch_all(fetcher, server)
    assert fetcher.stats.slow_cut >= 2
    server.inject()
    fetch_all(fetcher, server)


@SILENT
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


@ALL_SLOW
@pytest.mark.parametrize(
    ("faults", "bytes_per_s"),
    [
        pytest.param((), 2e6, id="every connection is slow"),
        pytest.param((Fault(FaultKind.DELAY, seconds=0.3),), None, id="every first byte is late"),
        pytest.param((Fault(FaultKind.STALL, after_bytes=1000, seconds=0.5),), None, id="every body pauses"),
        pytest.param((Fault(FaultKind.DELAY, at=range(20, 80), seconds=0.3),), None, id="all become slow"),
    ],
)
def test_server_that_is_slow_for_all_sees_no_cuts(
    serve: Serve, make_fetcher: Callable[..., RangeFetcher], faults: tuple[Fault, ...], bytes_per_s: float | None
) -> None:
    server = serve({"/object": DATA}, *faults, bytes_per_s=bytes_per_s)
    fetcher = make_fetcher()
    fetch_all(fetcher, server)
    assert fetcher.stats.slow_cut <= BUSY_HOST_CUTS
    assert fetcher.stats.requests == len(RANGES) + fetcher.stats.slow_cut


@ALL_SLOW
def test_slow_server_is_not_compared_with_another_one(serve: Serve, make_fetcher: Callable[..., RangeFetcher]) -> None:
    fast, slow = serve({"/object": DATA}, bytes_per_s=BYTES_PER_S), serve({"/object": DATA}, bytes_per_s=1e6)
    fetcher = make_fetcher(max_memory=64 * MiB)
    found = fetcher.fetch_many({fast.url("/object"): RANGES, slow.url("/object"): RANGES[:12]})
    for server, ranges in ((fast, RANGES), (slow, RANGES[:12])):
        assert [bytes(view) for view in found[server.url("/object")]] == [DATA[start:end] for start, end in ranges]
    assert fetcher.stats.slow_cut <= BUSY_HOST_CUTS


@PAUSE
@pytest.mark.parametrize("who", ["the server", "a worker"])
def test_process_that_is_stopped_for_a_while_causes_no_cuts_beyond_the_budget(
    make_fetcher: Callable[..., RangeFetcher], who: str
) -> None:
    with served_by_a_process() as (url, server_pid):
        fetcher = make_fetcher()
        fetcher.fetch(url, [(0, 1)])
        thread = threading.Thread(target=pause, args=(server_pid if who == "the server" else pids(fetcher)[0],))
        for index, view in fetcher.stream(url, RANGES, max_gap_size=0):
            assert view == bytes(PART)
            if index == 10:
                thread.start()
        thread.join()
    assert fetcher.stats.slow_cut <= 2 + len(RANGES) // 10 + PAUSE_S
    assert fetcher.stats.retries == 0


PAUSE_S = 1.5  # longer than a pause for which nothing at all is cut


def pause(pid: int) -> None:
    """Stop a process for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(PAUSE_S)
    finally:
        os.kill(pid, signal.SIGCONT)


SERVER = """
import sys
from mpreader.testing import FaultServer

with FaultServer({"/object": bytes(%d)}, bytes_per_s=%f) as server:
    print(server.url("/object"), flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def served_by_a_process() -> Iterator[tuple[str, int]]:
    """Serve zeros from a process of its own; yields their URL, and the process id."""
    command = [sys.executable, "-c", SERVER % (len(DATA), BYTES_PER_S)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process.pid
        process.communicate()  # the end of its input ends it


@LATE
def test_cuts_are_a_share_of_the_requests_where_most_are_slow(
    serve: Serve, make_fetcher: Callable[..., RangeFetcher]
) -> None:
    slow = Fault(FaultKind.DELAY, at=[n for n in range(1, 1000) if n % 3], seconds=0.5)
    server = serve({"/object": DATA}, slow, bytes_per_s=BYTES_PER_S)
    fetcher = make_fetcher()
    fetch_all(fetcher, server)
    # Two at first, one for each ten that succeed, and one for every two seconds of the six that this may take.
    assert fetcher.stats.slow_cut <= 2 + len(RANGES) // 10 + 3


@pytest.mark.row("500, 503 SlowDown, a brown-out")
def test_overloaded_server_is_met_by_back_off_and_not_by_cuts(
    serve: Serve, make_fetcher: Callable[..., RangeFetcher]
) -> None:
    server = serve({"/object": DATA}, Fault(FaultKind.STATUS, at=range(10, 20), status=503), bytes_per_s=BYTES_PER_S)
    fetcher = make_fetcher()
    fetch_all(fetcher, server)
    assert (fetcher.stats.slow_cut, fetcher.stats.retries) == (0, 10)

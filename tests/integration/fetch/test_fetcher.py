"""Range fetching: any ranges, in any order, in bounded memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpreader
from mpreader import (
    ArenaExhausted,
    ConfigError,
    ItemRange,
    ObjectMissing,
    PlanError,
    PoolClosed,
    PoolConfig,
    RangeFetcher,
    fetch_ranges,
)
from mpreader.config import KiB, MiB
from mpreader.pool.pool import close_shared_pools
from mpreader.testing import Fault, FaultKind, FaultServer

pytestmark = pytest.mark.timeout(60)

DATA = os.urandom(4 * MiB)
SMALL = b"small object"
CONFIG = PoolConfig(
    workers=1, connections_per_worker=4, max_memory=8 * MiB, part_size=128 * KiB, lease_timeout_s=0.5, idle_timeout_s=30
)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"/object": DATA, "/small": SMALL, "/empty": b""}) as server:
        yield server


@pytest.fixture
def fetcher() -> Iterator[RangeFetcher]:
    with RangeFetcher(pool_config=CONFIG) as fetcher:
        yield fetcher


def gets(server: FaultServer) -> int:
    return sum(request.method == "GET" for request in server.requests)


ranges_of_data = st.lists(
    st.tuples(st.integers(0, len(DATA)), st.one_of(st.integers(0, 300), st.integers(0, 400_000))).map(
        lambda pair: (pair[0], min(len(DATA), pair[0] + pair[1]))
    ),
    max_size=12,
)


@settings(max_examples=40)
@given(ranges=ranges_of_data, max_gap_size=st.sampled_from([0, 1, 1000, 1e6, float("inf")]))
def test_fetch_and_stream_give_the_bytes_of_any_ranges(
    fetcher: RangeFetcher, server: FaultServer, ranges: list[tuple[int, int]], max_gap_size: float
) -> None:
    url = server.url("/object")
    expected = [DATA[start:end] for start, end in ranges]
    assert fetcher.fetch(url, ranges, max_gap_size=max_gap_size) == expected
    streamed: list[bytes] = [b"not given"] * len(ranges)
    for index, view in fetcher.stream(url, ranges, max_gap_size=max_gap_size):
        streamed[index] = bytes(view)
    assert streamed == expected


def test_fetch_takes_what_is_unsorted_repeated_overlapping_nested_and_empty(
    fetcher: RangeFetcher, server: FaultServer
) -> None:
    ranges: list[tuple[int, int] | ItemRange]
    ranges = [(900_000, 1_200_000), (5, 5), (0, 10), (0, 10), (5, 2000), (0, 1_000_000), ItemRange(7, 8)]
    views = fetcher.fetch(server.url("/object"), ranges)
    assert [bytes(view) for view in views] == [
        DATA[900_000:1_200_000],
        b"",
        DATA[:10],
        DATA[:10],
        DATA[5:2000],
        DATA[:1_000_000],
        DATA[7:8],
    ]
    views[2][:] = b"0123456789"
    assert bytes(views[3]) == b"0123456789", "views of overlapping ranges share their bytes"


def test_fetch_takes_the_whole_numbers_of_numpy(fetcher: RangeFetcher, server: FaultServer) -> None:
    ranges = np.array([[3, 10], [0, 5]])
    assert fetcher.fetch(server.url("/object"), ranges) == [DATA[3:10], DATA[:5]]


def test_fetch_of_nothing_asks_nobody(fetcher: RangeFetcher, server: FaultServer) -> None:
    assert fetcher.fetch(server.url("/object"), []) == []
    assert fetcher.fetch(server.url("/object"), [(3, 3), (0, 0)]) == [b"", b""]
    assert fetcher.fetch_many({}) == {}
    [(index, view)] = fetcher.stream(server.url("/object"), [(9, 9)])
    assert (index, bytes(view)) == (0, b"")
    assert not server.requests
    assert not fetcher._engine.pool.is_running


def test_fetch_joins_near_ranges_and_leaves_far_ones_apart(fetcher: RangeFetcher, server: FaultServer) -> None:
    near = [(start, start + 100) for start in range(0, 100_000, 1000)]
    fetcher.fetch(server.url("/object"), near, max_gap_size=900)
    assert gets(server) == 1
    fetcher.fetch(server.url("/object"), near[:10], max_gap_size=899)
    assert gets(server) == 11


def test_fetch_of_scattered_ranges_holds_no_gaps(server: FaultServer) -> None:
    # Of 4 MiB that are received, 0.6 MiB are asked for.
    ranges = [(start, start + 10_000) for start in range(0, len(DATA), 64 * KiB)]
    config = PoolConfig(workers=1, max_memory=4 * MiB, part_size=256 * KiB)
    with RangeFetcher(pool_config=config) as fetcher:
        views = fetcher.fetch(server.url("/object"), ranges)
        assert views == [DATA[start:end] for start, end in ranges]
        assert gets(server) == 16
        coordinator, stats = fetcher._engine.pool.coordinator, fetcher.stats
        assert coordinator is not None
        assert coordinator.reserved_bytes <= 1.5 * MiB
        assert stats.bytes - stats.over_read == sum(end - start for start, end in ranges)


@pytest.mark.parametrize("kind", [FaultKind.EARLY_CLOSE, FaultKind.RESET])
def test_fetch_of_scattered_ranges_is_resumed_within_a_gap_and_within_a_range(
    server: FaultServer, kind: FaultKind
) -> None:
    ranges = [(start, start + 10_000) for start in range(5, len(DATA) - 10_000, 64 * KiB)]
    server.inject(*(Fault(kind, at=(number,), after_bytes=77_777 * number) for number in range(1, 20)))
    with RangeFetcher(pool_config=PoolConfig(workers=1, part_size=MiB)) as fetcher:
        assert fetcher.fetch(server.url("/object"), ranges) == [DATA[start:end] for start, end in ranges]
        assert fetcher.stats.retries


def test_fetch_many_gives_each_source_its_own(fetcher: RangeFetcher, server: FaultServer) -> None:
    big, small, empty = (server.url(path) for path in ("/object", "/small", "/empty"))
    result = fetcher.fetch_many({big: [(0, 10), (1_000_000, 1_500_000)], small: [(0, 5), (2, 12)], empty: [(0, 0)]})
    assert list(result) == [big, small, empty]
    assert result[big] == [DATA[:10], DATA[1_000_000:1_500_000]]
    assert result[small] == [SMALL[:5], SMALL[2:]]
    assert result[empty] == [b""]


def test_stream_many_gives_one_object_after_the_other(fetcher: RangeFetcher, server: FaultServer) -> None:
    server.put("/other", DATA[::-1])
    one, other = server.url("/object"), server.url("/other")
    pieces = fetcher.stream_many({one: [(5_000, 9_000), (3, 3), (0, 10)], other: [(7, 9)]}, max_gap_size=0)
    got = [(uri, index, bytes(view)) for uri, index, view in pieces]
    assert got == [(one, 1, b""), (one, 2, DATA[:10]), (one, 0, DATA[5_000:9_000]), (other, 0, DATA[::-1][7:9])]


def test_fetch_object_gives_the_whole_in_one_piece(fetcher: RangeFetcher, server: FaultServer) -> None:
    view = fetcher.fetch_object(server.url("/object"))
    assert view.contiguous
    assert view == DATA
    assert fetcher.fetch_object(server.url("/small")) == SMALL
    assert bytes(fetcher.fetch_object(server.url("/empty"))) == b""
    with pytest.raises(ObjectMissing):
        fetcher.fetch_object(server.url("/none"))


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, len(DATA) + 1)],
        [(0, 10), (len(DATA), len(DATA) + 1)],
        [(5, 3)],
        [(-1, 3)],
        [(0, 1.5)],
        [("0", "1")],
        [(0, True)],
        [(0,)],
        [(0, 1, 2)],
        [7],
        [None],
    ],
    ids=str,
)
def test_fetch_refuses_ranges_that_are_none(fetcher: RangeFetcher, server: FaultServer, ranges: list[object]) -> None:
    with pytest.raises(PlanError):
        fetcher.fetch(server.url("/object"), ranges)  # type: ignore[arg-type]
    with pytest.raises(PlanError):
        list(fetcher.stream(server.url("/object"), ranges))  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["", "object", "/tmp/file", "ftp://host/x", "s3:/bucket/key", "http://", 7, None])
def test_fetch_refuses_sources_that_are_none(fetcher: RangeFetcher, source: object) -> None:
    with pytest.raises(ConfigError):
        fetcher.fetch(source, [(0, 1)])  # type: ignore[arg-type]


def test_fetch_of_more_than_the_memory_is_refused_before_any_get(fetcher: RangeFetcher, server: FaultServer) -> None:
    with pytest.raises(ArenaExhausted, match=r"stream\(\).*MPREADER_MAX_MEMORY"):
        fetcher.fetch_many({server.url(path) + f"?{n}": [(0, len(DATA))] for n in range(3) for path in ("/object",)})
    assert gets(server) == 0


# -- streams


def test_stream_gives_empty_ranges_first_and_others_by_offset(fetcher: RangeFetcher, server: FaultServer) -> None:
    ranges = [(3_000_000, 3_000_010), (5, 5), (100, 200), (0, 50), (1_000_000, 1_300_000), (8, 8)]
    assert [index for index, _ in fetcher.stream(server.url("/object"), ranges)] == [1, 5, 3, 2, 4, 0]


@pytest.mark.parametrize("size", [100, 64 * KiB, 700 * KiB], ids=["tiny", "parts", "larger than a slot"])
@pytest.mark.parametrize("max_gap_size", [0, float("inf")], ids=["apart", "joined"])
def test_stream_of_ranges_side_by_side_stays_in_bounded_memory(
    server: FaultServer, size: int, max_gap_size: float
) -> None:
    # Together they are twice what may be held.
    config = PoolConfig(workers=1, connections_per_worker=4, max_memory=2 * MiB, lease_timeout_s=0.5)
    data = DATA[: 20_000 if size == 100 else len(DATA)]
    ranges = [(start, min(start + size, len(data))) for start in range(0, len(data), size)]
    with RangeFetcher(pool_config=config) as fetcher:
        for index, view in fetcher.stream(server.url("/object"), ranges, max_gap_size=max_gap_size):
            start, end = ranges[index]
            assert view == data[start:end]
            coordinator = fetcher._engine.pool.coordinator
            assert coordinator is not None
            assert coordinator.reserved_bytes <= 2 * MiB


def test_stream_whose_views_are_all_kept_ends_in_a_clear_error(server: FaultServer) -> None:
    config = PoolConfig(workers=1, max_memory=2 * MiB, part_size=64 * KiB, lease_timeout_s=0.3)
    ranges = [(start, start + 64 * KiB) for start in range(0, len(DATA), 64 * KiB)]
    kept: list[tuple[int, memoryview]] = []
    with (
        RangeFetcher(pool_config=config) as fetcher,
        pytest.raises(ArenaExhausted, match="views that are still in use"),
    ):
        kept.extend(fetcher.stream(server.url("/object"), ranges, max_gap_size=0))
    assert len(kept) > 16
    assert all(view == DATA[index * 64 * KiB :][: 64 * KiB] for index, view in kept)


@pytest.mark.row("exception in the consumer; reader dropped without close")
def test_stream_that_is_not_finished_stops_its_downloads(fetcher: RangeFetcher, server: FaultServer) -> None:
    stream = fetcher.stream(server.url("/object"), [(0, len(DATA))] * 2 + [(0, 10)])
    next(stream)
    coordinator = fetcher._engine.pool.coordinator
    assert coordinator is not None
    is_idle = [coordinator._scheduler.is_idle]
    del stream
    while not is_idle[-1] and len(is_idle) < 1000:
        threading.Event().wait(0.01)
        is_idle.append(coordinator._scheduler.is_idle)
    assert (is_idle[0], is_idle[-1]) == (False, True)


def test_stream_starts_when_it_is_first_asked(fetcher: RangeFetcher, server: FaultServer) -> None:
    fetcher.stream(server.url("/object"), [(0, 10)])
    assert not server.requests


# -- many users, and ends


def test_fetcher_serves_four_threads(fetcher: RangeFetcher, server: FaultServer) -> None:
    errors: list[BaseException] = []

    def fetch(offset: int) -> None:
        try:
            for _ in range(8):
                ranges = [(start + offset, start + offset + 20_000) for start in range(0, 3_000_000, 300_000)]
                for (start, end), view in zip(
                    ranges, fetcher.fetch(server.url("/object"), ranges, max_gap_size=0), strict=True
                ):
                    assert view == DATA[start:end]
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=fetch, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_fetcher_counts_what_it_did(fetcher: RangeFetcher, server: FaultServer) -> None:
    assert fetcher.stats.bytes == 0
    fetcher.fetch(server.url("/object"), [(0, 1000), (2 * MiB, 2 * MiB + 300 * KiB)], max_gap_size=0)
    stats = fetcher.stats
    assert stats.bytes == 1000 + 300 * KiB
    assert stats.requests == gets(server) == 4
    assert (stats.retries, stats.restarts) == (0, 0)
    assert stats.seconds > 0
    assert len(stats.workers) == 1
    assert stats.workers[0].seconds > 0
    before = stats.bytes
    fetcher.close()
    assert fetcher.stats.bytes == before, "the numbers outlive the workers"


def test_fetcher_that_is_closed_says_so_and_its_views_stay(server: FaultServer) -> None:
    fetcher = RangeFetcher(pool_config=CONFIG)
    [view] = fetcher.fetch(server.url("/object"), [(5, 500_000)])
    stream = fetcher.stream(server.url("/object"), [(0, MiB), (2 * MiB, 3 * MiB)])
    next(stream)
    fetcher.close()
    fetcher.close()
    assert view == DATA[5:500_000]
    with pytest.raises(PoolClosed):
        fetcher.fetch(server.url("/object"), [(0, 1)])
    with pytest.raises(PoolClosed):
        list(stream)


def test_fetch_ranges_shares_one_warm_pool_per_settings(server: FaultServer) -> None:
    url = server.url("/object")
    assert fetch_ranges(url, [(10, 20), (0, 5)], pool_config=CONFIG) == [DATA[10:20], DATA[:5]]
    before = _workers()
    assert len(before) == 1
    assert mpreader.fetch_ranges(url, [(1_000_000, 2_000_000)], pool_config=CONFIG) == [DATA[1_000_000:2_000_000]]
    assert _workers() == before
    other = PoolConfig(workers=1, connections_per_worker=1, max_memory=MiB)
    assert fetch_ranges(url, [(0, 5)], pool_config=other) == [DATA[:5]]
    assert len(_workers()) == 2
    close_shared_pools()
    assert _workers() == set()
    assert fetch_ranges(url, [(0, 5)], pool_config=CONFIG) == [DATA[:5]]


def _workers() -> set[int]:
    from mpreader.pool import pool

    running = [shared.coordinator for shared in pool._shared.values()]
    return {pid for coordinator in running if coordinator is not None for pid in coordinator.workers.pids}

"""Orders of streams, buffers of the caller's, ranges from the end, deadlines: each as promised."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mpreader import ConfigError, PlanError, PoolClosed, PoolConfig, PoolTimeout, RangeFetcher
from mpreader.config import KiB, MiB
from mpreader.testing import Fault, FaultKind, FaultServer

pytestmark = pytest.mark.timeout(60)

DATA = os.urandom(4 * MiB)
CONFIG = PoolConfig(workers=1, connections_per_worker=4, max_memory=2 * MiB, part_size=128 * KiB, lease_timeout_s=5)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"/object": DATA, "/small": b"small object", "/empty": b""}) as server:
        yield server


@pytest.fixture
def fetcher() -> Iterator[RangeFetcher]:
    with RangeFetcher(pool_config=CONFIG) as fetcher:
        yield fetcher


# -- orders


def test_stream_in_input_order_gives_descending_repeated_and_empty_ranges_as_they_were_given(
    fetcher: RangeFetcher, server: FaultServer
) -> None:
    ranges = [(3 * MiB, 4 * MiB), (7, 7), (0, 100_000), (50_000, 200_000), (2 * MiB, 3 * MiB), (0, 100_000), (9, 9)]
    got = [(index, bytes(view)) for index, view in fetcher.stream(server.url("/object"), ranges, order="input")]
    assert got == [(index, DATA[start:end]) for index, (start, end) in enumerate(ranges)]


def test_stream_many_in_input_order_gives_source_after_source(fetcher: RangeFetcher, server: FaultServer) -> None:
    big, small = server.url("/object"), server.url("/small")
    wanted = {big: [(9, 20), (0, 3)], small: [(6, 12), (2, 2), (0, 5)]}
    got = [(source, index, bytes(view)) for source, index, view in fetcher.stream_many(wanted, order="input")]
    assert got == [
        (big, 0, DATA[9:20]),
        (big, 1, DATA[:3]),
        (small, 0, b"object"),
        (small, 1, b""),
        (small, 2, b"small"),
    ]


def test_stream_in_completion_order_does_not_wait_for_what_is_held_up(server: FaultServer) -> None:
    ranges = [(start, start + MiB) for start in range(0, 4 * MiB, MiB)]
    server.inject(Fault(FaultKind.STALL, covering=0, after_bytes=10, seconds=30))
    config = PoolConfig(workers=1, connections_per_worker=4, max_memory=16 * MiB, part_size=MiB)
    with RangeFetcher(pool_config=config) as fetcher:
        stream = fetcher.stream(server.url("/object"), ranges, order="completion", max_gap_size=0)
        first_three = {index: bytes(view) for index, view in [next(stream) for _ in range(3)]}
        stream.close()
    assert first_three == {index: DATA[index * MiB :][:MiB] for index in (1, 2, 3)}


def test_stream_in_completion_order_of_more_than_the_memory_gives_every_range_once(
    fetcher: RangeFetcher, server: FaultServer
) -> None:
    ranges = [
        (start, start + 256 * KiB) for start in range(0, len(DATA), 256 * KiB)
    ] * 3  # more than twice of what may be held
    seen = []
    for index, view in fetcher.stream(server.url("/object"), ranges, order="completion", max_gap_size=0):
        assert view == DATA[ranges[index][0] : ranges[index][1]]
        seen.append(index)
        del view
    assert sorted(seen) == list(range(len(ranges)))


def test_an_order_that_is_none_is_refused(fetcher: RangeFetcher, server: FaultServer) -> None:
    with pytest.raises(ConfigError, match='"offset", "input" or "completion"'):
        fetcher.stream(server.url("/object"), [(0, 1)], order="random")  # type: ignore[arg-type]


def test_stream_shared_by_threads_gives_each_range_to_one_of_them(fetcher: RangeFetcher, server: FaultServer) -> None:
    ranges = [(start, start + 64 * KiB) for start in range(0, len(DATA), 64 * KiB)]
    got: list[tuple[int, bytes]] = []
    with fetcher.stream(server.url("/object"), ranges, max_gap_size=0) as stream:
        threads = [
            threading.Thread(target=lambda: got.extend((index, bytes(view)) for index, view in stream))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(got) == [(index, DATA[start:end]) for index, (start, end) in enumerate(ranges)]


def test_stream_closed_by_another_thread_ends_whoever_waits_for_it(server: FaultServer) -> None:
    server.inject(Fault(FaultKind.STALL, after_bytes=10, seconds=3600))
    with RangeFetcher(pool_config=CONFIG) as fetcher:
        stream = fetcher.stream(server.url("/object"), [(0, 100_000)])

        def close_when_it_waits() -> None:
            server.wait_for_requests(2)
            stream.close()

        closer = threading.Thread(target=close_when_it_waits)
        closer.start()
        with pytest.raises(PoolClosed):
            next(stream)
        assert list(stream) == []
        closer.join()


# -- ranges from the end


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ((-8, None), (4, 12)),
        ((-100, None), (0, 12)),
        ((3, None), (3, 12)),
        ((0, -1), (0, 11)),
        ((-8, -6), (4, 6)),
        ((None, 4), (0, 4)),
        ((12, None), (12, 12)),
    ],
)
def test_ranges_count_from_the_end_as_in_a_slice(
    fetcher: RangeFetcher, server: FaultServer, asked: tuple[int, int | None], meant: tuple[int, int]
) -> None:
    [view, other] = fetcher.fetch(server.url("/small"), [asked, (0, 2)])
    assert [bytes(view), bytes(other)] == [b"small object"[meant[0] : meant[1]], b"sm"]


def test_ranges_from_the_end_cost_one_head(fetcher: RangeFetcher, server: FaultServer) -> None:
    fetcher.fetch(server.url("/object"), [(-8, None), (0, 10), (-100, -50)])
    assert [request.method for request in server.requests].count("HEAD") == 1


@pytest.mark.parametrize("asked", [(13, None), (-2, -5), (5, -10)])
def test_ranges_that_lie_outside_of_the_object_are_refused(
    fetcher: RangeFetcher, server: FaultServer, asked: tuple[int, int | None]
) -> None:
    with pytest.raises(PlanError):
        fetcher.fetch(server.url("/small"), [asked])


@pytest.mark.parametrize(("path", "content"), [("/small", b"small object"), ("/empty", b"")])
def test_no_ranges_mean_the_whole_object(fetcher: RangeFetcher, server: FaultServer, path: str, content: bytes) -> None:
    assert fetcher.fetch(server.url(path), None) == [content]
    assert bytes(fetcher.fetch_object(server.url(path))) == content


# -- buffers of the caller's

RANGES = [(3 * MiB, 4 * MiB), (0, 1000), (5, 5), (500, 2000)]
EXPECTED = b"".join(DATA[start:end] for start, end in RANGES)


def _mapped() -> mmap.mmap:
    return mmap.mmap(-1, len(EXPECTED))


@pytest.mark.parametrize(
    "make",
    [
        lambda: bytearray(len(EXPECTED)),
        lambda: memoryview(bytearray(len(EXPECTED))),
        lambda: np.zeros(len(EXPECTED) // 4, np.float32),
        lambda: np.zeros((4, len(EXPECTED) // 4), np.int8),
        _mapped,
    ],
    ids=["bytearray", "memoryview", "float32 array", "2-d array", "mmap"],
)
def test_fetch_fills_a_buffer_with_the_ranges_one_after_the_other(
    fetcher: RangeFetcher, server: FaultServer, make: Callable[[], object]
) -> None:
    buffer = make()
    views = fetcher.fetch(server.url("/object"), RANGES, out=buffer)
    assert [bytes(view) for view in views] == [DATA[start:end] for start, end in RANGES]
    assert bytes(buffer) == EXPECTED  # type: ignore[call-overload]
    if isinstance(buffer, mmap.mmap):
        del views
        buffer.close()


def test_fetch_fills_torch_tensors_of_any_type(fetcher: RangeFetcher, server: FaultServer) -> None:
    torch = pytest.importorskip("torch")
    targets = [torch.zeros(512, dtype=torch.bfloat16), torch.zeros((), dtype=torch.int64), torch.zeros(0)]
    fetcher.fetch(server.url("/object"), [(0, 1024), (2048, 2056), (7, 7)], out=targets)
    assert targets[0].view(torch.uint8).numpy().tobytes() == DATA[:1024]
    assert targets[1].item() == int.from_bytes(DATA[2048:2056], "little", signed=True)
    with pytest.raises(TypeError, match="contiguous tensor"):
        fetcher.fetch(server.url("/object"), [(0, 8)], out=torch.zeros((2, 4), dtype=torch.uint8).t())


def test_fetch_into_a_buffer_may_be_larger_than_the_memory(fetcher: RangeFetcher, server: FaultServer) -> None:
    buffer = bytearray(3 * len(DATA))
    fetcher.fetch(server.url("/object"), [(0, len(DATA))] * 3, out=buffer)
    assert buffer == DATA * 3
    coordinator = fetcher._engine.pool.coordinator
    assert coordinator is not None
    assert coordinator.reserved_bytes <= 2 * MiB


def test_fetch_many_fills_a_buffer_for_each_source(fetcher: RangeFetcher, server: FaultServer) -> None:
    big, small = server.url("/object"), server.url("/small")
    first, second = bytearray(100), bytearray(12)
    fetcher.fetch_many({big: [(50, 150)], small: None}, out={big: first, small: [second]})
    assert [bytes(first), bytes(second)] == [DATA[50:150], b"small object"]
    with pytest.raises(PlanError, match="no entry"):
        fetcher.fetch_many({big: [(50, 150)], small: None}, out={big: first})


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (bytearray(9), PlanError),
        ([bytearray(10), bytearray(1)], PlanError),
        (bytes(10), TypeError),
        ("text", TypeError),
        (np.zeros((10, 2), np.int8)[:, 0], TypeError),
    ],
    ids=["too small", "too many", "read-only", "no buffer", "not contiguous"],
)
def test_fetch_refuses_buffers_that_do_not_fit_before_any_get(
    fetcher: RangeFetcher, server: FaultServer, out: object, error: type[Exception]
) -> None:
    with pytest.raises(error, match="out"):
        fetcher.fetch(server.url("/object"), [(0, 10)], out=out)
    assert not server.requests


# -- deadlines


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_call_ends_when_its_time_is_up(server: FaultServer, method: str) -> None:
    server.inject(Fault(FaultKind.DELAY, method=method, seconds=3600))
    with RangeFetcher(pool_config=CONFIG) as fetcher:
        started = time.monotonic()
        with pytest.raises(PoolTimeout, match="when the time given"):
            fetcher.fetch(server.url("/object"), [(-10, None)], timeout_s=0.5)
        assert time.monotonic() - started > 0.4
        with pytest.raises(TimeoutError):  # as the standard library calls it
            next(fetcher.stream(server.url("/object"), [(0, 10)], timeout_s=0.2))


@pytest.mark.parametrize("timeout_s", [0, -1, True, "soon", float("nan")])
def test_timeouts_that_are_none_are_refused(fetcher: RangeFetcher, server: FaultServer, timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="timeout_s"):
        fetcher.fetch(server.url("/object"), [(0, 1)], timeout_s=timeout_s)

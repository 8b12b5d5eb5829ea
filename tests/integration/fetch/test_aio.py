"""The fetcher for asyncio: the same bytes, many calls at once, and none that is cancelled goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Iterator

import pytest

from mpreader import AsyncRangeFetcher, ObjectMissing, PlanError, PoolClosed, PoolConfig, PoolTimeout
from mpreader.config import KiB, MiB
from mpreader.testing import Fault, FaultKind, FaultServer

pytestmark = pytest.mark.timeout(60)

DATA = os.urandom(4 * MiB)
CONFIG = PoolConfig(workers=1, connections_per_worker=4, max_memory=2 * MiB, part_size=128 * KiB, lease_timeout_s=5)

Work = Callable[[AsyncRangeFetcher], Coroutine[object, object, None]]


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"/object": DATA, "/small": b"small object"}) as server:
        yield server


def run(work: Work, config: PoolConfig = CONFIG) -> None:
    async def main() -> None:
        async with AsyncRangeFetcher(pool_config=config) as fetcher:
            await work(fetcher)

    asyncio.run(main())


def test_await_gives_the_same_as_the_plain_fetcher(server: FaultServer) -> None:
    async def work(fetcher: AsyncRangeFetcher) -> None:
        big, small = server.url("/object"), server.url("/small")
        ranges = [(3 * MiB, 4 * MiB), (0, 10), (5, 5), (-4, None)]
        expected = [DATA[3 * MiB :], DATA[:10], b"", DATA[-4:]]
        assert await fetcher.fetch(big, ranges) == expected
        assert await fetcher.fetch_many({big: [(1, 3)], small: None}) == {big: [DATA[1:3]], small: [b"small object"]}
        assert bytes(await fetcher.fetch_object(small)) == b"small object"
        assert (await fetcher.stat(big)).size == len(DATA)
        buffer = bytearray(3 * len(DATA))  # more than the memory
        await fetcher.fetch(big, [(0, len(DATA))] * 3, out=buffer)
        assert buffer == DATA * 3
        assert fetcher.stats.requests == sum(request.method == "GET" for request in server.requests)

    run(work)


@pytest.mark.parametrize("order", ["offset", "input", "completion"])
def test_async_for_gives_every_range_in_the_order_that_was_asked_for(server: FaultServer, order: str) -> None:
    ranges = [(start, start + 200_000) for start in range(3_600_000, 0, -400_000)] + [(9, 9)]
    got: list[tuple[int, bytes]] = []

    async def work(fetcher: AsyncRangeFetcher) -> None:
        async for index, view in fetcher.stream(server.url("/object"), ranges, order=order):  # type: ignore[arg-type]
            got.append((index, bytes(view)))
            del view

    run(work)
    everything = [(index, DATA[start:end]) for index, (start, end) in enumerate(ranges)]
    if order == "input":
        assert got == everything
    elif order == "offset":
        assert [index for index, _ in got] == [9, *range(8, -1, -1)]
    assert sorted(got) == everything


def test_calls_run_side_by_side(server: FaultServer) -> None:
    # Each waits for an answer that comes only when all have asked.
    server.inject(Fault(FaultKind.DELAY, seconds=1.0))

    async def work(fetcher: AsyncRangeFetcher) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        views = await asyncio.gather(*(fetcher.fetch(server.url("/object"), [(n, n + 5)]) for n in range(4)))
        assert loop.time() - started < 3.5, "four answers of a second each"
        assert [bytes(view) for [view] in views] == [DATA[n : n + 5] for n in range(4)]

    run(work)


def test_call_that_is_cancelled_stops_its_downloads_and_the_fetcher_goes_on(server: FaultServer) -> None:
    server.inject(Fault(FaultKind.STALL, path="/object", after_bytes=10, seconds=30))

    async def work(fetcher: AsyncRangeFetcher) -> None:
        call = asyncio.create_task(fetcher.fetch(server.url("/object"), [(0, MiB)]))
        await asyncio.to_thread(server.wait_for_requests, 2)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        coordinator = fetcher._engine.pool.coordinator
        assert coordinator is not None
        while not coordinator._scheduler.is_idle:
            await asyncio.sleep(0.01)
        assert bytes(await fetcher.fetch_object(server.url("/small"))) == b"small object"

    run(work)


def test_stream_that_is_left_early_stops_its_downloads(server: FaultServer) -> None:
    ranges = [(start, start + 128 * KiB) for start in range(0, len(DATA), 128 * KiB)] * 4

    async def work(fetcher: AsyncRangeFetcher) -> None:
        stream = fetcher.stream(server.url("/object"), ranges, max_gap_size=0)
        async with contextlib.aclosing(stream) as pieces:
            async for index, view in pieces:
                assert view == DATA[ranges[index][0] : ranges[index][1]]
                del view
                break
        coordinator = fetcher._engine.pool.coordinator
        assert coordinator is not None
        while not coordinator._scheduler.is_idle:
            await asyncio.sleep(0.01)

    run(work)
    assert len(server.requests) < len(ranges)


def test_call_ends_when_its_time_is_up(server: FaultServer) -> None:
    server.inject(Fault(FaultKind.STALL, after_bytes=10, seconds=30))

    async def work(fetcher: AsyncRangeFetcher) -> None:
        with pytest.raises(PoolTimeout, match="when the time given"):
            await fetcher.fetch(server.url("/object"), [(0, 100)], timeout_s=0.5)

    run(work)


def test_errors_are_those_of_the_plain_fetcher(server: FaultServer) -> None:
    async def work(fetcher: AsyncRangeFetcher) -> None:
        with pytest.raises(ObjectMissing):
            await fetcher.fetch(server.url("/none"), [(0, 1)])
        with pytest.raises(PlanError):
            await fetcher.fetch(server.url("/small"), [(5, 2)])
        await fetcher.close()
        with pytest.raises(PoolClosed):
            await fetcher.fetch(server.url("/small"), [(0, 1)])

    run(work)

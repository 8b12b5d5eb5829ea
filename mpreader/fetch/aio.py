"""Range fetches for asyncio: the same pool, awaited instead of waited for."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Collection, Mapping
from typing import TYPE_CHECKING

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.fetch.engine import Ranges, deadline_of
from mpreader.fetch.fetcher import DEFAULT_FETCH_GAP_SIZE, RangeFetcher
from mpreader.fetch.plan import StreamOrder
from mpreader.fetch.stream import Collected, Filled, Order, PieceSequence
from mpreader.pool.source import ObjectVersion
from mpreader.pool.stats import PoolStats
from mpreader.pool.transfer import LOOK_S, Transfer
from mpreader.telemetry.progress import Progress

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AsyncRangeFetcher"]


class AsyncRangeFetcher:
    """:class:`~mpreader.RangeFetcher` for asyncio: the same methods, to be awaited, and streams for ``async for``.

    Any number of calls may be under way at one time. A call that is cancelled stops its downloads.

    Args:
        s3client_config: How S3 is reached. None: the defaults and the usual ``AWS_*`` environment.
        pool_config: Settings of the worker pool. None: the defaults.
        progress: Whether calls that take long show a progress bar; as for :class:`~mpreader.RangeFetcher`.

    Raises:
        ConfigError: A setting is wrong, or the host has too little memory.
        TypeError: An argument is something else.
    """

    def __init__(
        self,
        s3client_config: S3ClientConfig | None = None,
        pool_config: PoolConfig | None = None,
        *,
        progress: bool | None = False,
    ) -> None:
        self._fetcher = RangeFetcher(s3client_config, pool_config, progress=progress)
        self._engine = self._fetcher._engine

    async def fetch(
        self,
        source: str,
        ranges: Ranges,
        *,
        out: object = None,
        max_gap_size: float = DEFAULT_FETCH_GAP_SIZE,
        timeout_s: float | None = None,
    ) -> list[memoryview]:
        """Fetch ranges of one object; see :meth:`mpreader.RangeFetcher.fetch`."""
        outs = None if out is None else {source: out}
        found = await self.fetch_many({source: ranges}, out=outs, max_gap_size=max_gap_size, timeout_s=timeout_s)
        return found[source]

    async def fetch_many(
        self,
        ranges_by_source: Mapping[str, Ranges],
        *,
        out: Mapping[str, object] | None = None,
        max_gap_size: float = DEFAULT_FETCH_GAP_SIZE,
        timeout_s: float | None = None,
    ) -> dict[str, list[memoryview]]:
        """Fetch ranges of several objects at once; see :meth:`mpreader.RangeFetcher.fetch_many`."""
        deadline = deadline_of(timeout_s)
        # Plans are made in threads: that may import boto3, start processes and ask servers for sizes.
        order = await asyncio.to_thread(
            self._engine.plan_fetch, ranges_by_source, max_gap_size, deadline, has_room=out is not None
        )
        result = Collected(order) if out is None else Filled(order, out)
        async with contextlib.aclosing(self._pieces(order, "completion", deadline)) as pieces:
            async for piece in pieces:
                result.put(*piece)
        return dict(zip(order.uris, result.views, strict=True))

    async def stream(
        self,
        source: str,
        ranges: Ranges,
        *,
        order: StreamOrder = "offset",
        max_gap_size: float = DEFAULT_FETCH_GAP_SIZE,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[tuple[int, memoryview], None]:
        """Fetch ranges of one object one after the other; see :meth:`mpreader.RangeFetcher.stream`.

        A loop that is left early should close it: ``async with contextlib.aclosing(fetcher.stream(…)) as pieces``.
        """
        many = self.stream_many({source: ranges}, order=order, max_gap_size=max_gap_size, timeout_s=timeout_s)
        async with contextlib.aclosing(many) as pieces:
            async for _, index, view in pieces:
                yield index, view
                del view

    async def stream_many(
        self,
        ranges_by_source: Mapping[str, Ranges],
        *,
        order: StreamOrder = "offset",
        max_gap_size: float = DEFAULT_FETCH_GAP_SIZE,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[tuple[str, int, memoryview], None]:
        """Fetch ranges of several objects one after the other; see :meth:`mpreader.RangeFetcher.stream_many`."""
        deadline = deadline_of(timeout_s)
        planned = await asyncio.to_thread(self._engine.plan_stream, ranges_by_source, max_gap_size, order, deadline)
        async with contextlib.aclosing(self._pieces(planned, order, deadline)) as pieces:
            async for number, index, view in pieces:
                yield planned.uris[number], index, view
                del view

    async def fetch_object(self, source: str, *, out: object = None, timeout_s: float | None = None) -> memoryview:
        """Fetch a whole object into one piece of memory; see :meth:`fetch`."""
        return (await self.fetch(source, None, out=out, timeout_s=timeout_s))[0]

    async def stat(self, source: str, *, timeout_s: float | None = None) -> ObjectVersion:
        """Ask for the size and the ETag of an object; see :meth:`mpreader.RangeFetcher.stat`."""
        return await asyncio.to_thread(self._fetcher.stat, source, timeout_s=timeout_s)

    @property
    def stats(self) -> PoolStats:
        """What the workers have done so far."""
        return self._fetcher.stats

    async def close(self) -> None:
        """End the workers and wait until they are gone. Views that were handed out stay valid. Idempotent."""
        await asyncio.to_thread(self._fetcher.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"Async{self._fetcher!r}"

    async def _pieces(
        self, order: Order, stream_order: StreamOrder, deadline: float
    ) -> AsyncGenerator[tuple[int, int, memoryview], None]:
        sequence = PieceSequence(order, stream_order)
        for piece in sequence.first():
            yield piece
        if order.batches:
            await asyncio.to_thread(self._engine.pool.start)  # starts processes, if there are none
            transfer = self._engine.begin(order)
            try:
                with self._engine.progress_of(transfer) as progress:
                    while sequence.wanted:
                        pieces = sequence.pieces_of(*await _take_first(transfer, sequence.wanted, deadline, progress))
                        for piece in pieces:
                            yield piece
                            del piece  # or it would keep its slot while the next one is waited for
            finally:
                transfer.close()
        for piece in sequence.last():
            yield piece


async def _take_first(
    transfer: Transfer, wanted: Collection[int], deadline: float, progress: Progress
) -> tuple[int, memoryview]:
    """Await what :meth:`Transfer.take_first` waits for; if this is cancelled, nobody waits any more."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    take = transfer.begin_take(wanted, lambda: _wake(loop, done))
    try:
        while not take.is_done:
            left_s = deadline - time.monotonic()
            wait_s = min(left_s, LOOK_S) if progress.is_shown else left_s
            try:
                await asyncio.wait_for(done.wait(), None if wait_s == math.inf else max(0.0, wait_s))
            except asyncio.TimeoutError:  # another class before Python 3.11
                if time.monotonic() >= deadline:
                    raise transfer.late(wanted) from None
                progress.advance_to(transfer.received_bytes)
        return transfer.result(take)
    finally:
        transfer.cancel(take)


def _wake(loop: asyncio.AbstractEventLoop, done: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
        loop.call_soon_threadsafe(done.set)

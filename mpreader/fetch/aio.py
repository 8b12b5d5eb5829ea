"""Range fetcher for asyncio: offers the methods of the plain fetcher as coroutines and asynchronous generators.

It uses the same engine and pool as :mod:`mpreader.fetch.fetcher`, and must not block the event loop. Therefore plans
are made in threads: planning may import boto3, start processes and ask servers for sizes. Waiting for bytes needs no
thread, because the coordinator's thread wakes the event loop when bytes have arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Collection, Mapping
from typing import TYPE_CHECKING

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.fetch.arguments import DEFAULT_FETCH_GAP_SIZE, DEFAULT_STREAM_ORDER, FetchOptions, Ranges, StreamOrder
from mpreader.fetch.engine import Engine
from mpreader.fetch.plan import FetchPlan
from mpreader.fetch.result import result_of
from mpreader.fetch.stream import Piece, PieceSequence
from mpreader.pool.source import ObjectVersion
from mpreader.pool.stats import PoolStats
from mpreader.pool.transfer import ON_WAIT_INTERVAL_S, Transfer
from mpreader.telemetry.progress import Progress

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AsyncRangeFetcher"]


class AsyncRangeFetcher:
    """:class:`~mpreader.RangeFetcher` for asyncio: its methods are awaited, its streams are read by ``async for``.

    Arguments and errors are described at :class:`~mpreader.RangeFetcher`. Any number of calls may run at the same
    time. A call that is cancelled stops its downloads. It can be pickled, as a :class:`~mpreader.RangeFetcher` can.

    Args:
        s3client_config: As for :class:`~mpreader.RangeFetcher`.
        pool_config: As for :class:`~mpreader.RangeFetcher`.
        progress: As for :class:`~mpreader.RangeFetcher`.

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
        self._engine = Engine(s3client_config, pool_config, progress=progress)

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
        options = FetchOptions(max_gap_size=max_gap_size, timeout_s=timeout_s)
        plan = await asyncio.to_thread(self._engine.plan_fetch, ranges_by_source, options, has_room=out is not None)
        result = result_of(plan, out)
        # A generator that is left by an error or a cancellation ends at some later time, when the event loop finalizes
        # it. aclosing() ends it at once, and with it the downloads.
        async with contextlib.aclosing(self._pieces(plan, options)) as pieces:
            async for piece in pieces:
                result.put(*piece)
                del piece  # a copied piece would otherwise keep its slot while the next one is waited for
        return result.views_by_uri()

    async def stream(
        self,
        source: str,
        ranges: Ranges,
        *,
        order: StreamOrder = DEFAULT_STREAM_ORDER,
        max_gap_size: float = DEFAULT_FETCH_GAP_SIZE,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[tuple[int, memoryview], None]:
        """Fetch ranges of one object one after the other; see :meth:`mpreader.RangeFetcher.stream`.

        A program that may leave the loop early should close the stream:
        ``async with contextlib.aclosing(fetcher.stream(…)) as pieces``.
        """
        many = self.stream_many({source: ranges}, order=order, max_gap_size=max_gap_size, timeout_s=timeout_s)
        async with contextlib.aclosing(many) as pieces:
            async for _, index, view in pieces:
                yield index, view
                del view  # it would otherwise keep its slot while the next one is waited for

    async def stream_many(
        self,
        ranges_by_source: Mapping[str, Ranges],
        *,
        order: StreamOrder = DEFAULT_STREAM_ORDER,
        max_gap_size: float = DEFAULT_FETCH_GAP_SIZE,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[tuple[str, int, memoryview], None]:
        """Fetch ranges of several objects one after the other; see :meth:`mpreader.RangeFetcher.stream_many`."""
        options = FetchOptions(order=order, max_gap_size=max_gap_size, timeout_s=timeout_s)
        plan = await asyncio.to_thread(self._engine.plan_stream, ranges_by_source, options)
        async with contextlib.aclosing(self._pieces(plan, options)) as pieces:
            async for source_index, index, view in pieces:
                yield plan.uris[source_index], index, view
                del view  # it would otherwise keep its slot while the next one is waited for

    async def fetch_object(self, source: str, *, out: object = None, timeout_s: float | None = None) -> memoryview:
        """Fetch a whole object into one piece of memory; see :meth:`mpreader.RangeFetcher.fetch_object`."""
        return (await self.fetch(source, None, out=out, timeout_s=timeout_s))[0]

    async def stat(self, source: str, *, timeout_s: float | None = None) -> ObjectVersion:
        """Ask for the size and the ETag of an object; see :meth:`mpreader.RangeFetcher.stat`."""
        return await asyncio.to_thread(self._engine.stat, source, FetchOptions(timeout_s=timeout_s))

    @property
    def stats(self) -> PoolStats:
        """Statistics so far: bytes, requests, retries and seconds, in total and for each worker."""
        return self._engine.pool.stats()

    async def close(self) -> None:
        """Stop the workers and wait until they have exited. Views that were handed out stay valid. Idempotent."""
        await asyncio.to_thread(self._engine.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncRangeFetcher({self._engine.pool!r})"

    async def _pieces(self, plan: FetchPlan, options: FetchOptions) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of a plan in the order of the call. The caller must close the generator."""
        sequence = PieceSequence(plan, options.order)
        for piece in sequence.first():
            yield piece
        if plan.batches:
            # In a thread, because it starts the worker processes if none are running; begin() then finds them running.
            await asyncio.to_thread(self._engine.pool.start)
            with (
                contextlib.closing(self._engine.begin(plan)) as transfer,
                self._engine.progress_of(transfer) as progress,
            ):
                while sequence.wanted:
                    taken = await _take_first(transfer, sequence.wanted, options.deadline, progress)
                    pieces = sequence.pieces_of(*taken)
                    # No variable may refer to a slot that has been handed out while the next one is waited for: it
                    # would stay occupied, and memory may have room for no other.
                    del taken
                    for piece in pieces:
                        yield piece
                        del piece
        for piece in sequence.last():
            yield piece


async def _take_first(
    transfer: Transfer, wanted: Collection[int], deadline: float, progress: Progress
) -> tuple[int, memoryview]:
    """Take one of the slot reads ``wanted``: :meth:`Transfer.take_first` without a thread that waits.

    The progress bar is advanced meanwhile. A cancellation, or any error, also cancels the take.
    """
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    # The callback runs in the coordinator's thread and under the lock of the transfer: it only wakes this task.
    take = transfer.begin_take(wanted, lambda: _wake(loop, done))
    try:
        while not take.is_done:
            left_s = deadline - time.monotonic()
            # With a progress bar, wake up now and then to redraw it; without one, only for bytes or the deadline.
            wait_s = min(left_s, ON_WAIT_INTERVAL_S) if progress.is_shown else left_s
            # Not asyncio.wait_for: before Python 3.12 it loses a cancellation that comes together with the bytes.
            timer = None if wait_s == math.inf else loop.call_later(max(0.0, wait_s), done.set)
            try:
                await done.wait()
            finally:
                if timer is not None:
                    timer.cancel()
            done.clear()  # before the loop looks at the take again: whoever ends that sets the event afterwards
            if not take.is_done and time.monotonic() >= deadline:
                raise transfer.timeout_error(wanted)
            progress.advance_to(transfer.received_bytes)
        return transfer.result(take)
    except BaseException:  # CancelledError included: a take that no task waits for would keep the slot it is given
        transfer.cancel(take)
        raise


def _wake(loop: asyncio.AbstractEventLoop, done: asyncio.Event) -> None:
    # asyncio.Event is not thread-safe, so the loop's own thread sets it. The RuntimeError says that the loop has been
    # closed meanwhile: then no task waits any more.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(done.set)

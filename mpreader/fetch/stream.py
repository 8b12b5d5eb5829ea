"""Streams of ranges: iterators over the ranges of a plan, as they come from the pool.

:class:`RangeStream` is what callers of ``stream`` hold; a fetch reads by one, too. The functions that put ranges into
their order serve asyncio as well. Nothing is planned here.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

from mpreader.fetch.arguments import FetchOptions, StreamOrder
from mpreader.fetch.engine import Engine
from mpreader.fetch.plan import Batch, FetchPlan

if TYPE_CHECKING:
    from typing_extensions import Self

    from mpreader.pool.transfer import Transfer

__all__ = ["RangeStream", "in_order", "in_order_async", "members_of"]

Piece = TypeVar("Piece")


class RangeStream(Generic[Piece]):
    """Iterator over ranges, and a context manager. Thread-safe: threads that share it get each range once.

    Made by :meth:`mpreader.RangeFetcher.stream`. Downloads begin when the first range is asked for, and end with the
    last one, with ``close()``, at an error, or when the stream is dropped.

    Args:
        engine: Engine of the fetcher.
        plan: Plan of the call.
        options: Options of the call.
        make: Makes the item that is handed out of a source index, the position of a range, and its bytes.
    """

    def __init__(
        self, engine: Engine, plan: FetchPlan, options: FetchOptions, make: Callable[[int, int, memoryview], Piece]
    ) -> None:
        self._lock = threading.Lock()  # guards _pieces: a generator can't be advanced by two threads at one time
        self._is_closed = False
        # Generators of another object, not of this one: a stream that is dropped must end at once, and would not if it
        # and its generators referred to each other.
        self._reading = _Reading(engine, plan, options.order, options.deadline)
        self._pieces = (make(*piece) for piece in in_order(plan, options.order, self._reading.pieces()))

    def close(self) -> None:
        """Stop the downloads; threads that wait for a range get ``PoolClosed``. From any thread; idempotent."""
        self._is_closed = True
        self._reading.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        if self._is_closed:
            raise StopIteration
        with self._lock:
            try:
                return next(self._pieces)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_reading"):  # not where __init__ failed
            self.close()


class _Reading:
    """Transfer behind a stream; begun when the first piece is asked for."""

    def __init__(self, engine: Engine, plan: FetchPlan, stream_order: StreamOrder, deadline: float) -> None:
        self._engine = engine
        self._plan = plan
        self._stream_order = stream_order
        self._deadline = deadline
        self._transfer: Transfer | None = None
        self._is_closed = False

    def pieces(self) -> Iterator[tuple[int, int, memoryview]]:
        batches = self._plan.batches
        if not batches:
            return
        transfer = self._transfer = self._engine.begin(self._plan)
        if self._is_closed:  # by another thread, just now
            transfer.close()
        remaining = dict.fromkeys(range(len(batches)))
        for number in range(len(batches)):
            wanted: Collection[int] = remaining if self._stream_order == "completion" else (number,)
            taken, slot_view = transfer.take_first(wanted, self._deadline)
            del remaining[taken]
            yield from members_of(batches[taken], slot_view)
            del slot_view  # or it would keep the slot while the next one is waited for

    def close(self) -> None:
        self._is_closed = True
        if self._transfer is not None:
            self._transfer.close()


def in_order(
    plan: FetchPlan, stream_order: StreamOrder, pieces: Iterator[tuple[int, int, memoryview]]
) -> Iterator[tuple[int, int, memoryview]]:
    """The pieces, and the empty ranges: those come first, or at their place in the input."""
    for number, index in _empty_ranges(plan, stream_order):
        yield number, index, memoryview(b"")
    if stream_order != "input":
        yield from pieces
        return
    place = (0, 0)
    for number, index, view in pieces:
        yield from _empty_between(plan, place, (number, index))
        yield number, index, view
        del view  # or it would keep the slot while the next one is waited for
        place = (number, index + 1)
    yield from _empty_between(plan, place, (len(plan.ranges), 0))


async def in_order_async(
    plan: FetchPlan, stream_order: StreamOrder, pieces: AsyncIterator[tuple[int, int, memoryview]]
) -> AsyncGenerator[tuple[int, int, memoryview], None]:
    """The same for asyncio."""
    for number, index in _empty_ranges(plan, stream_order):
        yield number, index, memoryview(b"")
    place = (0, 0)
    async for number, index, view in pieces:
        if stream_order == "input":
            for empty in _empty_between(plan, place, (number, index)):
                yield empty
        yield number, index, view
        del view  # or it would keep the slot while the next one is waited for
        place = (number, index + 1)
    if stream_order == "input":
        for empty in _empty_between(plan, place, (len(plan.ranges), 0)):
            yield empty


def _empty_ranges(plan: FetchPlan, stream_order: StreamOrder) -> Iterator[tuple[int, int]]:
    """(source, index) of the ranges that come before all others."""
    if stream_order != "input":
        for number, ranges in enumerate(plan.ranges):
            yield from ((number, index) for index, item_range in enumerate(ranges) if not item_range.size)


def _empty_between(
    plan: FetchPlan, start: tuple[int, int], stop: tuple[int, int]
) -> Iterator[tuple[int, int, memoryview]]:
    number, index = start
    while (number, index) < stop:
        if index < len(plan.ranges[number]):
            yield number, index, memoryview(b"")
            index += 1
        else:
            number, index = number + 1, 0


def members_of(batch: Batch, slot_view: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Yield the ranges of a batch: source index, position of the range, its bytes."""
    for index, slot_offset, nbytes in batch.members:
        yield batch.source_index, index, slot_view[slot_offset : slot_offset + nbytes]

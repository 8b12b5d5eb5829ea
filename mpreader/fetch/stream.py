"""Ranges that were planned, as they come from the pool: as a stream, or into the caller's own buffers."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from mpreader.errors import PlanError
from mpreader.fetch.buffers import targets_of
from mpreader.fetch.plan import Batch, StreamOrder
from mpreader.ranges import ItemRange

if TYPE_CHECKING:
    from typing_extensions import Self

    from mpreader.fetch.engine import Engine
    from mpreader.pool.transfer import Transfer

__all__ = ["Collected", "Filled", "Order", "RangeStream", "in_order", "in_order_async", "members_of"]

Piece = TypeVar("Piece")


class Order(NamedTuple):
    """What a call asks for: ranges of each source, planned.

    ``owners`` says, where ranges were cut into pieces, of which range a piece is, and at which offset in it.
    """

    uris: list[str]
    ranges: list[list[ItemRange]]
    batches: list[Batch]
    owners: list[list[tuple[int, int]]]


class RangeStream(Generic[Piece]):
    """Ranges as they come; made by :meth:`RangeFetcher.stream`. Thread-safe: several threads may share one.

    An iterator and a context manager.
    """

    def __init__(
        self,
        engine: Engine,
        order: Order,
        stream_order: StreamOrder,
        deadline: float,
        make: Callable[[int, int, memoryview], Piece],
    ) -> None:
        self._lock = threading.Lock()
        self._is_closed = False
        # Not of this object: a stream that is dropped must end at once, so it can't be part of a cycle.
        self._reading = _Reading(engine, order, stream_order, deadline)
        self._pieces = (make(*piece) for piece in in_order(order, stream_order, self._reading.pieces()))

    def close(self) -> None:
        """End it: downloads stop, and whoever waits for a range gets ``PoolClosed``. Idempotent."""
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
        if hasattr(self, "_reading"):
            self.close()


class _Reading:
    """The transfer behind a stream; begun when the first piece is asked for."""

    def __init__(self, engine: Engine, order: Order, stream_order: StreamOrder, deadline: float) -> None:
        self._engine = engine
        self._order = order
        self._stream_order = stream_order
        self._deadline = deadline
        self._transfer: Transfer | None = None
        self._is_closed = False

    def pieces(self) -> Iterator[tuple[int, int, memoryview]]:
        batches = self._order.batches
        if not batches:
            return
        transfer = self._transfer = self._engine.begin(self._order)
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


class Collected:
    """Views of shared memory, as they come.

    Attributes:
        views: One for each range, by source.
    """

    def __init__(self, order: Order) -> None:
        self.views = [[memoryview(b"")] * len(ranges) for ranges in order.ranges]

    def put(self, number: int, index: int, view: memoryview) -> None:
        """Take one range."""
        self.views[number][index] = view


class Filled:
    """The caller's own buffers, being filled.

    Attributes:
        views: Of the buffers, one for each range, by source.

    Raises:
        PlanError: A buffer is missing, or is of another size than its ranges.
    """

    def __init__(self, order: Order, out: Mapping[str, object]) -> None:
        missing = [uri for uri in order.uris if uri not in out]
        if missing:
            raise PlanError(f"out has no entry for {missing[0]!r}")
        self.views = [
            targets_of(out[uri], [item_range.size for item_range in ranges])
            for uri, ranges in zip(order.uris, order.ranges, strict=True)
        ]
        self._owners = order.owners

    def put(self, number: int, index: int, view: memoryview) -> None:
        """Copy one piece of one range; what is empty has none."""
        if view.nbytes:
            owner, offset = self._owners[number][index]
            self.views[number][owner][offset : offset + len(view)] = view


def in_order(
    order: Order, stream_order: StreamOrder, pieces: Iterator[tuple[int, int, memoryview]]
) -> Iterator[tuple[int, int, memoryview]]:
    """The pieces, and the empty ranges: those come first, or at their place in the input."""
    for number, index in _empty_ranges(order, stream_order):
        yield number, index, memoryview(b"")
    if stream_order != "input":
        yield from pieces
        return
    place = (0, 0)
    for number, index, view in pieces:
        yield from _empty_between(order, place, (number, index))
        yield number, index, view
        del view  # or it would keep the slot while the next one is waited for
        place = (number, index + 1)
    yield from _empty_between(order, place, (len(order.ranges), 0))


async def in_order_async(
    order: Order, stream_order: StreamOrder, pieces: AsyncIterator[tuple[int, int, memoryview]]
) -> AsyncGenerator[tuple[int, int, memoryview], None]:
    """The same for asyncio."""
    for number, index in _empty_ranges(order, stream_order):
        yield number, index, memoryview(b"")
    place = (0, 0)
    async for number, index, view in pieces:
        if stream_order == "input":
            for empty in _empty_between(order, place, (number, index)):
                yield empty
        yield number, index, view
        del view  # or it would keep the slot while the next one is waited for
        place = (number, index + 1)
    if stream_order == "input":
        for empty in _empty_between(order, place, (len(order.ranges), 0)):
            yield empty


def _empty_ranges(order: Order, stream_order: StreamOrder) -> Iterator[tuple[int, int]]:
    """(source, index) of the ranges that come before all others."""
    if stream_order != "input":
        for number, ranges in enumerate(order.ranges):
            yield from ((number, index) for index, item_range in enumerate(ranges) if not item_range.size)


def _empty_between(
    order: Order, start: tuple[int, int], stop: tuple[int, int]
) -> Iterator[tuple[int, int, memoryview]]:
    number, index = start
    while (number, index) < stop:
        if index < len(order.ranges[number]):
            yield number, index, memoryview(b"")
            index += 1
        else:
            number, index = number + 1, 0


def members_of(batch: Batch, slot_view: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """The ranges of a batch: number of the source, index of the range, its bytes."""
    for index, slot_offset, size in batch.members:
        yield batch.order, index, slot_view[slot_offset : slot_offset + size]

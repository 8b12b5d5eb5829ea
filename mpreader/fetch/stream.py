"""Streams of ranges: takes the slots of a planned fetch, and hands out the ranges in them in the order asked for."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

from mpreader.errors import PlanError
from mpreader.fetch.buffers import targets_of
from mpreader.fetch.plan import Batch, StreamOrder
from mpreader.ranges import ItemRange

if TYPE_CHECKING:
    from typing_extensions import Self

    from mpreader.fetch.engine import Engine
    from mpreader.pool.source import Source
    from mpreader.pool.transfer import Transfer

__all__ = ["Collected", "Filled", "Order", "Piece", "PieceSequence", "RangeStream"]

Made = TypeVar("Made")
Piece = tuple[int, int, memoryview]  # number of the source, index of the range, its bytes

_NO_BYTES: Final = memoryview(b"")


class Order(NamedTuple):
    """What a call asks for: ranges of each source, planned.

    ``owners`` says, where ranges were cut into pieces, of which range a piece is, and at which offset in it.
    """

    uris: list[str]
    sources: list[Source]
    ranges: list[list[ItemRange]]
    batches: list[Batch]
    owners: list[list[tuple[int, int]]]


class RangeStream(Generic[Made]):
    """Ranges as they come; made by :meth:`RangeFetcher.stream`. Thread-safe: several threads may share one.

    An iterator and a context manager.
    """

    def __init__(
        self,
        engine: Engine,
        order: Order,
        stream_order: StreamOrder,
        deadline: float,
        make: Callable[[int, int, memoryview], Made],
    ) -> None:
        self._lock = threading.Lock()
        self._is_closed = False
        # Not of this object: a stream that is dropped must end at once, so it can't be part of a cycle.
        self._reading = _Reading(engine, order, stream_order, deadline)
        self._pieces = itertools.starmap(make, self._reading.pieces())  # unlike a loop's variable it keeps no piece

    def close(self) -> None:
        """End it: downloads stop, and whoever waits for a range gets ``PoolClosed``. Idempotent."""
        self._is_closed = True
        self._reading.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Made:
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
        self._sequence = PieceSequence(order, stream_order)
        self._deadline = deadline
        self._transfer: Transfer | None = None
        self._is_closed = False

    def pieces(self) -> Iterator[Piece]:
        sequence = self._sequence
        yield from sequence.first()
        if self._order.batches:
            transfer = self._transfer = self._engine.begin(self._order)
            if self._is_closed:  # by another thread, just now
                transfer.close()
            with self._engine.progress_of(transfer) as progress:
                on_wait = (lambda: progress.advance_to(transfer.received_bytes)) if progress.is_shown else None
                while sequence.wanted:
                    yield from sequence.pieces_of(*transfer.take_first(sequence.wanted, self._deadline, on_wait))
                    if on_wait is not None:
                        on_wait()
        yield from sequence.last()

    def close(self) -> None:
        self._is_closed = True
        if self._transfer is not None:
            self._transfer.close()


class PieceSequence:
    """The order in which the pieces of a fetch come: the slot reads to take next, and the pieces that they hold.

    It does not wait: threads and event loops both drive it. A piece is the number of a source, the index of a range of
    it, and its bytes. Empty ranges have no bytes to wait for: they come first of all, or in the order of the input at
    their place.

    Attributes:
        wanted: Indices of the slot reads any of which may be taken next; empty after the last one.
    """

    def __init__(self, order: Order, stream_order: StreamOrder) -> None:
        self._order = order
        self._stream_order = stream_order
        self._remaining = dict.fromkeys(range(len(order.batches)))
        self._place = (0, 0)  # of the next piece, in the order of the input

    @property
    def wanted(self) -> Collection[int]:
        """See the class."""
        if self._stream_order == "completion" or not self._remaining:
            return self._remaining
        return (next(iter(self._remaining)),)

    def first(self) -> Iterator[Piece]:
        """The pieces before all others."""
        if self._stream_order != "input":
            for number, ranges in enumerate(self._order.ranges):
                yield from ((number, index, _NO_BYTES) for index, each in enumerate(ranges) if not each.size)

    def pieces_of(self, taken: int, slot_view: memoryview) -> Iterator[Piece]:
        """The pieces in a slot that was taken. The iterator holds the slot until it is exhausted, or dropped."""
        del self._remaining[taken]
        batch = self._order.batches[taken]
        for index, slot_offset, size in batch.members:
            if self._stream_order == "input":
                yield from self._empty_until((batch.order, index))
            yield batch.order, index, slot_view[slot_offset : slot_offset + size]

    def last(self) -> Iterator[Piece]:
        """The pieces behind all others."""
        if self._stream_order == "input":
            yield from self._empty_until((len(self._order.ranges), 0))

    def _empty_until(self, stop: tuple[int, int]) -> Iterator[Piece]:
        number, index = self._place
        while (number, index) < stop:
            if index < len(self._order.ranges[number]):
                yield number, index, _NO_BYTES
                index += 1
            else:
                number, index = number + 1, 0
        self._place = (stop[0], stop[1] + 1)


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

"""Streams of ranges: hand out the ranges of a plan one after the other, as the pool receives them.

:class:`RangeStream` is the iterator that callers of ``stream`` get; ``fetch`` reads by one, too. :class:`PieceSequence`
decides which slot read is taken next, also for the asyncio fetcher. Plans are made elsewhere.

A slot is received into again when the last view of it is gone. Memory may have room for no more than the slot that is
waited for, so no variable here may refer to an earlier one meanwhile.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from mpreader.fetch.arguments import FetchOptions, StreamOrder
from mpreader.fetch.engine import Engine
from mpreader.fetch.plan import FetchPlan

if TYPE_CHECKING:
    from typing_extensions import Self

    from mpreader.pool.transfer import Transfer

__all__ = ["Piece", "PieceSequence", "RangeStream"]

Made = TypeVar("Made")
Piece = tuple[int, int, memoryview]  # source index, position of the range, its bytes

_NO_BYTES: Final = memoryview(b"")


class RangeStream(Generic[Made]):
    """Iterator over ranges, and a context manager. Thread-safe: threads that share it get each range once.

    It is made by :meth:`mpreader.RangeFetcher.stream`. Downloads begin when the first range is requested. They end
    after the last range, with ``close()``, at an error, or when the stream is dropped.

    Args:
        engine: Engine of the fetcher.
        plan: Plan of the call.
        options: Options of the call.
        make: Makes the item that the iterator returns from a source index, the position of a range, and its bytes.
    """

    def __init__(
        self, engine: Engine, plan: FetchPlan, options: FetchOptions, make: Callable[[int, int, memoryview], Made]
    ) -> None:
        self._lock = threading.Lock()  # guards _items: a generator can't be advanced by two threads at the same time
        self._is_closed = False
        # The generator belongs to another object. If it referred to the stream, the two would be a reference cycle, and
        # a stream that is dropped would download until the next garbage collection.
        self._reader = _PieceReader(engine, plan, options)
        # starmap() rather than a loop, whose variable would keep the last piece while the next one is waited for.
        self._items: Iterator[Made] = itertools.starmap(make, self._reader.pieces())

    def close(self) -> None:
        """Stop the downloads; threads that wait for a range get ``PoolClosed``. From any thread; idempotent."""
        # Without the lock, which a thread that waits for a range holds.
        self._is_closed = True
        self._reader.close()
        self._items = iter(())  # drops the generator, which keeps the slot of the last piece

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Made:
        if self._is_closed:
            raise StopIteration
        with self._lock:
            try:
                return next(self._items)
            except BaseException:  # StopIteration included: the transfer ends with its last piece
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_reader"):  # missing if __init__ has failed
            try:
                self.close()
            except BaseException:  # a Ctrl-C: here it is only printed, and nobody would call close again
                self.close()
                raise


class _PieceReader:
    """Reader of the pieces of a plan. Its transfer begins when the first piece is requested.

    Args:
        engine: Engine that begins the transfer.
        plan: Plan of the call.
        options: Options of the call.
    """

    def __init__(self, engine: Engine, plan: FetchPlan, options: FetchOptions) -> None:
        self._engine = engine
        self._plan = plan
        self._sequence = PieceSequence(plan, options.order)
        self._deadline = options.deadline
        self._transfer: Transfer | None = None
        self._is_closed = False

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces in the order of the call. To be called once."""
        sequence = self._sequence
        yield from sequence.first()
        if self._plan.batches:
            transfer = self._transfer = self._engine.begin(self._plan)
            # Another thread may have called close() before it could see the transfer. The take below then raises.
            if self._is_closed:
                transfer.close()
            with self._engine.progress_of(transfer) as progress:
                on_wait = (lambda: progress.advance_to(transfer.received_bytes)) if progress.is_shown else None
                while sequence.wanted:
                    # In one expression: a variable would keep the slot, see above.
                    yield from sequence.pieces_of(*transfer.take_first(sequence.wanted, self._deadline, on_wait))
                    if on_wait is not None:  # take_first() does not call it for a slot that has arrived already
                        on_wait()
        yield from sequence.last()

    def close(self) -> None:
        """Close the transfer, now or when it begins. From any thread; idempotent."""
        self._is_closed = True
        if self._transfer is not None:
            self._transfer.close()


class PieceSequence:
    """Order of the pieces of a call: says which slot reads to take next, and cuts each slot into its pieces.

    It never waits, so that threads and event loops can both use it. A *piece* is a source index, the position of a
    range, and its bytes. Empty ranges are in no slot: they come before all others, or, in the order of the input, at
    their positions.

    Args:
        plan: Plan of the call.
        order: Order of the stream.
    """

    def __init__(self, plan: FetchPlan, order: StreamOrder) -> None:
        self._plan = plan
        self._order = order
        # Slot reads that were not taken. A dict, because it keeps their order and deletes in constant time.
        self._remaining = dict.fromkeys(range(len(plan.batches)))
        # Source index and position of the next piece; used in the order of the input only.
        self._place = (0, 0)

    @property
    def wanted(self) -> Collection[int]:
        """Indices of the slot reads of which any may be taken next; empty after the last one."""
        if self._order == "completion" or not self._remaining:
            return self._remaining
        return (next(iter(self._remaining)),)

    def first(self) -> Iterator[Piece]:
        """Yield the pieces that come before those of all slots: empty ranges."""
        if self._order != "input":
            for source_index, ranges in enumerate(self._plan.ranges):
                yield from ((source_index, index, _NO_BYTES) for index, each in enumerate(ranges) if not each.size)

    def pieces_of(self, taken: int, slot_view: memoryview) -> Iterator[Piece]:
        """Yield the pieces of the slot read ``taken``.

        The iterator keeps the slot until it is exhausted or dropped.
        """
        del self._remaining[taken]
        batch = self._plan.batches[taken]
        for index, slot_offset, nbytes in batch.members:
            if self._order == "input":
                yield from self._empty_until((batch.source_index, index))
            yield batch.source_index, index, slot_view[slot_offset : slot_offset + nbytes]

    def last(self) -> Iterator[Piece]:
        """Yield the pieces that come after those of all slots: empty ranges at the end of the input."""
        if self._order == "input":
            yield from self._empty_until((len(self._plan.ranges), 0))

    def _empty_until(self, stop: tuple[int, int]) -> Iterator[Piece]:
        """Yield the empty ranges between the next place and ``stop``, exclusive, and continue after ``stop``.

        With the order ``"input"`` batches are in that order, too, so that every range skipped here is an empty one.
        """
        source_index, index = self._place
        while (source_index, index) < stop:
            if index < len(self._plan.ranges[source_index]):
                yield source_index, index, _NO_BYTES
                index += 1
            else:
                source_index, index = source_index + 1, 0
        self._place = (stop[0], stop[1] + 1)

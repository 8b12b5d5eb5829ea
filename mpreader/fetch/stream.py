"""Streams of ranges: iterators over the ranges of a plan, as they come from the pool.

:class:`RangeStream` is what callers of ``stream`` hold; a fetch reads by one, too. :class:`PieceSequence` decides
what is taken next, for asyncio as well. Nothing is planned here.
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

    Made by :meth:`mpreader.RangeFetcher.stream`. Downloads begin when the first range is asked for, and end with the
    last one, with ``close()``, at an error, or when the stream is dropped.

    Args:
        engine: Engine of the fetcher.
        plan: Plan of the call.
        options: Options of the call.
        make: Makes the item that is handed out of a source index, the position of a range, and its bytes.
    """

    def __init__(
        self, engine: Engine, plan: FetchPlan, options: FetchOptions, make: Callable[[int, int, memoryview], Made]
    ) -> None:
        self._lock = threading.Lock()  # guards _pieces: a generator can't be advanced by two threads at one time
        self._is_closed = False
        # Generators of another object, not of this one: a stream that is dropped must end at once, and would not if it
        # and its generators referred to each other.
        self._reading = _Reading(engine, plan, options)
        # Not a loop: its variable would keep the last piece, and so its slot, while the next one is waited for.
        self._pieces: Iterator[Made] = itertools.starmap(make, self._reading.pieces())

    def close(self) -> None:
        """Stop the downloads; threads that wait for a range get ``PoolClosed``. From any thread; idempotent."""
        self._is_closed = True
        self._reading.close()
        self._pieces = iter(())  # the generators hold the slot of the last piece

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
        if hasattr(self, "_reading"):  # not where __init__ failed
            self.close()


class _Reading:
    """Transfer behind a stream; begun when the first piece is asked for."""

    def __init__(self, engine: Engine, plan: FetchPlan, options: FetchOptions) -> None:
        self._engine = engine
        self._plan = plan
        self._sequence = PieceSequence(plan, options.order)
        self._deadline = options.deadline
        self._transfer: Transfer | None = None
        self._is_closed = False

    def pieces(self) -> Iterator[Piece]:
        sequence = self._sequence
        yield from sequence.first()
        if self._plan.batches:
            transfer = self._transfer = self._engine.begin(self._plan)
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
    """Order in which the pieces of a fetch come: the slot reads to take next, and the pieces that they hold.

    It does not wait: threads and event loops both drive it. A *piece* is the source index, the position of a range, and
    its bytes. Empty ranges have no bytes to wait for: they come before all others, or in the order of the input at
    their places.

    Args:
        plan: Plan of the call.
        order: Order of the stream.
    """

    def __init__(self, plan: FetchPlan, order: StreamOrder) -> None:
        self._plan = plan
        self._order = order
        self._remaining = dict.fromkeys(range(len(plan.batches)))
        self._place = (0, 0)  # source index and position of the next piece, in the order of the input

    @property
    def wanted(self) -> Collection[int]:
        """Indices of the slot reads any of which may be taken next; empty after the last one."""
        if self._order == "completion" or not self._remaining:
            return self._remaining
        return (next(iter(self._remaining)),)

    def first(self) -> Iterator[Piece]:
        """Yield the pieces that come before all slots."""
        if self._order != "input":
            for source_index, ranges in enumerate(self._plan.ranges):
                yield from ((source_index, index, _NO_BYTES) for index, each in enumerate(ranges) if not each.size)

    def pieces_of(self, taken: int, slot_view: memoryview) -> Iterator[Piece]:
        """Yield the pieces in a slot that was taken. The iterator holds the slot until it is exhausted, or dropped."""
        del self._remaining[taken]
        batch = self._plan.batches[taken]
        for index, slot_offset, nbytes in batch.members:
            if self._order == "input":
                yield from self._empty_until((batch.source_index, index))
            yield batch.source_index, index, slot_view[slot_offset : slot_offset + nbytes]

    def last(self) -> Iterator[Piece]:
        """Yield the pieces that come after all slots."""
        if self._order == "input":
            yield from self._empty_until((len(self._plan.ranges), 0))

    def _empty_until(self, stop: tuple[int, int]) -> Iterator[Piece]:
        source_index, index = self._place
        while (source_index, index) < stop:
            if index < len(self._plan.ranges[source_index]):
                yield source_index, index, _NO_BYTES
                index += 1
            else:
                source_index, index = source_index + 1, 0
        self._place = (stop[0], stop[1] + 1)

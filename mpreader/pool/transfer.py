"""The consumer's side of the pool: what it orders, and how it takes what has arrived.

A :class:`Transfer` is an ordered list of :class:`Fill`; each fills one slot with one or more parts. Coordinator and
consumer share nothing but the transfer's inbox and the messages below, so that they may live in different processes
one day.
"""

from __future__ import annotations

import copy
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from mpreader.errors import MpreaderError, PlanError, PoolClosed, PoolTimeout
from mpreader.pool.stats import PoolStats, Tally
from mpreader.telemetry.progress import Progress

if TYPE_CHECKING:
    from mpreader.pool.coordinator.arena import Lease, Slot
    from mpreader.pool.source import Source

__all__ = ["Close", "Demand", "Discard", "Fill", "FillPart", "Open", "Taken", "Transfer"]

REDRAW_S: Final = 0.2  # of a progress bar, while one fill is waited for


class FillPart(NamedTuple):
    """Bytes [start, end) of the object, to be received at ``slot_offset`` of the slot."""

    start: int
    end: int
    slot_offset: int


@dataclass(frozen=True, slots=True)
class Fill:
    """One slot's worth of work: ``parts`` of one object into ``nbytes`` of contiguous memory.

    ``over_read`` of its bytes are gaps that nobody asked for.

    Raises:
        PlanError: It has no parts, or one that doesn't lie within the slot.
    """

    source: Source
    nbytes: int
    parts: tuple[FillPart, ...]
    over_read: int = 0

    def __post_init__(self) -> None:
        for part in self.parts:
            if not (0 <= part.start < part.end and 0 <= part.slot_offset <= self.nbytes - (part.end - part.start)):
                raise PlanError(f"{part} does not lie within a slot of {self.nbytes} bytes")
        if not self.parts:
            raise PlanError("a fill needs at least one part")


# -- what a consumer says to the coordinator


class Open(NamedTuple):
    """Begin to read ahead, in order."""

    transfer: Transfer


class Demand(NamedTuple):
    """The consumer waits for a fill now."""

    transfer: Transfer
    fill: int


class Taken(NamedTuple):
    """The consumer has taken a fill."""

    transfer: Transfer
    fill: int


class Discard(NamedTuple):
    """The consumer won't take the fills [start, stop) any more."""

    transfer: Transfer
    start: int
    stop: int


class Close(NamedTuple):
    """The consumer is gone: stop downloads, take the slots back."""

    transfer: Transfer


class Transfer:
    """An ordered reading of fills, in progress. Thread-safe; not usable after a fork.

    Args:
        fills: What to read, in the order in which it will be taken.
        tell: Sends a message to the coordinator.
        on_lease_end: Called when a view that was taken has ended.
        grows: May go beyond the arena's limit rather than fail: for consumers that can't work with less than one
            whole item.

    Attributes:
        tally: What was done for it so far.
        on_arrival: Called, from the coordinator's thread, when something has arrived or the reading has failed; for
            those who use ``try_take_first``.
        progress: Is told of each fill that was taken, and closed with the transfer.
    """

    def __init__(
        self,
        fills: Sequence[Fill],
        tell: Callable[[object], None],
        on_lease_end: Callable[[Lease], object],
        *,
        grows: bool = False,
    ) -> None:
        self.fills = fills
        self.grows = grows
        self.tally = Tally()
        self._tell = tell
        self._on_lease_end = on_lease_end
        self._arrived: dict[int, Slot | MpreaderError] = {}
        self._awaited: list[int] = []
        self._polled: tuple[int, float] | None = None  # what try_take_first waits for, and since when
        self.on_arrival: Callable[[], object] = _nothing
        self.progress = Progress()
        self._taken_bytes = 0
        self._broken: MpreaderError | None = None
        self._condition = threading.Condition()
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"Transfer({len(self.fills)} fills, {len(self._arrived)} arrived)"

    # -- the consumer's side

    def take(self, index: int, deadline: float = math.inf) -> memoryview:
        """Wait for a fill and take it: a writable view of its ``nbytes``, the caller's until its last reference dies.

        A fill that is taken a second time is read a second time.

        Args:
            index: The fill.
            deadline: How long to wait for it, by the monotonic clock.

        Raises:
            PoolTimeout: It had not arrived by then.
            MpreaderError: It can't be had.
        """
        return self.take_first((index,), deadline)[1]

    def take_first(self, wanted: Collection[int], deadline: float = math.inf) -> tuple[int, memoryview]:
        """Like :meth:`take`, for whichever of the fills ``wanted``, at least one, has arrived first.

        Returns:
            The fill's index, and its view.
        """
        self._check_process()
        while True:
            redraw = time.monotonic() + REDRAW_S if self.progress.is_shown else math.inf
            with self._condition:
                index = self._arrived_of(wanted)
                if index is None and self._broken is None:
                    index = self._wait_for(wanted, min(deadline, redraw))
                taken = self._take_arrived(index)
            self.show_progress(taken)
            if taken is not None:
                return taken
            if time.monotonic() >= deadline:
                raise self.late(wanted)

    def try_take_first(self, wanted: Collection[int]) -> tuple[int, memoryview] | None:
        """Like :meth:`take_first`, but don't wait: None where none of them is there.

        The first of them is asked for, then; ``on_arrival`` is called when it is worth another try.
        """
        self._check_process()
        with self._condition:
            index = self._arrived_of(wanted)
            if index is None and self._broken is None:
                first = next(iter(wanted))
                if self._polled is None:
                    self._polled = first, time.monotonic()
                    self._awaited.append(first)
                self._tell(Demand(self, first))
                return None
            if self._polled is not None:
                self._awaited.remove(self._polled[0])
                self.tally.seconds += time.monotonic() - self._polled[1]
                self._polled = None
            taken = self._take_arrived(index)
        self.show_progress(taken)
        return taken

    def show_progress(self, taken: tuple[int, memoryview] | None = None) -> None:
        """Draw the progress bar anew, if there is one, with what was just taken and what has arrived."""
        if self.progress.is_shown:  # not under the lock: a terminal may keep one waiting
            self._taken_bytes += len(taken[1]) if taken is not None else 0
            self.progress.advance_to(max(self._taken_bytes, self.tally.stats().bytes))

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise PoolClosed("this read was begun before a fork; begin a new one in the child process")

    def _arrived_of(self, wanted: Collection[int]) -> int | None:
        few, many = (wanted, self._arrived) if len(wanted) == 1 else (self._arrived, wanted)
        return next((index for index in few if index in many), None)

    def _take_arrived(self, index: int | None) -> tuple[int, memoryview] | None:
        arrived = self._broken if index is None else self._arrived.pop(index, self._broken)
        if arrived is None:
            return None
        if index is None or isinstance(arrived, MpreaderError):
            # A copy: an exception that is raised twice would drag the frames of both along.
            raise copy.copy(arrived)  # type: ignore[misc]  # without an index it is an error
        # Within the lock: the demand of another thread that waits for the same fill must come after it.
        self._tell(Taken(self, index))
        return index, arrived.lease(self._on_lease_end)[: self.fills[index].nbytes]

    def _wait_for(self, wanted: Collection[int], deadline: float) -> int | None:
        started = time.monotonic()
        first = next(iter(wanted))
        self._awaited.append(first)
        try:
            while (index := self._arrived_of(wanted)) is None and self._broken is None:
                self._tell(Demand(self, first))
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._condition.wait(None if left_s == math.inf else left_s):
                    return None
            return index
        finally:
            self._awaited.remove(first)
            self.tally.seconds += time.monotonic() - started

    def late(self, wanted: Collection[int]) -> PoolTimeout:
        """The error for those whose time is up."""
        fill = self.fills[next(iter(wanted))]
        return PoolTimeout(
            f"{fill.source.uri} bytes {fill.parts[0].start}-{fill.parts[-1].end} had not arrived when the time given "
            "to the call was up (timeout_s)"
        )

    def stats(self) -> PoolStats:
        """What was done for it so far."""
        return self.tally.stats()

    def discard(self, start: int, stop: int) -> None:
        """Say that the fills [start, stop) won't be taken any more."""
        self._tell(Discard(self, start, stop))

    def close(self) -> None:
        """Stop downloads and give back what was not taken. Views that were taken stay valid. Idempotent."""
        self.progress.close()
        if self._broken is None and os.getpid() == self._pid:
            self.fail_all(PoolClosed("this read was closed"))
            self._tell(Close(self))

    # -- the coordinator's side

    def deliver(self, index: int, arrived: Slot | MpreaderError) -> bool:
        """Hand over a fill, or why there is none; False if nobody will take it."""
        with self._condition:
            if self._broken is not None:
                return False
            self._arrived[index] = arrived
            self._condition.notify_all()
            self.on_arrival()
            return True

    def is_awaited(self, index: int) -> bool:
        """Whether a consumer is in ``take`` for this fill."""
        with self._condition:
            return index in self._awaited

    def retract(self, index: int, *, spares_awaited: bool = False) -> bool:
        """Take back a fill that was delivered; False if it was taken, or is just about to be."""
        with self._condition:
            if spares_awaited and index in self._awaited:
                return False
            return self._arrived.pop(index, None) is not None

    def fail_all(self, error: MpreaderError) -> None:
        """Let this and every later ``take`` raise ``error``."""
        with self._condition:
            if self._broken is None:
                self._broken = error
            self._condition.notify_all()
            self.on_arrival()


def _nothing() -> None:
    pass

"""Transfer: a read as its consumers see it. They wait here for slot reads, and take what has arrived.

::

    consumer threads, event loops                     the coordinator's thread, through Caller.post
    begin_take ─► PendingTake ◄── done ── arrived ◄── SlotArrived, SlotFailed, Ended
    result() ─► SlotTaken, and a leased view          Recall ─► GiveBack, unless it was taken

A transfer sends messages and gets messages; it never touches the coordinator, nor the coordinator it. A slot read is
in one of three places: not here yet; *arrived*, leased to this caller and free to be recalled; or *handed over* to a
pending take, and not recalled any more. Everything is decided under one lock, which is never held while anybody waits.
"""

from __future__ import annotations

import copy
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final

from mpreader.errors import ArenaExhausted, MpreaderError, PoolClosed, PoolTimeout
from mpreader.pool.requests import (
    CloseRead,
    Demand,
    Discard,
    GiveBack,
    ReadId,
    Recall,
    SlotArrived,
    SlotFailed,
    SlotRead,
    SlotTaken,
    SourceName,
)
from mpreader.pool.stats import PoolStats, Tally

__all__ = ["ON_WAIT_INTERVAL_S", "PendingTake", "Transfer"]

# Seconds between two calls of ``on_wait``: often enough for a progress bar.
ON_WAIT_INTERVAL_S: Final = 0.2


class PendingTake:
    """A future: a consumer waits for whichever of some slot reads comes first. Made by :meth:`Transfer.begin_take`.

    Attributes:
        wanted: Indices of the slot reads, at least one; the first of them is the one that is demanded.
    """

    __slots__ = ("_is_pending", "_on_done", "_outcome", "_started_s", "wanted")

    def __init__(self, wanted: Collection[int], on_done: Callable[[], object] | None) -> None:
        self.wanted = wanted
        self._on_done = on_done
        self._started_s = math.inf  # time since which it is pending
        self._outcome: SlotArrived | MpreaderError | None = None
        # Locked while the take is pending: a thread that waits for the take waits for this lock.
        self._is_pending = threading.Lock()
        self._is_pending.acquire()

    @property
    def first(self) -> int:
        """Index of the slot read that was demanded."""
        return next(iter(self.wanted))

    @property
    def is_done(self) -> bool:
        """True when :meth:`Transfer.result` has something to return or to raise."""
        return self._outcome is not None


class Transfer:
    """An ordered read in progress. Thread-safe; not usable after a fork.

    Args:
        read: Its name.
        sources: Names of its objects.
        slot_reads: Its slot reads, in the order in which they will be taken.
        tell: Sends a message to the coordinator. It is called under the transfer's lock, so that the messages of
            several threads keep the order of the decisions.
        view_of: Makes a leased view of a slot that has arrived.
        on_close: Called once, when the transfer was closed.

    Attributes:
        tally: Statistics of this read so far. ``seconds`` is written under the transfer's lock, the rest by the
            coordinator's thread only, so that no number has two writers.
    """

    def __init__(
        self,
        read: ReadId,
        sources: Sequence[SourceName],
        slot_reads: Sequence[SlotRead],
        tell: Callable[[object], None],
        view_of: Callable[[SlotArrived, int], memoryview],
        on_close: Callable[[Transfer], object],
    ) -> None:
        self.read = read
        self.sources = sources
        self.slot_reads = slot_reads
        self.tally = Tally()
        self._tell = tell
        self._view_of = view_of
        self._on_close = on_close
        self._arrived: dict[int, SlotArrived | MpreaderError] = {}
        self._pending: list[PendingTake] = []
        self._taken_bytes = 0
        self._broken: MpreaderError | None = None
        self._is_closed = False
        # Reentrant, since a garbage collection within it may close a transfer that was dropped. Not a Condition: that
        # enters its lock in Python code, and a Ctrl-C that strikes there would leave it locked for ever.
        self._lock = threading.RLock()
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"Transfer({len(self.slot_reads)} slot reads, {len(self._arrived)} arrived)"

    # -- for consumers

    def take(self, index: int, deadline: float = math.inf) -> memoryview:
        """Wait for a slot read and take it; one that is taken a second time is read a second time.

        Args:
            index: Index of the slot read.
            deadline: Time until which to wait for it, by the monotonic clock.

        Returns:
            A writable view of its ``nbytes``, the caller's until its last reference dies.

        Raises:
            PoolTimeout: It had not arrived by then.
            MpreaderError: It can't be had.
        """
        return self.take_first((index,), deadline)[1]

    def take_first(
        self, wanted: Collection[int], deadline: float = math.inf, on_wait: Callable[[], object] | None = None
    ) -> tuple[int, memoryview]:
        """Wait for whichever of the slot reads ``wanted``, at least one, arrives first, and take it.

        Args:
            wanted: Indices of the slot reads.
            deadline: Time until which to wait, by the monotonic clock.
            on_wait: Called about five times a second while nothing has come.

        Returns:
            Index of the slot read, and its view; see :meth:`take`, also for the errors.
        """
        take = PendingTake(wanted, None)
        try:  # from here on: a Ctrl-C must not leave a take behind that swallows a slot
            self._begin(take)
            while take._outcome is None:
                self._wait(take, deadline if on_wait is None else min(deadline, time.monotonic() + ON_WAIT_INTERVAL_S))
                if take._outcome is None and time.monotonic() >= deadline:
                    raise self.timeout_error(wanted)
                if on_wait is not None:
                    on_wait()
            return self.result(take)
        except BaseException:
            self.cancel(take)
            raise

    def begin_take(self, wanted: Collection[int], on_done: Callable[[], object] | None = None) -> PendingTake:
        """Ask for whichever of the slot reads ``wanted``, at least one, arrives first, without waiting for it.

        The take must end in :meth:`result` or :meth:`cancel`.

        Args:
            wanted: Indices of the slot reads.
            on_done: Called once when the take is done, from the coordinator's thread and under the transfer's lock: it
                must do no more than wake somebody. Not called if the take is done at once.
        """
        take = PendingTake(wanted, on_done)
        self._begin(take)
        return take

    def result(self, take: PendingTake) -> tuple[int, memoryview]:
        """The index and the view of a take that is done.

        Raises:
            MpreaderError: It can't be had.
        """
        with self._lock:
            if self._broken is not None:  # perhaps after the take was done: then its memory may be gone
                raise _copy_of(self._broken)
            outcome = take._outcome
            assert outcome is not None, "the take is not done"
            if isinstance(outcome, MpreaderError):
                raise _copy_of(outcome)
            slot_read = self.slot_reads[outcome.slot_read]
            view = self._view_of(outcome, slot_read.nbytes)
            # Only now: if a Ctrl-C strikes before, `cancel` gives the slot back. If it strikes after, the view does.
            take._outcome = None
            self._taken_bytes += slot_read.requested_bytes
            return outcome.slot_read, view

    def cancel(self, take: PendingTake) -> None:
        """End a take that nobody waits for any more. Harmless after :meth:`result`."""
        with self._lock:
            self._remove(take)
            outcome, take._outcome = take._outcome, None
            if isinstance(outcome, SlotArrived):
                # Not back among what has arrived: the coordinator was told that it is taken, and won't recall it.
                self._tell(GiveBack(outcome.lease))
                self._demand_for_others(outcome.slot_read)

    def timeout_error(self, wanted: Collection[int]) -> PoolTimeout:
        """The error for those whose time is up."""
        slot_read = self.slot_reads[next(iter(wanted))]
        return PoolTimeout(
            f"{self.sources[slot_read.source].uri} bytes {slot_read.parts[0].start}-{slot_read.parts[-1].end} had not "
            "arrived when the time given to the call was up (timeout_s)"
        )

    def discard(self, start: int, stop: int) -> None:
        """Say that the slot reads [start, stop) won't be taken any more. Those that a thread waits for now stay."""
        if os.getpid() != self._pid:  # a forked child: a thread that is not here may have held the lock
            return
        with self._lock:
            for awaited in sorted({take.first for take in self._pending if start <= take.first < stop}):
                if start < awaited:
                    self._tell(Discard(self.read, start, awaited))
                start = awaited + 1
            if start < stop:
                self._tell(Discard(self.read, start, stop))

    def close(self) -> None:
        """Stop downloads and give back what was not taken. Views that were taken stay valid. Idempotent."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._is_closed:
                return
            # A Ctrl-C may end this anywhere. A second call then does all of it once more, and does no harm by it: the
            # coordinator ignores what it has heard before. First, since nobody may take what is given back:
            self._broken = self._broken or PoolClosed("this read was closed")
            for arrived in self._arrived.values():
                if isinstance(arrived, SlotArrived):
                    self._tell(GiveBack(arrived.lease))
            self._tell(CloseRead(self.read))
            self._fail(self._broken)
            self._on_close(self)
            self._is_closed = True

    @property
    def nbytes(self) -> int:
        """Bytes of all its requests."""
        return sum(slot_read.requested_bytes for slot_read in self.slot_reads)

    @property
    def taken_bytes(self) -> int:
        """Bytes of the slot reads that were taken."""
        return self._taken_bytes

    @property
    def received_bytes(self) -> int:
        """Bytes that have been received, repeated ones included, or taken, whichever is more."""
        return max(self._taken_bytes, sum(worker.bytes for worker in self.tally.workers))

    def stats(self) -> PoolStats:
        """Statistics of this read so far."""
        return self.tally.stats()

    # -- for the caller: messages of the coordinator

    def arrived(self, message: SlotArrived) -> None:
        """Keep a slot that has arrived, or hand it over to whoever waits for it."""
        with self._lock:
            taker = next((take for take in self._pending if message.slot_read in take.wanted), None)
            # Looked at last: a garbage collection just before may have closed this transfer.
            if self._broken is not None:
                self._tell(GiveBack(message.lease))
                return
            if taker is None:
                self._arrived[message.slot_read] = message
            else:
                self._tell(SlotTaken(message.lease))
                self._finish(taker, message)
                self._demand_for_others(message.slot_read)
            self.tally.over_read += self.slot_reads[message.slot_read].over_read

    def failed(self, message: SlotFailed) -> None:
        """Hand the error of a slot read over to all who wait for it; if nobody does, keep it for the next one."""
        with self._lock:
            waiting = [take for take in self._pending if message.slot_read in take.wanted]
            for take in waiting:
                self._finish(take, message.error)
            # Memory that was short is no reason for the next one who wants it: there may be some by then.
            if not waiting and self._broken is None and not isinstance(message.error, ArenaExhausted):
                self._arrived[message.slot_read] = message.error

    def recall(self, message: Recall) -> None:
        """Give a slot back that nobody has taken; if somebody has, SlotTaken was told already and is the answer."""
        with self._lock:
            arrived = self._arrived.get(message.slot_read)
            if isinstance(arrived, SlotArrived) and arrived.lease == message.lease:
                # Not `del`: a garbage collection that closes this transfer may have been in between.
                self._arrived.pop(message.slot_read, None)
                self._tell(GiveBack(message.lease))

    def fail(self, error: MpreaderError) -> None:
        """Let every take that is pending, and every later one, raise ``error``. The first error is kept."""
        with self._lock:
            if self._broken is None:
                self._fail(error)

    def _begin(self, take: PendingTake) -> None:
        if os.getpid() != self._pid:
            raise PoolClosed("this read was begun before a fork; begin a new one in the child process")
        with self._lock:
            if self._broken is not None:
                take._outcome = self._broken
                return
            index = self._arrived_of(take.wanted)
            if index is None:
                take._started_s = time.monotonic()
                self._pending.append(take)
                self._tell(Demand(self.read, take.first))
                return
            # Not pop(): a Ctrl-C that strikes as a call returns would lose what was popped.
            take._outcome = outcome = self._arrived[index]
            del self._arrived[index]
            if isinstance(outcome, SlotArrived):
                # At once, and not with the view: a recall must never have to wait for a consumer.
                self._tell(SlotTaken(outcome.lease))

    def _wait(self, take: PendingTake, until: float) -> None:
        """Wait until the take is done, or the time is up."""
        timeout_s = -1.0 if until == math.inf else max(0.0, until - time.monotonic())
        if take._is_pending.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX)):
            take._is_pending.release()  # for whoever else may look

    def _arrived_of(self, wanted: Collection[int]) -> int | None:
        # A loop over the smaller of the two: the other one may have thousands.
        looped, searched = (wanted, self._arrived) if len(wanted) == 1 else (self._arrived, wanted)
        return next((index for index in looped if index in searched), None)

    # -- under the lock

    def _finish(self, take: PendingTake, outcome: SlotArrived | MpreaderError) -> None:
        if take._outcome is None:
            take._outcome = outcome
            take._is_pending.release()
        if take._on_done is not None:
            take._on_done()
        self._remove(take)  # last, so that a close that is called again finds it

    def _remove(self, take: PendingTake) -> None:
        if take in self._pending:
            self._pending.remove(take)
            self.tally.seconds += time.monotonic() - take._started_s

    def _demand_for_others(self, index: int) -> None:
        # Their demand was answered by the slot that somebody else has got.
        if self._pending and any(take.first == index for take in self._pending):
            self._tell(Demand(self.read, index))

    def _fail(self, error: MpreaderError) -> None:
        self._broken = error
        self._arrived.clear()
        for take in [*self._pending]:
            self._finish(take, error)


def _copy_of(error: MpreaderError) -> MpreaderError:
    """Makes a copy to raise: an exception that is raised twice would drag the frames of both along."""
    fresh = copy.copy(error)
    fresh.__cause__ = error.__cause__
    return fresh

"""Which part is received next, into which slot: the coordinator's decisions, without any I/O.

Fills are started in the order of their transfer, transfers in turn. A fill is *pending* (no slot), *filling* (its
parts are queued or in flight), *ready* (delivered, not taken), or *taken*. What is filling or ready never exceeds the
window, unless a consumer waits for it; a consumer that waits may take the memory of what others have read ahead.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Final, NamedTuple

from mpreader.errors import ArenaError, ArenaExhausted, MpreaderError, PlanError, WorkerCrashed
from mpreader.pool.coordinator import retry
from mpreader.pool.coordinator.arena import Arena, Slot
from mpreader.pool.coordinator.resolver import SourceBook
from mpreader.pool.coordinator.state import FillState, FillStatus, PartState, Reading
from mpreader.pool.stats import PoolStats, Tally
from mpreader.pool.transfer import Fill, Transfer
from mpreader.pool.worker.messages import Failed, FailureKind

__all__ = ["Scheduler", "SchedulerLimits"]

# A part that was being received when this many workers died is not given to another.
_MAX_CRASHES: Final = 3
_RENEWAL_POLL_S: Final = 0.02


class SchedulerLimits(NamedTuple):
    """Bytes that may be read ahead, and how long parts and full memory are waited for."""

    window_bytes: int
    timeout_s: float
    lease_timeout_s: float


class Scheduler:
    """Decides. Not thread-safe: owned by the coordinator's thread."""

    def __init__(self, arena: Arena, sources: SourceBook, limits: SchedulerLimits) -> None:
        self._arena = arena
        self._sources = sources
        self._limits = limits
        self.window_bytes = limits.window_bytes  # may be set to less
        self._readings: dict[int, Reading] = {}
        self._turn: deque[Reading] = deque()
        self._demanded: dict[FillState, None] = {}
        self._queued: deque[PartState] = deque()
        self._delayed: list[tuple[float, int, PartState]] = []
        self._parts: dict[int, PartState] = {}  # queued, delayed, waiting for a signature, or in flight
        self._leased: set[Slot] = set()
        self._outstanding_bytes = 0  # of fills that are filling or ready
        self._numbers = itertools.count(1)
        self._tally = Tally()
        self._held_up: list[Reading] = []
        self._held_up_since: float | None = None

    def stats(self, restarts: int) -> PoolStats:
        """What was done so far; ``restarts`` is the number of workers that were replaced."""
        waits = [reading.transfer.tally.seconds for reading in list(self._readings.values())]
        stats = self._tally.stats(restarts)
        return replace(stats, seconds=stats.seconds + sum(waits))

    # -- what consumers say

    @property
    def is_idle(self) -> bool:
        """Whether nobody wants anything and nothing is in flight."""
        return not self._readings and not self._parts

    def open(self, transfer: Transfer) -> None:
        """Take a transfer on."""
        reading = Reading(transfer)
        for index, fill in enumerate(transfer.fills):
            reading.fills.append(FillState(reading, index, fill, self._sources.use(fill.source)))
        self._readings[id(transfer)] = reading
        self._turn.append(reading)

    def close(self, transfer: Transfer) -> list[int]:
        """Let a transfer go; returns the numbers of its parts that may be in flight, to be cancelled."""
        reading = self._readings.pop(id(transfer), None)
        if reading is None:
            return []
        self._turn.remove(reading)
        self._tally.seconds += transfer.tally.seconds
        for fill in reading.fills:
            self._drop(fill)
            self._sources.release(fill.source)
        return [part.number for part in self._parts.values() if part.fill.reading is reading]

    def demand(self, transfer: Transfer, index: int) -> None:
        """A consumer waits for a fill."""
        fill = self._find(transfer, index)
        if fill is None or fill.status is FillStatus.READY:
            return
        if fill.status in (FillStatus.TAKEN, FillStatus.DROPPED):
            fill = self._restart(fill)
        fill.short_since = None
        self._demanded[fill] = None

    def taken(self, transfer: Transfer, index: int) -> None:
        """A consumer took a fill."""
        fill = self._find(transfer, index)
        if fill is not None and fill.status is FillStatus.READY:
            self._lease(fill)

    def lease_ended(self, slot: Slot) -> None:
        """The last reference to a view of the slot is gone."""
        self._leased.discard(slot)
        self._arena.free(slot)

    def discard(self, transfer: Transfer, start: int, stop: int) -> None:
        """A consumer won't take the fills [start, stop)."""
        reading = self._readings.get(id(transfer))
        for fill in reading.fills[start:stop] if reading is not None else ():
            if not transfer.is_awaited(fill.index):  # another reader of the same file may want it
                self._drop(fill)

    def fail_everything(self, error: MpreaderError) -> None:
        """The pool is broken, or closed: let every consumer know, and hold on to no memory."""
        for reading in self._readings.values():
            reading.transfer.fail_all(error)
            self._tally.seconds += reading.transfer.tally.seconds
        for held in (
            self._readings,
            self._turn,
            self._demanded,
            self._queued,
            self._delayed,
            self._parts,
            self._leased,
            self._held_up,
        ):
            held.clear()

    # -- what workers and sources say

    def find(self, number: int) -> PartState | None:
        """The part of this number, unless it is forgotten."""
        return self._parts.get(number)

    def note_request(self, part: PartState | None, worker: int, nbytes: int, seconds: float) -> None:
        """A request of a worker has ended; ``part`` is None where it was forgotten meanwhile."""
        self._tally.note(worker, nbytes, seconds)
        if part is not None:
            part.fill.reading.transfer.tally.note(worker, nbytes, seconds)

    def fetched(self, number: int) -> PartState | None:
        """All bytes of a part are there; returns the part, if it is known."""
        part = self._parts.pop(number, None)
        if part is not None:
            self._end_part(part)
        return part

    def failed(self, failure: Failed, now: float) -> None:
        """A part did not arrive, or not wholly."""
        part = self._parts.get(failure.part)
        if part is None:
            return
        part.received += failure.received
        part.attempts = 1 if failure.received else part.attempts + 1
        part.last_failure = failure.detail
        if part.fill.status is not FillStatus.FILLING or part.received >= part.part.end - part.part.start:
            self._forget(part)  # in the second case all is there: what failed came after the last byte
        elif failure.kind is FailureKind.EXPIRED and not part.is_resigned:
            part.is_resigned = True
            self._sources.renew(part.fill.source)
            self._delay(part, now)
        else:
            self._retry_or_fail(part, failure, now)

    def lost(self, numbers: Iterable[int], exitcode: int, why: str) -> None:
        """A worker died while it had these parts."""
        for number in numbers:
            part = self._parts.get(number)
            if part is None:
                continue
            part.crashes += 1
            part.last_failure = why
            if part.fill.status is not FillStatus.FILLING:
                self._forget(part)
            elif part.crashes >= _MAX_CRASHES:
                error = WorkerCrashed(
                    f"{part.crashes} worker processes died while reading {_name(part)}: {why}",
                    exitcode=exitcode,
                    ranges=(part.byte_range,),
                )
                self._fail(part, error)
            else:
                self._count_retry(part)
                self._queued.appendleft(part)

    # -- what to do next

    def next_part(self, now: float) -> PartState | None:
        """The most urgent part, if any, to be sent to a worker or given back by ``unsend``."""
        while self._delayed and self._delayed[0][0] <= now:
            self._queued.append(heapq.heappop(self._delayed)[2])
        while self._queued or self._start_fill(now):
            part = self._queued.popleft()
            source = part.fill.source
            if part.fill.status is not FillStatus.FILLING:
                self._forget(part)
            elif source.error is not None:
                self._fail(part, source.error)
            elif not self._try_reserve(part):
                continue
            elif source.is_renewing:
                self._delay(part, now + _RENEWAL_POLL_S)
            else:
                part.deadline = min(part.deadline, now + self._limits.timeout_s)
                return part
        return None

    def unsend(self, part: PartState) -> None:
        """No worker took the part."""
        self._queued.appendleft(part)

    def expire(self, now: float) -> list[int]:
        """Give up what took too long; returns the numbers of the parts to be cancelled."""
        late = [part for part in self._parts.values() if part.deadline < now]
        for part in late:
            if part.fill.status is FillStatus.FILLING:
                timeout_s = self._limits.timeout_s
                error = retry.timeout_error(part.fill.fill.source, part.byte_range, timeout_s, part.last_failure)
                self._abandon(part.fill, error)
        return [part.number for part in late]

    def note_held_up(self, now: float) -> None:
        """Keep account of the time in which nothing is received, though more is wanted, since memory is full."""
        waiting: list[Reading] = []
        if not self._parts and self._outstanding_bytes:
            waiting = [reading for reading in self._turn if reading.next_pending() is not None]
        if self._held_up_since is not None:
            seconds = now - self._held_up_since
            self._tally.consumer_seconds += seconds
            for reading in self._held_up:
                reading.transfer.tally.consumer_seconds += seconds
        self._held_up, self._held_up_since = waiting, now if waiting else None

    @property
    def has_leases(self) -> bool:
        """Whether consumers hold views."""
        return bool(self._leased)

    @property
    def is_short(self) -> bool:
        """Whether a consumer waits for memory."""
        return any(fill.short_since is not None for fill in self._demanded)

    def next_event(self) -> float:
        """When, by the monotonic clock, a delayed part is due; infinite if there is none."""
        return self._delayed[0][0] if self._delayed else float("inf")

    def _start_fill(self, now: float) -> bool:
        for fill in list(self._demanded):
            if fill.status is not FillStatus.PENDING:
                del self._demanded[fill]
            elif self._try_start(fill, now, is_demanded=True):
                self._demanded.pop(fill, None)
                return True
        for _ in range(len(self._turn)):
            reading = self._turn[0]
            self._turn.rotate(-1)
            while (pending := reading.next_pending()) is not None:
                if self._try_start(pending, now, is_demanded=False):
                    return True
                if pending.status is FillStatus.PENDING:
                    break  # it has to wait; it did not fail
        return False

    def _try_start(self, fill: FillState, now: float, *, is_demanded: bool) -> bool:
        source = fill.source
        if source.error is not None or source.version is None:
            if source.error is not None:
                self._abandon(fill, source.error)
            return False
        past_end = max(part.end for part in fill.fill.parts)
        if past_end > source.version.size:
            self._abandon(fill, _past_end_error(fill.fill, past_end, source.version.size))
            return False
        slot = self._allocate(fill, now, is_demanded)
        if slot is None:
            return False
        self._sources.renew_if_old(source, now)
        fill.slot, fill.status, fill.open_parts = slot, FillStatus.FILLING, len(fill.fill.parts)
        self._outstanding_bytes += slot.nbytes
        for part in fill.fill.parts:
            state = PartState(next(self._numbers), fill, part)
            self._parts[state.number] = state
            self._queued.append(state)
        return True

    # -- memory

    def _allocate(self, fill: FillState, now: float, is_demanded: bool) -> Slot | None:
        nbytes = fill.fill.nbytes
        if not is_demanded:
            has_room = not self._outstanding_bytes or self._outstanding_bytes + nbytes <= self.window_bytes
            return self._try_allocate(fill, nbytes) if has_room else None
        slot = self._try_allocate(fill, nbytes)
        while slot is None and fill.status is FillStatus.PENDING and self._evict_one(fill):
            slot = self._try_allocate(fill, nbytes)
        if slot is None and fill.status is FillStatus.PENDING:
            slot = self._allocate_or_give_up(fill, now)
        return slot

    def _try_allocate(self, fill: FillState, nbytes: int, *, beyond_limit: bool = False) -> Slot | None:
        try:
            return self._arena.allocate(nbytes, beyond_limit=beyond_limit)
        except ArenaError as error:
            self._abandon(fill, error)
            return None

    def _try_reserve(self, part: PartState) -> bool:
        try:
            if part.fill.slot is not None:
                slot_offset = part.part.slot_offset
                part.fill.slot.reserve(slot_offset, slot_offset + part.part.end - part.part.start)
        except ArenaError as error:
            self._fail(part, error)
            return False
        return True

    def _allocate_or_give_up(self, fill: FillState, now: float) -> Slot | None:
        if self._outstanding_bytes:  # what is in flight will be ready soon, and can be evicted then
            return None
        if fill.reading.transfer.grows:
            slot = self._try_allocate(fill, fill.fill.nbytes, beyond_limit=True)
            if slot is not None or fill.status is not FillStatus.PENDING:
                return slot
            # The host has no more, whatever the limit is: the same as a limit that is reached.
        if fill.short_since is None:
            fill.short_since = now
        if now - fill.short_since >= self._limits.lease_timeout_s or not self._leased:
            self._abandon(fill, self._exhausted_error(fill))
        return None

    def _evict_one(self, needy: FillState) -> bool:
        # What is read ahead furthest goes first, of other consumers before one's own.
        readings = [reading for reading in self._turn if reading is not needy.reading]
        for reading in [*readings, needy.reading]:
            for fill in reversed(reading.fills):
                if fill.status is FillStatus.READY and reading.transfer.retract(fill.index, spares_awaited=True):
                    self._free(fill)
                    self._restart(fill)
                    return True
        return False

    def _exhausted_error(self, fill: FillState) -> ArenaExhausted:
        held = sum(slot.nbytes for slot in self._leased)
        if fill.fill.nbytes > self._arena.max_bytes:
            return ArenaExhausted(
                f"{fill.fill.nbytes} bytes are wanted in one piece, {self._arena.max_bytes} bytes of shared memory may "
                "be reserved. Ask for smaller ranges, or raise PoolConfig.max_memory (MPREADER_MAX_MEMORY)"
            )
        return ArenaExhausted(
            f"no room for {fill.fill.nbytes} more bytes: of {self._arena.max_bytes} bytes of shared memory, {held} are "
            "held by views that are still in use. Drop views when done with them, or raise PoolConfig.max_memory "
            "(MPREADER_MAX_MEMORY)"
        )

    # -- ends

    def _end_part(self, part: PartState) -> None:
        fill = part.fill
        fill.open_parts -= 1
        if fill.open_parts:
            return
        if fill.status is not FillStatus.FILLING:
            self._free(fill)
            return
        fill.status = FillStatus.READY
        if fill.slot is None or not fill.reading.transfer.deliver(fill.index, fill.slot):
            fill.status = FillStatus.DROPPED
            self._free(fill)
        self._tally.over_read += fill.fill.over_read
        fill.reading.transfer.tally.over_read += fill.fill.over_read

    def _retry_or_fail(self, part: PartState, failure: Failed, now: float) -> None:
        source = part.fill.fill.source
        delay_s = retry.delay_before(failure, part.attempts, source.max_attempts)
        if delay_s is None:
            self._fail(part, retry.error_after(failure, source, part.byte_range, part.attempts))
        else:
            self._count_retry(part)
            self._delay(part, now + delay_s)

    def _count_retry(self, part: PartState) -> None:
        self._tally.retries += 1
        part.fill.reading.transfer.tally.retries += 1

    def _delay(self, part: PartState, until: float) -> None:
        heapq.heappush(self._delayed, (until, part.number, part))

    def _fail(self, part: PartState, error: MpreaderError) -> None:
        self._abandon(part.fill, error)
        self._forget(part)

    def _abandon(self, fill: FillState, error: MpreaderError) -> None:
        self._demanded.pop(fill, None)
        fill.reading.transfer.deliver(fill.index, error)
        fill.status = FillStatus.DROPPED

    def _forget(self, part: PartState) -> None:
        if self._parts.pop(part.number, None) is not None:
            self._end_part(part)

    def _drop(self, fill: FillState) -> None:
        self._demanded.pop(fill, None)
        if fill.status is FillStatus.READY:
            if fill.reading.transfer.retract(fill.index):
                self._free(fill)
            else:  # it was taken just now, and the message is on its way
                self._lease(fill)
        if fill.status is not FillStatus.TAKEN:
            fill.status = FillStatus.DROPPED

    def _lease(self, fill: FillState) -> None:
        fill.status = FillStatus.TAKEN
        if fill.slot is not None:
            self._outstanding_bytes -= fill.slot.nbytes
            self._leased.add(fill.slot)  # must stay alive until the lease ends, or that goes unnoticed
            fill.slot = None

    def _free(self, fill: FillState) -> None:
        if fill.slot is not None:
            self._arena.free(fill.slot)
            self._outstanding_bytes -= fill.slot.nbytes
            fill.slot = None

    def _restart(self, fill: FillState) -> FillState:
        if fill.open_parts:  # dropped with parts in flight: those end on their own, in their own slot
            fresh = FillState(fill.reading, fill.index, fill.fill, fill.source)
            fill.reading.fills[fill.index] = fresh
            fill = fresh
        fill.status = FillStatus.PENDING
        fill.reading.cursor = min(fill.reading.cursor, fill.index)
        return fill

    def _find(self, transfer: Transfer, index: int) -> FillState | None:
        reading = self._readings.get(id(transfer))
        return None if reading is None else reading.fills[index]


def _name(part: PartState) -> str:
    source = part.fill.fill.source
    return f"{source.uri} bytes {part.part.start}-{part.part.end}"


def _past_end_error(fill: Fill, end: int, size: int) -> PlanError:
    source = fill.source
    return PlanError(f"range ends at byte {end}, past the end of {source.uri}, which has {size} bytes")

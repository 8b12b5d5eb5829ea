"""Scheduler: decides which part is received next, and into which slot. It does no I/O and holds no transfer.

Its inputs are the messages of callers (:mod:`mpreader.pool.requests`) and the results of workers; its outputs are parts
to send, messages to post, and numbers of parts to cancel. Owned by the coordinator's thread: nothing is thread-safe.

Slot reads are started in the order of their read, reads in turn, as long as what is read ahead stays within the
window. A slot read that a consumer waits for, a *demanded* one, is started before all others and beyond the window. If
memory is full, its way is::

    a slot is free ──► start                                  nothing can be recalled:
    else: recall what is ready, but not taken,                   parts in flight, and views leave room for it ──► wait
          of other reads first, furthest ahead first             the read may grow ──► go beyond the limit
          ──► wait for the answer, try again                     else wait for views to end: lease_timeout_s, then fail

:mod:`mpreader.pool.coordinator.state` draws the statuses of slot reads and parts.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from mpreader.errors import ArenaError, ArenaExhausted, MpreaderError, PlanError, WorkerCrashed
from mpreader.pool.coordinator import retry, routes
from mpreader.pool.coordinator.arena import Slot
from mpreader.pool.coordinator.in_flight import Cut
from mpreader.pool.coordinator.memory import SlotMemory
from mpreader.pool.coordinator.state import (
    PartState,
    PartStatus,
    Post,
    ReadState,
    SlotReadState,
    SlotStatus,
    SourceState,
)
from mpreader.pool.requests import (
    CloseRead,
    Demand,
    Discard,
    GiveBack,
    HeldUp,
    OpenRead,
    ReadId,
    Recall,
    RequestCut,
    RequestEnded,
    RequestRepeated,
    SlotArrived,
    SlotFailed,
    SlotTaken,
    SourceResolved,
    VersionLearned,
)
from mpreader.pool.stats import PoolStats, Tally
from mpreader.pool.worker.messages import Failed, FailureKind
from mpreader.pool.worker.version import Validators, find_change

__all__ = ["Scheduler", "SchedulerLimits"]

# A part that was being received when this many workers died is not given to another: it may be what kills them.
_MAX_CRASHES: Final = 3
# A part that needs a new route looks for it so often. Renewals are rare, so that nobody keeps lists of who waits.
_RENEWAL_POLL_S: Final = 0.02
# Kinds of failure that may be due to the route: the server lets others read. A signature that is said to have expired
# was made anew before: a service may say so of all signatures of one kind.
_REFUSALS: Final = frozenset({FailureKind.DENIED, FailureKind.REDIRECTED, FailureKind.REFUSED, FailureKind.EXPIRED})


class SchedulerLimits(NamedTuple):
    """Bytes that may be read ahead, and how long parts and full memory are waited for."""

    window_bytes: int
    timeout_s: float
    lease_timeout_s: float


class Scheduler:
    """The decisions of one coordinator.

    Args:
        memory: The slots.
        post_to: Returns the function that posts a message to the caller of this number.
        limits: Limits; see :class:`SchedulerLimits`.

    Attributes:
        window_bytes: Bytes that may be read ahead now; the coordinator lowers it while few connections are used.
    """

    def __init__(self, memory: SlotMemory, post_to: Callable[[int], Post], limits: SchedulerLimits) -> None:
        self._memory = memory
        self._post_to = post_to
        self._limits = limits
        self.window_bytes = limits.window_bytes
        self._reads: dict[ReadId, ReadState] = {}
        self._turn: deque[ReadState] = deque()
        # In the order of the demands. What is in it is PENDING, or was until just now.
        self._demanded: dict[SlotReadState, None] = {}
        self._recalls = 0  # RECALLED slot reads: while there are some, memory is about to come back
        self._lacks_memory = False  # since the last look, a demanded slot read found no room
        self._queued: deque[PartState] = deque()
        self._delayed: list[tuple[float, int, PartState]] = []  # a heap
        self._parts: dict[int, PartState] = {}  # all that have not ended
        self._cancelled: list[int] = []
        self._numbers = itertools.count(1)
        self._tally = Tally()
        self._held_up: list[ReadState] = []
        self._held_up_since: float | None = None

    def stats(self, restarts: int) -> PoolStats:
        """Statistics of all reads so far, but for the consumers' waits; ``restarts`` counts replaced workers."""
        return self._tally.stats(restarts)

    @property
    def is_idle(self) -> bool:
        """True if nobody wants anything and nothing is in flight."""
        return not self._reads and not self._parts

    @property
    def has_views(self) -> bool:
        """True while consumers hold views."""
        return self._memory.has_taken

    @property
    def waits_for_views(self) -> bool:
        """True while a consumer waits for memory that only the end of a view can bring."""
        return any(slot_read.waits_for_views_since is not None for slot_read in self._demanded)

    @property
    def has_pending(self) -> bool:
        """True if there is more to be received than what is in flight, queued or delayed."""
        return any(read.next_pending() is not None for read in self._reads.values())

    def next_event(self) -> float:
        """Time, by the monotonic clock, at which a delayed part is due; infinite if there is none."""
        return self._delayed[0][0] if self._delayed else float("inf")

    def take_cancelled(self) -> list[int]:
        """Numbers of the parts that nobody wants any more, since the last call. Workers may have some of them."""
        cancelled, self._cancelled = self._cancelled, []
        return cancelled

    # -- messages of callers

    def open(self, message: OpenRead) -> None:
        """Begin a read."""
        read = self._reads[message.read] = ReadState(message, self._post_to(message.read.caller))
        self._turn.append(read)
        for source in read.sources:
            routes.request(read, source)

    def source_resolved(self, message: SourceResolved) -> None:
        """Note the version and the route of a source, or why there are none."""
        read = self._reads.get(message.read)
        if read is not None:
            routes.note_answer(read.sources[message.source], message)

    def demand(self, message: Demand) -> None:
        """Note that a consumer waits. One that waits already keeps its place, and the time since when it is short."""
        slot_read = self._find(message.read, message.slot_read)
        if slot_read is None:
            return
        if slot_read.status in (SlotStatus.TAKEN, SlotStatus.DROPPED):
            slot_read = self._restart(slot_read)
        if slot_read.status is SlotStatus.PENDING:
            self._demanded.setdefault(slot_read)

    def slot_taken(self, message: SlotTaken) -> None:
        """Note that a consumer has a view of a slot."""
        slot_read = self._memory.take(message.lease)
        if slot_read is not None:
            self._end_recall(slot_read)
            slot_read.move(SlotStatus.TAKEN)

    def give_back(self, message: GiveBack) -> None:
        """End a lease."""
        slot_read = self._memory.give_back(message.lease)
        if slot_read is None:
            return
        was_recalled = self._end_recall(slot_read)
        slot_read.move(SlotStatus.DROPPED)
        if was_recalled and not slot_read.is_discarded and slot_read.read.id in self._reads:
            self._restart(slot_read)

    def discard(self, message: Discard) -> None:
        """Drop slot reads. Those that were delivered are recalled: some consumer may just take one.

        What is in flight is not cancelled: a new connection costs more than the rest of a part.
        """
        read = self._reads.get(message.read)
        for slot_read in read.slot_reads[message.start : message.stop] if read is not None else ():
            slot_read.is_discarded = True
            if slot_read.status is SlotStatus.READY:
                self._recall(slot_read)
            elif slot_read.status in (SlotStatus.PENDING, SlotStatus.FILLING):
                self._drop(slot_read)

    def close(self, message: CloseRead) -> None:
        """End a read. What its caller has leased comes back by itself."""
        read = self._reads.pop(message.read, None)
        if read is None:
            return
        self._turn.remove(read)
        for slot_read in read.slot_reads:
            # READY and RECALLED ones are leased: the caller's GiveBack ends them.
            if slot_read.status in (SlotStatus.PENDING, SlotStatus.FILLING):
                self._drop(slot_read)
        self._cancelled += [part.number for part in self._parts.values() if part.slot_read.read is read]

    def forget_leases(self, caller: int) -> None:
        """End all leases of a caller that is gone."""
        for lease in self._memory.leases_of(caller):
            self.give_back(GiveBack(lease))

    def clear(self) -> None:
        """Hold on to nothing more: the coordinator ends, and its callers are told by it."""
        for held in (self._reads, self._turn, self._demanded, self._queued, self._delayed, self._parts, self._held_up):
            held.clear()
        self._memory.clear()

    # -- results of workers

    def find(self, number: int) -> PartState | None:
        """The part of this number, unless it has ended."""
        return self._parts.get(number)

    def count_request(self, part: PartState | None, worker: int, nbytes: int, seconds: float) -> None:
        """Count a request that has ended; ``part`` is None if it had ended before."""
        self._tally.note(worker, nbytes, seconds)
        if part is not None:
            read = part.slot_read.read
            read.post(RequestEnded(read.id, worker, nbytes, seconds))

    def fetched(self, number: int, found: Validators = ()) -> None:
        """End a part all of whose bytes are there, unless it has ended before; ``found``: see ``Fetched``."""
        part = self._parts.get(number)
        if part is not None:
            self._learn_version(part, found)
            self._end_part(part)

    def halve(self, part: PartState, nbytes: int) -> None:
        """Take the last bytes of a part that is in flight for a part of their own, which is queued.

        Args:
            part: The part, of a slot read that is being filled.
            nbytes: How many of its bytes; less than it lacks.
        """
        middle = part.range.size - nbytes
        other = PartState(next(self._numbers), part.slot_read, part.range.rest(middle))
        part.range = part.range.first(middle)
        self._parts[other.number] = other
        part.slot_read.parts.append(other)
        part.slot_read.open_parts += 1
        self._queued.append(other)

    def failed(self, failure: Failed, now: float) -> None:
        """Decide about a part that did not arrive, or not wholly."""
        part = self._parts.get(failure.part)
        if part is None:
            return
        part.received += failure.received
        if failure.received:
            part.attempts = part.malformed = 0
        if failure.kind is not FailureKind.SLOW:  # a cut is no failure
            part.attempts += 1
            part.malformed += failure.kind is FailureKind.MALFORMED
            part.last_failure = failure.detail
        self._learn_version(part, failure.found)
        if part.slot_read.status is not SlotStatus.FILLING or part.left_bytes <= 0:
            self._end_part(part)  # in the second case all is there: what failed came after the last byte
        elif failure.kind is FailureKind.SLOW:
            self._note_cut(part, failure)
            self._queue_first(part)
        elif failure.kind is FailureKind.EXPIRED and not part.is_resigned:
            part.is_resigned = True
            routes.renew(part.slot_read)
            self._delay(part, now)
        elif failure.kind in _REFUSALS and routes.try_reroute(part, failure):
            self._delay(part, now)
        else:
            self._retry_or_fail(part, failure, now)

    def lost(self, numbers: Iterable[int], exitcode: int, why: str) -> None:
        """Decide about the parts that a worker had when it died."""
        for part in [self._parts[number] for number in numbers if number in self._parts]:
            part.crashes += 1
            part.last_failure = why
            if part.slot_read.status is not SlotStatus.FILLING:
                self._end_part(part)
            elif part.crashes >= _MAX_CRASHES:
                error = WorkerCrashed(
                    f"{part.crashes} worker processes died while reading {_name(part)}: {why}",
                    exitcode=exitcode,
                    ranges=(part.byte_range,),
                )
                self._fail_slot_read(part.slot_read, error)
                self._end_part(part)
            else:
                self._count_repeat(part)
                self._queue_first(part)

    # -- next steps

    def next_part(self, now: float) -> PartState | None:
        """The most urgent part; None if there is none. ``sent`` or ``put_back`` says what became of it."""
        self._requeue_delayed(now)
        self._lacks_memory = False
        while self._demanded and self._start_demanded(now):
            pass
        while self._queued or self._read_ahead(now):
            part = self._queued.popleft()
            if part.status is PartStatus.QUEUED and self._is_sendable(part, now):
                part.move(PartStatus.SENT)
                return part
        return None

    def sent(self, part: PartState, now: float) -> None:
        """Note that a worker has a part from ``next_part``."""
        part.requests += 1
        part.route_number = part.slot_read.source.route_number
        part.refusal = None
        part.deadline = min(part.deadline, now + self._limits.timeout_s)

    def put_back(self, part: PartState) -> None:
        """Queue a part from ``next_part`` again, before all others, since it was not sent."""
        self._queue_first(part)

    def expire(self, now: float) -> None:
        """Give up the parts that took too long."""
        timeout_s = self._limits.timeout_s
        for part in [part for part in self._parts.values() if part.deadline < now]:
            slot_read = part.slot_read
            if slot_read.status is SlotStatus.FILLING:
                name = slot_read.source.name
                self._fail_slot_read(
                    slot_read, retry.timeout_error(name, part.byte_range, timeout_s, part.last_failure)
                )
            self._cancelled.append(part.number)

    def note_held_up(self, now: float) -> None:
        """Keep account of the time in which nothing is received, though more is wanted, since memory is full."""
        if self._held_up_since is not None:
            seconds = now - self._held_up_since
            self._tally.consumer_seconds += seconds
            for read in self._held_up:
                read.post(HeldUp(read.id, seconds))
        self._held_up, self._held_up_since = [], None
        if not self._parts and self._memory.ahead_bytes:
            self._held_up = [read for read in self._turn if read.next_pending() is not None]
            self._held_up_since = now if self._held_up else None

    def _is_sendable(self, part: PartState, now: float) -> bool:
        """True if a queued part can be sent; otherwise it was ended or delayed."""
        slot_read, source = part.slot_read, part.slot_read.source
        if source.error is not None:
            self._fail_slot_read(slot_read, retry.about_range(source.error, part.byte_range))
        elif source.is_renewing:
            self._delay(part, now + _RENEWAL_POLL_S)
        elif part.refusal is not None and part.route_number == source.route_number:  # there is no other route
            error = retry.error_after(part.refusal, source.name, part.byte_range, part.attempts)
            self._fail_slot_read(slot_read, error)
        else:
            # A large slot read may have begun long ago.
            routes.renew_if_old(slot_read, now)
            return self._try_reserve(part)
        return False

    def _try_reserve(self, part: PartState) -> bool:
        slot, start = part.slot_read.slot, part.range.slot_offset
        assert slot is not None, "a slot read that is being filled has a slot"
        try:
            slot.reserve(start, start + part.range.kept_bytes)
        except ArenaError as error:
            self._fail_slot_read(part.slot_read, error)
            return False
        return True

    def _requeue_delayed(self, now: float) -> None:
        while self._delayed and self._delayed[0][0] <= now:
            part = heapq.heappop(self._delayed)[2]
            if part.status is PartStatus.DELAYED:  # else it has ended meanwhile
                part.move(PartStatus.QUEUED)
                self._queued.append(part)

    def _start_demanded(self, now: float) -> bool:
        """Start a demanded slot read, its parts before all others; False if none can be started."""
        for slot_read in list(self._demanded):
            if slot_read.status is not SlotStatus.PENDING:
                del self._demanded[slot_read]
            elif self._try_start(slot_read, now, is_demanded=True):
                return True
            elif self._lacks_memory and self._recalls:
                break  # memory is about to come back for it; others would take that piece by piece, again and again
        return False

    def _read_ahead(self, now: float) -> bool:
        """Start a slot read that nobody waits for yet; False if none can be started."""
        if self._lacks_memory:  # what is read ahead now would have to be recalled at once
            return False
        for _ in range(len(self._turn)):
            read = self._turn[0]
            self._turn.rotate(-1)
            while (pending := read.next_pending()) is not None:
                if self._try_start(pending, now, is_demanded=False):
                    return True
                if pending.status is SlotStatus.PENDING:
                    break  # it has to wait; it did not fail
        return False

    def _try_start(self, slot_read: SlotReadState, now: float, *, is_demanded: bool) -> bool:
        source, parts = slot_read.source, slot_read.plan.parts
        if source.error is not None:
            self._fail_slot_read(slot_read, source.error)
            return False
        if source.version is None or source.route is None:
            return False
        past_end = max(part.end for part in parts)
        if past_end > source.version.size:
            self._fail_slot_read(slot_read, _past_end_error(source, past_end, source.version.size))
            return False
        slot = self._slot_for(slot_read, now, is_demanded=is_demanded)
        if slot is None:
            return False
        routes.renew_if_old(slot_read, now)
        self._demanded.pop(slot_read, None)
        slot_read.move(SlotStatus.FILLING)
        slot_read.waits_for_views_since = None
        slot_read.open_parts = len(parts)
        self._memory.assign(slot, slot_read)
        slot_read.parts = [PartState(next(self._numbers), slot_read, part) for part in parts]
        self._parts.update((part.number, part) for part in slot_read.parts)
        if is_demanded:
            self._queued.extendleft(reversed(slot_read.parts))
        else:
            self._queued.extend(slot_read.parts)
        return True

    # -- memory

    def _slot_for(self, slot_read: SlotReadState, now: float, *, is_demanded: bool) -> Slot | None:
        nbytes, ahead = slot_read.plan.nbytes, self._memory.ahead_bytes
        if not is_demanded and ahead and ahead + nbytes > self.window_bytes:
            return None
        try:
            slot = self._memory.arena.allocate(nbytes)
            if slot is None and is_demanded:
                slot = self._make_room(slot_read, now)
        except ArenaError as error:
            self._lacks_memory = False  # not any more
            self._fail_slot_read(slot_read, error)
            return None
        return slot

    def _make_room(self, slot_read: SlotReadState, now: float) -> Slot | None:
        """See the module's drawing; returns a slot only where the read may grow.

        Raises:
            ArenaError: There is no memory, and none will come.
        """
        self._lacks_memory = True
        # While a recall is under way no other is made, or more would come back than is needed.
        if self._recalls or self._recall_furthest(slot_read):
            return None
        is_kept_by_views = self._memory.taken_bytes + slot_read.plan.nbytes > self._memory.arena.max_bytes
        if self._memory.ahead_bytes and not is_kept_by_views:
            # In flight: it can be recalled when it is ready, or comes back when it has ended.
            slot_read.waits_for_views_since = None
            return None
        if slot_read.read.grows:
            slot = self._memory.arena.allocate(slot_read.plan.nbytes, beyond_limit=True)
            if slot is not None:
                return slot
            # The host has no more, whatever the limit is: the same as a limit that is reached.
        if slot_read.waits_for_views_since is None:
            slot_read.waits_for_views_since = now
        if now - slot_read.waits_for_views_since >= self._limits.lease_timeout_s or not self._memory.has_taken:
            raise self._exhausted_error(slot_read)
        return None

    def _recall_furthest(self, waiting: SlotReadState) -> bool:
        """Recall what is read ahead furthest, of other reads before that of ``waiting``; False if nothing is ready."""
        for read in [*(read for read in self._turn if read is not waiting.read), waiting.read]:
            if read.ready:
                self._recall(read.slot_reads[max(read.ready)])
                return True
        return False

    def _recall(self, slot_read: SlotReadState) -> None:
        slot_read.move(SlotStatus.RECALLED)
        self._recalls += 1
        slot_read.read.post(Recall(slot_read.read.id, slot_read.index, slot_read.lease))

    def _end_recall(self, slot_read: SlotReadState) -> bool:
        was_recalled = slot_read.status is SlotStatus.RECALLED
        self._recalls -= was_recalled
        return was_recalled

    def _exhausted_error(self, slot_read: SlotReadState) -> ArenaExhausted:
        nbytes, limit = slot_read.plan.nbytes, self._memory.arena.max_bytes
        if nbytes > limit:
            return ArenaExhausted(
                f"{nbytes} bytes are wanted in one piece, {limit} bytes of shared memory may be reserved. Ask for "
                "smaller ranges, or raise PoolConfig.max_memory (MPREADER_MAX_MEMORY)"
            )
        return ArenaExhausted(
            f"no room for {nbytes} more bytes: of {limit} bytes of shared memory, {self._memory.taken_bytes} are held "
            "by views that are still in use. Drop views when done with them, or raise PoolConfig.max_memory "
            "(MPREADER_MAX_MEMORY)"
        )

    # -- versions

    def _learn_version(self, part: PartState, found: Validators) -> None:
        """Take over what a response has said of the version beyond what was known, for all parts that follow.

        The first response decides. Parts that were in flight with it did not know: what theirs have said is compared
        here, and a slot read that holds bytes of another version fails.
        """
        slot_read, source = part.slot_read, part.slot_read.source
        if not found or source.version is None or slot_read.status is not SlotStatus.FILLING:
            return
        change = find_change(source.version.validators, found)
        if change is not None:
            failure = Failed(part.number, FailureKind.CHANGED, 0, str(change))
            attempts = max(part.attempts, 1)
            self._fail_slot_read(slot_read, retry.error_after(failure, source.name, part.byte_range, attempts))
            return
        version = source.version.learned(found)
        if version != source.version:
            source.version = version
            slot_read.read.post(VersionLearned(slot_read.read.id, source.number, version))

    # -- ends of parts and slot reads

    def _end_part(self, part: PartState) -> None:
        """End a part, and with the last one of a slot read its filling."""
        del self._parts[part.number]
        part.move(PartStatus.ENDED)
        slot_read = part.slot_read
        slot_read.open_parts -= 1
        if slot_read.open_parts:
            return
        if slot_read.status is not SlotStatus.FILLING:  # dropped meanwhile, and only now no worker writes any more
            self._memory.release(slot_read)
            return
        slot = slot_read.slot
        assert slot is not None, "a slot read that is being filled has a slot"
        slot_read.move(SlotStatus.READY)
        slot_read.lease = self._memory.lease(slot, slot_read)
        self._tally.over_read += slot_read.plan.over_read
        read = slot_read.read
        read.post(SlotArrived(read.id, slot_read.index, slot_read.lease, slot.segment.number, slot.offset))

    def _fail_slot_read(self, slot_read: SlotReadState, error: MpreaderError) -> None:
        """Drop a slot read, and tell the caller why."""
        self._drop(slot_read)
        slot_read.read.post(SlotFailed(slot_read.read.id, slot_read.index, error))

    def _drop(self, slot_read: SlotReadState) -> None:
        """Drop a slot read. Its parts end now, but for those that a worker has: these end when the worker says so."""
        self._demanded.pop(slot_read, None)
        slot_read.waits_for_views_since = None
        slot_read.move(SlotStatus.DROPPED)
        for part in slot_read.parts:
            # A delay may be a minute, for which the slot would be kept.
            if part.status in (PartStatus.QUEUED, PartStatus.DELAYED):
                self._end_part(part)

    def _restart(self, slot_read: SlotReadState) -> SlotReadState:
        """Make a slot read pending again; returns its state, a new one where the old one still has parts in flight.

        A view of the old slot may be out: its lease names this state, too, but as one that was taken, which is over.
        """
        read = slot_read.read
        if slot_read.open_parts:
            slot_read = read.slot_reads[slot_read.index] = SlotReadState(read, slot_read.index, slot_read.plan)
        else:
            slot_read.move(SlotStatus.PENDING)
            slot_read.is_discarded = False
            slot_read.parts = []
        read.cursor = min(read.cursor, slot_read.index)
        return slot_read

    def _retry_or_fail(self, part: PartState, failure: Failed, now: float) -> None:
        name = part.slot_read.source.name
        delay_s = retry.delay_before(failure, part.attempts, name.max_attempts, part.malformed)
        if delay_s is None:
            self._fail_slot_read(part.slot_read, retry.error_after(failure, name, part.byte_range, part.attempts))
            self._end_part(part)
        else:
            self._count_repeat(part)
            self._delay(part, now + delay_s)

    def _count_repeat(self, part: PartState) -> None:
        self._tally.retries += 1
        part.slot_read.read.post(RequestRepeated(part.slot_read.read.id))

    def _note_cut(self, part: PartState, failure: Failed) -> None:
        part.cuts += 1
        body_s = failure.started_s + failure.seconds - failure.first_byte_s
        part.cut = Cut(failure.seconds, failure.received / max(body_s, 1e-6))
        self._tally.slow_cut += 1
        part.slot_read.read.post(RequestCut(part.slot_read.read.id))

    def _delay(self, part: PartState, until: float) -> None:
        part.move(PartStatus.DELAYED)
        heapq.heappush(self._delayed, (until, part.number, part))

    def _queue_first(self, part: PartState) -> None:
        part.move(PartStatus.QUEUED)
        self._queued.appendleft(part)

    def _find(self, read_id: ReadId, index: int) -> SlotReadState | None:
        read = self._reads.get(read_id)
        return None if read is None else read.slot_reads[index]


def _name(part: PartState) -> str:
    return f"{part.slot_read.source.name.uri} bytes {part.range.start}-{part.range.end}"


def _past_end_error(source: SourceState, end: int, size: int) -> PlanError:
    return PlanError(f"range ends at byte {end}, past the end of {source.name.uri}, which has {size} bytes")

"""Coordinator: the one thread that waits on everything and moves parts between callers and workers.

::

    callers                           coordinator's thread                       worker processes
    Demand, SlotTaken,         ┐                                           ┌── Fetch(part, route, slot) ──► receive
    OpenRead, CloseRead,       │inbox ┌──────────────────────────────┐     │                                   │
    Discard, GiveBack          ├────► │ Scheduler            decides │ ────┘   MapSegment, Cancel, Ping, …     │
    SourceResolved             │      │ SlotMemory, Arena    memory  │                                         │
      (HEAD, presigned URL)    ┘      │ WorkerSupervisor     workers │ ◄── Fetched / Failed(kind, bytes) ──────┘
    mailbox ◄─ SlotArrived, Recall, ─ │ ConcurrencyLimiter   limits  │ ◄── Progress: how far it is, when asked
               SlotFailed, Ended, …   │ SlowTail             cuts    │ ◄── pidfd: a worker has ended
                                      └──────────────────────────────┘

The thread decides and sends; it never waits for the network, for a consumer or for a worker. It ends when it is told
to, when nobody has used it for long enough, or when it breaks; then every caller is told so by ``Ended``.

Whoever owns a coordinator (the pool) starts and stops it by its methods. Everybody else speaks to it by messages only,
see :mod:`mpreader.pool.requests`: ``tell`` goes to the coordinator, ``post`` to a caller, ``send`` to a worker.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

from mpreader.errors import MpreaderError, PoolClosed, PoolError
from mpreader.pool.blocking import make_selector
from mpreader.pool.coordinator.arena import Arena
from mpreader.pool.coordinator.concurrency import ConcurrencyLimiter, is_host_busy
from mpreader.pool.coordinator.halving import Half, Halving
from mpreader.pool.coordinator.in_flight import ServerAndSize
from mpreader.pool.coordinator.memory import SlotMemory
from mpreader.pool.coordinator.reports import report_request
from mpreader.pool.coordinator.scheduler import Scheduler, SchedulerLimits
from mpreader.pool.coordinator.state import PartState, SlotStatus
from mpreader.pool.coordinator.tail import SlowTail
from mpreader.pool.coordinator.wakeup import Wakeup
from mpreader.pool.coordinator.workers import WorkerHandle, WorkerLimits, WorkerSupervisor
from mpreader.pool.requests import (
    CloseRead,
    Demand,
    Discard,
    Ended,
    GiveBack,
    OpenRead,
    SegmentMemory,
    SlotTaken,
    SourceResolved,
)
from mpreader.pool.sizing import PoolSizes
from mpreader.pool.stats import PoolStats
from mpreader.pool.worker.messages import (
    Cancel,
    Failed,
    FailureKind,
    Fetch,
    Fetched,
    MapSegment,
    Progress,
    Shorten,
    UnmapSegment,
)

__all__ = ["Coordinator", "Mailbox", "Timeouts"]

log = logging.getLogger(__name__)

# Longest waits of the thread, for what nobody wakes it for: deadlines of parts and workers; the limiter, while it holds
# a part back; ended leases, while memory is short; and the pool's idle time.
_DEADLINE_TICK_S: Final = 0.25
_LIMITER_TICK_S: Final = 0.015
_LEASE_TICK_S: Final = 0.01
_END_TICK_S: Final = 0.01  # where the kernel does not tell the end of a worker
_LONGEST_WAIT_S: Final = 3600.0  # `select` refuses to wait for years
_STOP_TIMEOUT_S: Final = 5.0


class Mailbox(Protocol):
    """A caller, as the coordinator sees it. Its methods are called in the coordinator's thread, and must not block."""

    def post(self, message: object, memory: SegmentMemory | None = None) -> None:
        """Take a message; with a MapSegment comes its ``memory``."""

    def collect(self) -> Sequence[object]:
        """Messages of the caller that nobody was woken for: leases that have ended."""


class Timeouts(NamedTuple):
    """The waiting times of ``PoolConfig``, in seconds."""

    connect_timeout_s: float
    stall_timeout_s: float
    timeout_s: float
    worker_timeout_s: float
    lease_timeout_s: float
    idle_timeout_s: float


class _Connect(NamedTuple):
    """A caller is there. Not a message of the caller: a mailbox can't cross a process border."""

    number: int
    mailbox: Mailbox


class _Disconnect(NamedTuple):
    """A caller is gone, and has no view of any slot."""

    number: int


class Coordinator:
    """One run of a pool, from its first use until it is stopped, idle or broken.

    Attributes:
        sizes: Numbers that it was made with.
        workers: The worker processes.
        failure: Error that it broke with; None if it runs, was told to stop, or was idle.
    """

    def __init__(self, sizes: PoolSizes, timeouts: Timeouts) -> None:
        """Start the workers and the thread.

        Raises:
            PoolError: The operating system refused a process or a descriptor.
        """
        self.sizes = sizes
        self._idle_timeout_s = timeouts.idle_timeout_s
        self._pid = os.getpid()
        self._inbox: deque[object] = deque()
        self._mailboxes: dict[int, Mailbox] = {}
        self._lock = threading.Lock()  # guards the decision that nothing more is taken on
        self._is_ended = False
        self.failure: MpreaderError | None = None
        self._is_told_to_stop = False
        self._is_waiting = False  # set before the inbox is looked into, so that no message is overlooked
        self._busy_until = self._next_watch = time.monotonic()
        try:
            self._wakeup = Wakeup()
            try:
                self._selector = make_selector(self._wakeup.fd)
            except BaseException:
                self._wakeup.close()
                raise
        except OSError as error:
            raise PoolError(f"can't start: {error}; if it is a limit (ulimit -n), raise it") from error
        self._arena = Arena(sizes.max_bytes, sizes.block_bytes, sizes.segment_bytes)
        limits = SchedulerLimits(sizes.window_bytes, timeouts.timeout_s, timeouts.lease_timeout_s)
        self._scheduler = Scheduler(SlotMemory(self._arena), self._post_to, limits)
        self._limiter = ConcurrencyLimiter(sizes.workers, sizes.workers * sizes.connections_per_worker, is_host_busy)
        self._tail = SlowTail(sizes.workers * sizes.connections_per_worker)
        self._halving = Halving(self._tail.in_flight)
        self._has_idle = False  # connections, and nothing that they could receive
        self._next_look = float("inf")
        self._limit = 2 * sizes.workers  # parts that may be in flight, by the limiter's last word
        self._is_held_back = False  # by the limiter: a part could be sent, and must wait
        self._handlers: dict[type, Callable[[Any], None]] = {
            Demand: self._scheduler.demand,
            SlotTaken: self._scheduler.slot_taken,
            GiveBack: self._scheduler.give_back,
            Discard: self._scheduler.discard,
            SourceResolved: self._scheduler.source_resolved,
            OpenRead: self._scheduler.open,
            CloseRead: self._scheduler.close,
            _Connect: self._connect,
            _Disconnect: self._disconnect,
        }
        worker_limits = WorkerLimits(
            sizes.workers, sizes.connections_per_worker, *timeouts[:2], timeouts.worker_timeout_s
        )
        self.workers = WorkerSupervisor(worker_limits, self._selector)
        self._thread = threading.Thread(target=self._run, name="mpreader-coordinator", daemon=True)
        try:
            self.workers.start()
            self._thread.start()
        except RuntimeError as error:
            self._give_back_everything()
            raise PoolError(f"{error}; if it is a limit (ulimit -u), raise it") from error
        except BaseException:
            if self._thread.ident is None:
                self._give_back_everything()
            else:  # a Ctrl-C just after the start: the thread uses it all, and gives it back
                self.stop()
            raise

    # -- for other threads

    @property
    def is_ended(self) -> bool:
        """True when it takes on nothing more."""
        return self._is_ended

    def stats(self) -> PoolStats:
        """Statistics of this run so far, but for the time that its callers' consumers have waited."""
        return self._scheduler.stats(self.workers.restarts)

    @property
    def reserved_bytes(self) -> int:
        """Shared memory reserved now."""
        return self._arena.reserved_bytes

    def connect(self, number: int, mailbox: Mailbox) -> None:
        """Take on a caller, before its first message.

        Args:
            number: Number of the caller, which no other one has.
            mailbox: Its mailbox.
        """
        self.tell(_Connect(number, mailbox))

    def disconnect(self, number: int) -> None:
        """Forget a caller, after its last message; what it had leased is free."""
        self.tell(_Disconnect(number))

    def tell(self, message: object) -> None:
        """Put a message into the inbox; lost once the coordinator has ended. Never blocks, never fails."""
        if not self._is_ended:  # or a closed pool would keep what the messages name
            self._inbox.append(message)
            # Otherwise the thread looks into the inbox before it waits; a needless wake-up costs a system call, and
            # the thread that makes it the interpreter's lock.
            if self._is_waiting:
                self._wakeup.set()

    def try_tell(self, message: object) -> bool:
        """Put a message into the inbox; False if the coordinator has ended, or is about to."""
        with self._lock:
            if self._is_ended:
                return False
            self.tell(message)
            return True

    def stop(self) -> None:
        """End workers, memory and thread, and wait for it. Idempotent; does nothing in a forked child."""
        if os.getpid() != self._pid:
            return
        self._is_told_to_stop = True
        self._wakeup.set()
        if threading.current_thread() is not self._thread:
            # Not for ever: a garbage collection may call this while its thread holds a lock that ours waits for.
            self._thread.join(_STOP_TIMEOUT_S)

    def abandon(self) -> None:
        """In a forked child: give back the inherited descriptors, leave everything else to the parent."""
        self._is_ended = True
        self.workers.abandon()
        self._arena.close()
        self._selector.close()
        self._wakeup.abandon()

    # -- the thread

    def _run(self) -> None:
        error: MpreaderError = PoolClosed("the pool was closed")
        try:
            while not self._is_told_to_stop and not self._try_end_idle():
                self._wait()
                # Collected before the inbox is read, and applied after it: whoever took a slot has said so before its
                # lease could end, but perhaps after the inbox was read.
                collected = [message for mailbox in self._mailboxes.values() for message in mailbox.collect()]
                self._read_inbox()
                for message in collected:
                    self._handlers[type(message)](message)
                self._watch()
                self._dispatch()
                self._scheduler.note_held_up(time.monotonic())
        except MpreaderError as broken:
            error = self.failure = broken
        except Exception as bug:
            log.exception("the coordinator failed")
            error = self.failure = PoolError(f"internal error, please report it: {bug!r}")
            error.__cause__ = bug
        finally:
            self._shut_down(error)

    def _shut_down(self, error: MpreaderError) -> None:
        # In this order: nothing more is taken on; whoever waits is told, and waits no more; and the workers are gone
        # before their memory is, since until then they may write into it.
        with self._lock:
            self._is_ended = True
        try:
            self._scheduler.clear()
            # Popped, not iterated: a thread that looked at _is_ended just before may still append.
            unread = [self._inbox.popleft() for _ in range(len(self._inbox))]
            connecting = [message.mailbox for message in unread if isinstance(message, _Connect)]
            for mailbox in [*self._mailboxes.values(), *connecting]:
                mailbox.post(Ended(error))
            self._mailboxes.clear()
        finally:
            self._give_back_everything()

    def _give_back_everything(self) -> None:
        self.workers.stop()
        self._arena.close()
        self._selector.close()
        self._wakeup.close()
        self._inbox.clear()

    def _try_end_idle(self) -> bool:
        now = time.monotonic()
        if not self._scheduler.is_idle:
            self._busy_until = now
        if now - self._busy_until < self._idle_timeout_s:
            return False
        with self._lock:
            self._is_ended = not self._inbox
            return self._is_ended

    def _wait(self) -> None:
        self._is_waiting = True
        ready = self._selector.select(0 if self._inbox else self._select_timeout_s())
        self._is_waiting = False
        for key, _ in ready:
            if key.data is None:
                self._wakeup.clear()
            else:
                self._handle_worker_event(*key.data)
        for worker in self.workers.take_ended():
            self._handle_worker_event(worker, has_ended=True)

    def _select_timeout_s(self) -> float:
        """Longest time to wait for a message: until something is due that no message will tell."""
        scheduler = self._scheduler
        if self.workers.awaits_end:
            return _END_TICK_S
        if scheduler.has_views and scheduler.waits_for_views:  # the end of a view wakes nobody
            return _LEASE_TICK_S
        # Computed here only, not with every message.
        self._next_look = self._tail.next_look()
        if self._has_idle:
            self._next_look = min(self._next_look, self._halving.next_look())
        if scheduler.is_idle:
            idle_s = self._busy_until + self._idle_timeout_s - time.monotonic()
            return max(0.0, min(idle_s, _DEADLINE_TICK_S if scheduler.has_views else _LONGEST_WAIT_S))
        if not self.workers.has_room():  # a retry that is due can't be sent before a worker has responded
            return max(0.0, min(_DEADLINE_TICK_S, self._next_look - time.monotonic()))
        # While the limiter holds a part back: a server that does not respond soon is asked for more.
        tick_s = _LIMITER_TICK_S if self._is_held_back else _DEADLINE_TICK_S
        next_event = min(scheduler.next_event(), self._next_look)
        return max(0.0, min(tick_s, next_event - time.monotonic()))

    def _read_inbox(self) -> None:
        while self._inbox:
            message = self._inbox.popleft()
            self._handlers[type(message)](message)
        self._cancel_unwanted()

    def _connect(self, message: _Connect) -> None:
        self._mailboxes[message.number] = message.mailbox
        for segment in self._arena.segments.values():
            message.mailbox.post(MapSegment(segment.number, segment.size), segment)

    def _disconnect(self, message: _Disconnect) -> None:
        self._mailboxes.pop(message.number, None)
        self._scheduler.forget_leases(message.number)

    def _post_to(self, caller: int) -> Callable[[object], None]:
        return self._mailboxes[caller].post

    # -- workers

    def _handle_worker_event(self, worker: WorkerHandle, has_ended: bool) -> None:
        now = time.monotonic()
        # Also of a process that has ended: what it said before counts, and its parts must not be received again.
        for result in self.workers.receive(worker, now):
            if isinstance(result, Progress):
                self._handle_progress(result, now)
            else:
                self._handle_result(worker.process.number, result, now)
        if has_ended:
            self._replace(worker)

    def _handle_progress(self, progress: Progress, now: float) -> None:
        for number in self._tail.judge(progress.parts, now):
            self.workers.send_to_holder(number, Cancel(number, FailureKind.SLOW))
        for count in range(self.workers.idle_connections if self._has_idle else 0):
            half = self._halving.choose(now)
            part = None if half is None else self._scheduler.find(half.part)
            if half is None or part is None or not self._try_halve(part, half, count, now):
                return

    def _try_halve(self, part: PartState, half: Half, queued: int, now: float) -> bool:
        """Let another connection receive the end of a part; ``queued`` halves wait for theirs already."""
        host, port, _ = _server_and_size(part)
        self._limit = self._limiter.limit(host, port, half.nbytes, now)
        if self.workers.in_flight + queued >= self._limit or part.slot_read.status is not SlotStatus.FILLING:
            return False
        self._scheduler.halve(part, half.nbytes)
        self._halving.halved(half, now)
        self.workers.send_to_holder(part.number, Shorten(part.number, part.left_bytes))
        return True

    def _replace(self, worker: WorkerHandle) -> None:
        lost = self.workers.replace(worker)
        for number in lost.parts:
            self._tail.ended(number)
        self._scheduler.lost(lost.parts, lost.exitcode, lost.why)

    def _handle_result(self, worker: int, result: Fetched | Failed, now: float) -> None:
        part = self._scheduler.find(result.part)
        if isinstance(result, Failed):
            nbytes, seconds = result.received, 0.0
        else:
            seconds = result.seconds
            nbytes = (0 if part is None else part.left_bytes) if result.received is None else result.received
        # Before the part learns of it: what it was asked for, and how much of that has come, are facts of this request.
        self._scheduler.count_request(part, worker, nbytes, seconds)
        if part is not None:
            report_request(part, worker, nbytes, result)
        if isinstance(result, Failed):
            self._tail.ended(result.part)
            self._scheduler.failed(result, now)
            return
        self._tail.fetched(result.part, result.seconds, result.first_byte_s - result.started_s, now)
        self._scheduler.fetched(result.part, result.found)
        if part is not None and not part.received:  # otherwise this was only the rest of it
            self._limiter.observe(*_server_and_size(part), result.seconds, result.processor_wait_s, now)

    def _watch(self) -> None:
        now = time.monotonic()
        if now >= self._next_watch:
            self._next_watch = now + _DEADLINE_TICK_S
            self.workers.watch(now)
            self._scheduler.expire(now)
            self._cancel_unwanted()
        if now >= self._next_look:
            self._next_look = float("inf")
            self._tail.looked(now)
            self.workers.ask_progress()

    def _dispatch(self) -> None:
        """Send parts until the workers, the limiter or the scheduler have no room for more."""
        now = time.monotonic()
        self._is_held_back = self._has_idle = False
        while self.workers.has_room():
            self._scheduler.window_bytes = self._window_bytes()
            part = self._scheduler.next_part(now)
            self._announce_segments()
            if part is None:
                self._has_idle = not self._scheduler.has_pending
                return
            self._limit = self._limiter.limit(*_server_and_size(part), now)
            self._is_held_back = self.workers.in_flight >= self._limit
            if self._is_held_back or not self._try_send(part, now):
                self._scheduler.put_back(part)
                return

    def _try_send(self, part: PartState, now: float) -> bool:
        source, slot = part.slot_read.source, part.slot_read.slot
        if source.route is None or source.version is None or slot is None:
            raise PoolError("a part was scheduled before its source and slot were known")
        rest = part.range.rest(part.received)
        fetch = Fetch(
            part=part.number,
            route=source.route,
            version=source.version,
            start=rest.start,
            end=rest.end,
            segment=slot.segment.number,
            segment_offset=slot.offset + rest.slot_offset,
            skips=rest.skips,
        )
        if not self.workers.send(fetch, slot.segment, now):
            return False
        self._scheduler.sent(part, now)
        server_and_size = (*_server_and_size(part)[:2], part.left_bytes)
        self._tail.sent(part.number, server_and_size, now, cuts=part.cuts, cut=part.cut)
        return True

    def _window_bytes(self) -> int:
        """Bytes that may be in flight, and some more that wait to be taken."""
        return min(self.sizes.window_bytes, (self._limit + max(1, self._limit // 4)) * self.sizes.block_bytes)

    def _announce_segments(self) -> None:
        made, dropped = self._arena.take_changes()
        if not made and not dropped:
            return
        self.workers.unmap(dropped)  # what was made is mapped by a worker when it first needs it
        for mailbox in self._mailboxes.values():
            for segment in made:
                mailbox.post(MapSegment(segment.number, segment.size), segment)
            for segment in dropped:
                mailbox.post(UnmapSegment(segment.number))

    def _cancel_unwanted(self) -> None:
        for part in self._scheduler.take_cancelled():
            self.workers.send_to_holder(part, Cancel(part))


def _server_and_size(part: PartState) -> ServerAndSize:
    """Host, port and bytes: the time that a part takes depends on them."""
    route = part.slot_read.source.route
    host, port = (route.host, route.port) if route is not None else ("", 0)
    return host, port, part.range.size

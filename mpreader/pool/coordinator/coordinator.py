"""The coordinator: one thread that waits on everything and moves parts between consumers and workers.

::

    consumer threads                coordinator thread                       worker processes
    Transfer.take ── Demand ──┐                                        ┌── Fetch(part, route, slot) ──► receive
    open, discard, close ─────┤ inbox    ┌───────────────────────┐     │                                   │
    (a view's last reference) ┼────────► │ Scheduler   (decides) │ ────┘   MapSegment, Cancel, Ping        │
    SourceBook threads:       │  wake-up │ Arena       (memory)  │                                         │
      HEAD, presign ──────────┘          │ Crew        (workers) │ ◄── Fetched / Failed(kind, bytes) ──────┘
                                         └──────────┬────────────┘ ◄── pidfd: a worker is gone
    Transfer.take ◄──────── deliver(slot | error) ──┘

The thread decides and sends; it never waits for the network, for a consumer or for a worker. It ends when it is told
to, when the pool has been idle for long enough, or when it breaks; then every consumer gets an error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from mpreader.errors import MpreaderError, PoolClosed, PoolError
from mpreader.pool.coordinator.arena import Arena, Lease
from mpreader.pool.coordinator.concurrency import Pace, is_host_busy
from mpreader.pool.coordinator.resolver import Resolved, SourceBook
from mpreader.pool.coordinator.scheduler import Scheduler, SchedulerLimits
from mpreader.pool.coordinator.state import PartState
from mpreader.pool.coordinator.workers import Crew, CrewLimits, Member
from mpreader.pool.sizing import PoolSizes
from mpreader.pool.stats import PoolStats
from mpreader.pool.transfer import Close, Demand, Discard, Open, Taken, Transfer
from mpreader.pool.worker.messages import Cancel, Failed, Fetch, Fetched
from mpreader.telemetry import events
from mpreader.telemetry.events import Observer, RequestEvent

__all__ = ["Coordinator", "Timeouts"]

log = logging.getLogger(__name__)

_TICK_S: Final = 0.25  # between two looks at deadlines while there is work
_PACE_TICK_S: Final = 0.015
_LEASE_TICK_S: Final = 0.01  # between two looks at ended leases while memory is short
_STOP_TIMEOUT_S: Final = 5.0


class Timeouts(NamedTuple):
    """The waiting times of ``PoolConfig``, in seconds."""

    connect_timeout_s: float
    stall_timeout_s: float
    timeout_s: float
    worker_timeout_s: float
    lease_timeout_s: float
    idle_timeout_s: float


class Wakeup:
    """Lets any thread, and a garbage collector in the middle of anything, wake the coordinator."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Reentrant: a garbage collection inside `set` may end a lease, which calls `set`.
        self._lock = threading.RLock()

    def set(self) -> None:
        with self._lock:
            if self.fd >= 0:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1

    def abandon(self) -> None:
        self._lock = threading.RLock()  # a thread that is not in this forked child may have held the old one
        self.close()


class Coordinator:
    """One run of a pool, from its first use until it is stopped, idle or broken."""

    def __init__(self, sizes: PoolSizes, timeouts: Timeouts) -> None:
        """Start the workers and the thread.

        Raises:
            PoolError: The operating system refused a process or a descriptor.
        """
        self.sizes = sizes
        self._idle_timeout_s = timeouts.idle_timeout_s
        self._pid = os.getpid()
        self._inbox: deque[object] = deque()
        # For ``Slot.lease``, at any moment: in a garbage collection, while a Ctrl-C strikes. So nobody is woken; mostly
        # the consumer takes the next fill then, which wakes the thread, and else it looks by itself.
        self._ended_leases: deque[Lease] = deque()
        self.lease_ended: Callable[[Lease], object] = self._ended_leases.append
        self._lock = threading.Lock()  # guards the decision that nothing more is taken on
        self._is_ended = False
        self._is_told_to_stop = False
        self._busy_until = self._next_watch = time.monotonic()
        try:
            self._selector = selectors.DefaultSelector()
            self._wakeup = Wakeup()
        except OSError as error:
            raise PoolError(f"can't start: {error}; if it is a limit (ulimit -n), raise it") from error
        self._selector.register(self._wakeup.fd, selectors.EVENT_READ)
        self._arena = Arena(sizes.max_bytes, sizes.block_bytes, sizes.segment_bytes)
        self._sources = SourceBook(self.tell)
        limits = SchedulerLimits(sizes.window_bytes, timeouts.timeout_s, timeouts.lease_timeout_s)
        self._scheduler = Scheduler(self._arena, self._sources, limits)
        self._pace = Pace(sizes.workers, sizes.workers * sizes.connections_per_worker, is_host_busy)
        self._limit = 2 * sizes.workers
        self._is_paced = False
        crew_limits = CrewLimits(sizes.workers, sizes.connections_per_worker, *timeouts[:2], timeouts.worker_timeout_s)
        self.crew = Crew(crew_limits, self._selector)
        self._thread = threading.Thread(target=self._run, name="mpreader-coordinator", daemon=True)
        try:
            self.crew.start(())
            self._thread.start()
        except RuntimeError as error:
            self._give_back_everything()
            raise PoolError(f"{error}; if it is a limit (ulimit -u), raise it") from error
        except BaseException:
            self._give_back_everything()
            raise

    # -- for other threads

    @property
    def is_ended(self) -> bool:
        """Whether it takes on nothing more."""
        return self._is_ended

    def stats(self) -> PoolStats:
        """What this run has done so far."""
        return self._scheduler.stats(self.crew.restarts)

    @property
    def reserved_bytes(self) -> int:
        """Shared memory reserved now."""
        return self._arena.reserved_bytes

    def tell(self, message: object) -> None:
        """Put a message into the inbox; lost once the coordinator has ended."""
        if not self._is_ended:  # or a closed pool would keep the transfers that it names, and their memory
            self._inbox.append(message)
            self._wakeup.set()

    def try_open(self, transfer: Transfer) -> bool:
        """Take a transfer on; False if the coordinator has ended, or is about to."""
        with self._lock:
            if self._is_ended:
                return False
            self.tell(Open(transfer))
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
        self.crew.abandon()
        self._arena.close()
        self._selector.close()
        self._wakeup.abandon()

    # -- the thread

    def _run(self) -> None:
        error: MpreaderError = PoolClosed("the pool was closed")
        try:
            while not self._is_told_to_stop and not self._try_end_idle():
                self._wait()
                # Taken before the inbox is read: who took a fill has said so before its lease could end.
                ended = [self._ended_leases.popleft() for _ in range(len(self._ended_leases))]
                self._read_inbox()
                self._end_leases(ended)
                self._watch()
                self._dispatch()
                self._scheduler.note_held_up(time.monotonic())
        except MpreaderError as broken:
            error = broken
        except Exception as bug:
            log.exception("the coordinator failed")
            error = PoolError(f"internal error, please report it: {bug!r}")
            error.__cause__ = bug
        finally:
            self._end(error)

    def _end(self, error: MpreaderError) -> None:
        # In this order: take nothing on, fail what waits, end the workers, and only then let go of their memory.
        with self._lock:
            self._is_ended = True
        self._scheduler.fail_everything(error)
        for message in list(self._inbox):
            if isinstance(message, Open):
                message.transfer.fail_all(error)
        self.crew.stop()
        self._give_back_everything()

    def _give_back_everything(self) -> None:
        self.crew.stop()
        self._sources.close()
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
        now = time.monotonic()
        if self._scheduler.is_idle:
            timeout_s = self._busy_until + self._idle_timeout_s - now
        elif self.crew.has_room():
            timeout_s = min(_TICK_S, self._scheduler.next_event() - now)
            if self._is_paced:  # a server that does not answer soon is asked for more
                timeout_s = min(timeout_s, _PACE_TICK_S)
        else:  # a retry that is due can't be sent before a worker is heard
            timeout_s = _TICK_S
        if self._scheduler.has_leases:
            timeout_s = min(timeout_s, _LEASE_TICK_S if self._scheduler.is_short else _TICK_S)
        for key, _ in self._selector.select(0 if self._inbox else max(0.0, timeout_s)):
            if key.data is None:
                self._wakeup.clear()
            else:
                self._hear(*key.data)

    def _hear(self, member: Member, has_ended: bool) -> None:
        now = time.monotonic()
        for news in self.crew.receive(member, now):
            self._note_request(member.process.number, news)
            if isinstance(news, Fetched):
                self._note_pace(self._scheduler.fetched(news.part), news, now)
            else:
                self._scheduler.failed(news, now)
        if has_ended:
            lost = self.crew.bury(member, self._arena.segments.values())
            self._scheduler.lost(lost.parts, lost.exitcode, lost.why)

    def _note_request(self, worker: int, news: Fetched | Failed) -> None:
        part = self._scheduler.find(news.part)
        nbytes = news.received if isinstance(news, Failed) else 0 if part is None else _rest(part)
        self._scheduler.note_request(part, worker, nbytes, news.seconds if isinstance(news, Fetched) else 0.0)
        if part is not None and (events.observers or log.isEnabledFor(logging.DEBUG)):
            ended_s = news.started_s + news.seconds
            event = RequestEvent(
                uri=part.fill.fill.source.uri,
                worker=worker,
                connection=news.connection,
                start=part.part.start + part.received,
                end=part.part.end,
                received=nbytes,
                started_s=news.started_s,
                first_byte_s=news.first_byte_s or ended_s,
                ended_s=ended_s,
                outcome=news.kind.name.lower() if isinstance(news, Failed) else "ok",
                attempt=part.requests,
            )
            _report(event)

    def _end_leases(self, ended: list[Lease]) -> None:
        for lease in ended:
            slot = lease.slot()
            if slot is not None:
                self._scheduler.lease_ended(slot)

    def _read_inbox(self) -> None:
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Taken):
                self._scheduler.taken(message.transfer, message.fill)
            elif isinstance(message, Demand):
                self._scheduler.demand(message.transfer, message.fill)
            elif isinstance(message, Discard):
                self._scheduler.discard(message.transfer, message.start, message.stop)
            elif isinstance(message, Resolved):
                self._sources.apply(message)
            elif isinstance(message, Open):
                self._scheduler.open(message.transfer)
            elif isinstance(message, Close):
                self._cancel(self._scheduler.close(message.transfer))

    def _watch(self) -> None:
        now = time.monotonic()
        if now >= self._next_watch:
            self._next_watch = now + _TICK_S
            self.crew.watch(now)
            self._cancel(self._scheduler.expire(now))

    def _dispatch(self) -> None:
        now = time.monotonic()
        self._is_paced = False
        while self.crew.has_room():
            self._scheduler.window_bytes = self._window_bytes()
            part = self._scheduler.next_part(now)
            self._announce_segments()
            if part is None:
                return
            self._limit = self._pace.limit(*_kind(part), now)
            self._is_paced = self.crew.in_flight >= self._limit
            if self._is_paced or not self.crew.send(_fetch_message(part), now):
                self._scheduler.unsend(part)
                return
            part.requests += 1

    def _window_bytes(self) -> int:
        """What may be in flight, and some more that waits to be taken."""
        return min(self.sizes.window_bytes, (self._limit + max(1, self._limit // 4)) * self.sizes.block_bytes)

    def _note_pace(self, part: PartState | None, fetched: Fetched, now: float) -> None:
        if part is not None and not part.received:  # otherwise this was only the rest of it
            self._pace.note(*_kind(part), fetched.seconds, fetched.processor_wait_s, now)

    def _announce_segments(self) -> None:
        made, dropped = self._arena.take_changes()
        if made or dropped:
            self.crew.announce(made, dropped)

    def _cancel(self, parts: list[int]) -> None:
        for part in parts:
            self.crew.send_to_holder(part, Cancel(part))


def _rest(part: PartState) -> int:
    """Bytes of a part that had not been received before its last request."""
    return part.part.end - part.part.start - part.received


def _report(event: RequestEvent) -> None:
    for observe in events.observers:
        _call(observe, event)
    log.debug(
        "request %s: %s bytes=%d-%d received=%d worker=%d connection=%d attempt=%d first_byte_ms=%.1f ms=%.1f",
        event.outcome,
        event.uri,
        event.start,
        event.end,
        event.received,
        event.worker,
        event.connection,
        event.attempt,
        1e3 * (event.first_byte_s - event.started_s),
        1e3 * (event.ended_s - event.started_s),
        extra={"mpreader": event._asdict()},
    )


def _call(observe: Observer, event: RequestEvent) -> None:
    try:
        observe(event)
    except Exception:  # whoever looks on must not stop a load
        log.exception("an observer of requests failed")


def _kind(part: PartState) -> tuple[str, int, int]:
    """Server and size: what a part's time depends on."""
    route = part.fill.source.route
    host, port = (route.host, route.port) if route is not None else ("", 0)
    return host, port, part.part.end - part.part.start


def _fetch_message(state: PartState) -> Fetch:
    part, entry, slot = state.part, state.fill.source, state.fill.slot
    if entry.route is None or entry.version is None or slot is None:
        raise PoolError("a part was scheduled before its source and slot were known")
    return Fetch(
        part=state.number,
        route=entry.route,
        etag=entry.version.etag,
        object_size=entry.version.size,
        start=part.start + state.received,
        end=part.end,
        segment=slot.segment.number,
        segment_offset=slot.offset + part.slot_offset + state.received,
    )

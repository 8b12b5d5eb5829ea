"""Server: the thread of the leader that serves the ranks of its host.

::

    gathering: accepts ranks until all have said what they need, or the time is up
        │ the planner makes one read of all needs
    serving:   moves messages between the ranks, the broker and the coordinator
        │ no rank is left, or the coordinator has ended
    ended

The leader's own rank takes part like the others, but without a socket. A rank that comes too late, or does not know the
token, finds the connection closed and reads by itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from mpreader.errors import PoolClosed, PoolError
from mpreader.pool.caller import Caller
from mpreader.pool.coordinator.wakeup import Wakeup
from mpreader.pool.hosts.board import Board
from mpreader.pool.hosts.broker import Broker
from mpreader.pool.hosts.identity import Listener
from mpreader.pool.hosts.links import Links
from mpreader.pool.hosts.messages import HostLost, HostStats, Join, Joined, SharedRead, Subscription
from mpreader.pool.pool import Pool, PoolConnection
from mpreader.pool.requests import (
    CloseRead,
    Ended,
    ReadId,
    ResolveSource,
    SegmentMemory,
    SourceName,
    SourceResolved,
    VersionLearned,
)
from mpreader.pool.resolver import SourceResolver
from mpreader.pool.source import Source
from mpreader.pool.stats import PoolStats
from mpreader.pool.transfer import Transfer

__all__ = ["HostServer"]

log = logging.getLogger(__name__)

# Ranks come within milliseconds of each other, since DCP has just scattered their plans. One that is held up must not
# hold up the others for long: it reads by itself.
_GATHER_S: Final = 3.0
_HEARTBEAT_S: Final = 1.0
_TICK_S: Final = 0.25
_LEADER: Final = 0  # number of the leader's own rank

Planner = Callable[[Sequence[Any]], tuple[Sequence[Source], SharedRead]]
"""Makes the sources of a shared read, and the read, from the needs of the ranks."""


class HostServer:
    """Serves one load of the ranks of a host. Begins to do so when it is made.

    Args:
        listener: Where the other ranks connect; closed by the server.
        ranks: Number of ranks, the leader's own included.
        pool: Pool that receives.
        planner: Makes the shared read.
        need: What the leader's own rank needs.
        drop_after_s: A rank that keeps memory for so long while others wait for it is dropped.
        on_end: Called by the server's thread when all is over, with the statistics of the read and the number of ranks.

    Attributes:
        joined_ranks: Number of ranks that take part, the leader's own included; 0 until the shared read has begun.
    """

    def __init__(
        self,
        listener: Listener,
        ranks: int,
        pool: Pool,
        planner: Planner,
        need: Any,
        *,
        drop_after_s: float,
        on_end: Callable[[PoolStats, int], object],
    ) -> None:
        self._ranks = ranks
        self._pool = pool
        self._planner = planner
        self._own_need = need
        self._drop_after_s = drop_after_s
        self._on_end = on_end
        self.joined_ranks = 0
        self._pid = os.getpid()
        self._inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._needs: dict[int, Any] = {}  # of the other ranks, by their numbers
        self._places: dict[int, int] = {}
        self._leader_heard_s = time.monotonic()
        self._broker: Broker | None = None
        self._board: Board | None = None
        self._pool_connection: PoolConnection | None = None
        self._sources: Sequence[Source] = ()
        self._resolver: SourceResolver | None = None
        self._is_closing = False
        self._own: Joined | None = None
        self._own_error: Exception | None = None
        self._is_ready = threading.Event()
        # The leader's own rank: a caller in this process.
        self.caller = Caller(_LEADER, self._tell_from_leader)
        self._thread = threading.Thread(target=self._run, name="mpreader-host", daemon=True)
        with contextlib.ExitStack() as opened:
            self._wakeup = Wakeup()
            opened.callback(self._wakeup.close)
            self._links = Links(listener, self._wakeup.fd, self._hear, self._forget)
            opened.callback(self._links.close)
            try:
                self._thread.start()
            except RuntimeError as error:
                raise PoolError(f"{error}; if it is a limit (ulimit -u, ulimit -v), raise it") from error
            opened.pop_all()

    # -- for the leader's rank

    def joined(self) -> Joined:
        """Wait until the shared read has begun; returns the leader's own part of it.

        Raises:
            MpreaderError: It could not begin.
        """
        self._is_ready.wait()
        if self._own is None:
            raise PoolError(f"the ranks of this host can't share a read: {self._own_error}") from self._own_error
        return self._own

    def begin(self, sources: Sequence[Source]) -> Transfer:
        """Return the leader's own read; ``sources`` are its objects."""
        return self.caller.open(sources, self.joined().slot_reads)[0]

    def flush(self) -> None:
        """Note the views of the leader's own rank that have ended."""
        if os.getpid() != self._pid:  # a forked child, which has no such thread
            return
        for message in self.caller.collect():
            self._tell_from_leader(message)

    def check_held(self) -> None:
        """Check that what the leader's own rank has copied until now was right; see :meth:`HostPart.check_held`.

        Raises:
            HostLost: It may not have been.
        """
        if self.board.has_ended(self._places[_LEADER]):
            raise HostLost("this rank was silent for too long, or its host's read has ended")

    @property
    def board(self) -> Board:
        """The board of the shared read, once it has begun."""
        assert self._board is not None, "the read has begun"
        return self._board

    def abandon(self) -> None:
        """Same as ``leave``."""
        self.leave()

    def leave(self) -> None:
        """End the leader's own part, after its transfer was closed; the others are served on.

        Views that it still has, in the frames of an exception for one, do not keep memory from the others.
        """
        if os.getpid() != self._pid:
            return
        self.flush()
        self._call(self._forget, _LEADER)

    @property
    def stats(self) -> PoolStats:
        """Statistics of the shared read so far."""
        return self._broker.tally.stats() if self._broker is not None else PoolStats()

    def close(self) -> None:
        """End it; ranks that are not done read on by themselves. Idempotent."""
        if os.getpid() != self._pid:
            return
        self._is_closing = True
        self._wakeup.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def _tell_from_leader(self, message: object) -> None:
        self._leader_heard_s = time.monotonic()
        self._call(self._from_rank, _LEADER, message)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Let the server's thread call a function."""
        self._inbox.append((function, arguments))
        self._wakeup.set()

    # -- the coordinator's mailbox

    def post(self, message: object, memory: SegmentMemory | None = None) -> None:
        """Take a message of the coordinator, in its thread."""
        self._call(self._from_coordinator, message, memory)

    def collect(self) -> Sequence[object]:
        """Return nothing: the end of every lease is told."""
        return ()

    # -- the thread

    def _run(self) -> None:
        try:
            self._gather()
            if not self._is_closing:
                self._begin()
                self._serve()
        except Exception as error:
            log.debug("the ranks of this host do not share any more", exc_info=True)
            self._own_error = error
        finally:
            self._shut_down()

    def _gather(self) -> None:
        self._links.listen()
        until = time.monotonic() + _GATHER_S
        while not self._is_closing and len(self._needs) < self._ranks - 1 and time.monotonic() < until:
            self._wait(until - time.monotonic())
        self._links.stop_listening()
        for number in self._links.numbers():
            if number not in self._needs:
                self._forget(number)

    def _begin(self) -> None:
        numbers = [_LEADER, *self._needs]
        log.debug("%d of %d ranks of this host share the read", len(numbers), self._ranks)
        sources, read = self._planner([self._own_need, *self._needs.values()])
        self._own_need = None
        self._needs.clear()
        self._sources = sources
        board = self._board = Board.create(len(numbers), read.notes + len(read.slot_reads))
        connection = self._pool_connection = self._pool.connect(self)
        self._resolver = SourceResolver(self._tell_resolved)
        broker = self._broker = Broker(
            ReadId(connection.number, 1), connection.tell, lambda index: board.note(read.notes + index, 1)
        )
        message = broker.open([_name_of(source) for source in sources], read.slot_reads)
        for place, (number, subscription) in enumerate(zip(numbers, read.subscriptions, strict=True)):
            self._places[number] = place
            own_source = {index: own for own, index in enumerate(subscription.sources)}
            slot_reads = [read.slot_reads[index] for index in subscription.indices]
            joined = Joined(
                ReadId(number, 1),
                subscription.answer,
                # What is received is counted once, for the host.
                tuple(one._replace(source=own_source[one.source], over_read=0) for one in slot_reads),
                place,
                len(numbers),
                self._pool.sizes.max_bytes,
                tuple(read.notes + index for index in subscription.indices),
            )
            self._add(number, joined, subscription)
        for index, source in enumerate(sources):
            if source.version is not None:  # nothing is resolved, by which the ranks would hear of it
                broker.tell_version(VersionLearned(message.read, index, source.version))
        if not connection.try_tell(message):
            raise PoolClosed("the pool has ended")
        broker.discard_unwanted()
        self.joined_ranks = len(numbers)
        self._is_ready.set()

    def _add(self, number: int, joined: Joined, subscription: Subscription) -> None:
        assert self._broker is not None, "the read has begun"
        if number == _LEADER:
            self._own = joined
            self._broker.add_rank(number, joined.read, self.caller.post, subscription)
            return
        self._links.send(number, joined, self.board.fd)

        def post(message: object, memory: SegmentMemory | None) -> None:
            self._links.send(number, message, memory.fd if memory is not None else None)

        self._broker.add_rank(number, joined.read, post, subscription)

    def _serve(self) -> None:
        assert self._broker is not None, "the read has begun"
        heartbeat_s = time.monotonic() + _HEARTBEAT_S
        while not self._is_closing and not self._broker.is_over and not self._broker.has_ended:
            self._wait(_TICK_S)
            now = time.monotonic()
            if now >= heartbeat_s:
                heartbeat_s = now + _HEARTBEAT_S
                for number in self._links.numbers():
                    self._links.send(number, HostStats(self.stats))
                for number in self._broker.overdue(self._drop_after_s):
                    if self._is_silent(number):
                        log.debug("a rank of this host keeps memory, and is silent: it reads on by itself")
                        self._forget(number)

    def _is_silent(self, number: int) -> bool:
        heard_s = self._leader_heard_s if number == _LEADER else self._links.heard_s(number)
        return time.monotonic() - heard_s > self._drop_after_s

    def _wait(self, timeout_s: float) -> None:
        if self._links.wait(0 if self._inbox else timeout_s):
            self._wakeup.clear()
        while self._inbox:
            function, arguments = self._inbox.popleft()
            function(*arguments)

    def _forget(self, number: int) -> None:
        """End the part of a rank that is dead, done, silent or not one of us.

        It is struck off the board before anything is received into the slots that it had: if it lives, it looks there
        after each copy.
        """
        if number in self._places:
            self.board.end(self._places[number])
        self._links.close_link(number)
        self._needs.pop(number, None)
        if number == _LEADER:
            self.caller.post(Ended(HostLost("this rank does not take part in its host's read any more")))
        if self._broker is not None:
            self._broker.drop(number)

    def _hear(self, number: int, message: object) -> None:
        """Take a message of another rank."""
        if isinstance(message, Join):
            self._needs[number] = message.need
        else:
            self._from_rank(number, message)

    # -- messages

    def _from_rank(self, number: int, message: object) -> None:
        if self._broker is None:
            return
        self._broker.from_rank(number, message)
        if isinstance(message, CloseRead):
            self._links.send(number, HostStats(self.stats, is_last=True))

    def _from_coordinator(self, message: object, memory: SegmentMemory | None) -> None:
        if self._broker is None or self._resolver is None:  # a segment that was made before the read has begun
            return
        if isinstance(message, ResolveSource):
            self._resolver.resolve(message, self._sources[message.source])
        elif isinstance(message, Ended) and isinstance(message.error, PoolClosed):
            self._is_closing = True  # this process ends its pool; the other ranks read on by themselves
        else:
            self._broker.from_coordinator(message, memory)

    def _tell_resolved(self, message: object) -> None:
        """Pass on version and route of a source, in a thread of the resolver; the ranks hear of the version first."""
        assert isinstance(message, SourceResolved), "a resolver says nothing else"
        if message.version is not None and self._broker is not None:
            self._call(self._broker.tell_version, VersionLearned(message.read, message.source, message.version))
        if self._pool_connection is not None:
            self._pool_connection.tell(message)

    def _shut_down(self) -> None:
        try:
            self._end_all()
        finally:
            self._is_ready.set()
            self._on_end(self.stats, self.joined_ranks)

    def _end_all(self) -> None:
        for number in [_LEADER, *self._links.numbers()]:
            self._forget(number)
        if self._resolver is not None:
            self._resolver.close()
        if self._pool_connection is not None:
            self._pool_connection.close(ReadId(self._pool_connection.number, 1))
        self._inbox.clear()
        self._links.close()
        self._wakeup.close()
        if self._board is not None:
            self._board.close()


def _name_of(source: Source) -> SourceName:
    return SourceName(source.uri, source.bucket, source.key, source.max_attempts, source.version)

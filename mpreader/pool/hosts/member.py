"""Member: a rank's end of the read that its host shares.

The rank takes the slot reads of the shared read like those of a read of its own, by a
:class:`~mpreader.pool.transfer.Transfer`. Where the leader is dead, silent, or has dropped this rank, the transfer ends
in :class:`~mpreader.pool.hosts.messages.HostLost`, and the rank reads the rest by itself.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import posix
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from mpreader.pool.blocking import make_selector
from mpreader.pool.caller import Caller
from mpreader.pool.coordinator.wakeup import Wakeup
from mpreader.pool.hosts.board import Board
from mpreader.pool.hosts.channel import Channel, ChannelClosed, close_descriptors
from mpreader.pool.hosts.identity import HostShare, peer_user
from mpreader.pool.hosts.messages import HostLost, HostStats, Join, Joined
from mpreader.pool.requests import Ended
from mpreader.pool.source import Source
from mpreader.pool.stats import PoolStats
from mpreader.pool.transfer import Transfer
from mpreader.pool.worker.messages import MapSegment

__all__ = ["HostMember"]

log = logging.getLogger(__name__)

# The leader says something every second. It may be stopped, or its machine too busy to run it.
_SILENCE_S: Final = 5.0
# A leader may be late for its own load: its planner is still at work, say.
_JOIN_S: Final = 8.0
_LEAVE_S: Final = 0.5  # the longest wait for the last statistics
_TICK_S: Final = 0.25


class _Memory:
    """A segment of the leader's shared memory. See :class:`mpreader.pool.requests.SegmentMemory`."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        try:
            self.map = mmap.mmap(fd, size)
        finally:
            posix.close(fd)


class HostMember:
    """A rank that takes part in the read of its host. Connects when it is made.

    Args:
        share: What the rank was told of its host.
        need: What it needs, in the words of the leader's planner.

    Attributes:
        board: The board of the shared read.

    Raises:
        HostLost: The leader can't be reached.
    """

    def __init__(self, share: HostShare, need: Any) -> None:
        self._channel = _connect(share)
        self._pid = os.getpid()
        self._opened = contextlib.ExitStack()  # the descriptors
        self._opened.callback(self._channel.close)
        self._early: Sequence[tuple[object, int | None]] = ()  # came right behind the answer
        self._is_closing = False
        self._host_stats = PoolStats()
        self._transfer: Transfer | None = None
        self.caller = Caller(share.place, self._tell)
        try:
            self._wakeup = Wakeup()
            self._opened.callback(self._wakeup.close)
            self._selector = make_selector(self._wakeup.fd)
            self._opened.callback(self._selector.close)
            self._selector.register(self._channel.fd, selectors.EVENT_READ)
            self._channel.send(Join(need))
            self._joined = self._join()
        except (ChannelClosed, OSError) as error:  # OSError: there is no descriptor, or no memory, left
            self._give_back()
            raise HostLost(f"the leader of this host does not share its read: {error}") from error
        except BaseException:
            self._give_back()
            raise
        self._thread = threading.Thread(target=self._run, name="mpreader-host-member", daemon=True)

    @property
    def stats(self) -> PoolStats:
        """Statistics of the host's read, as the leader has last told."""
        return self._host_stats

    def joined(self) -> Joined:
        """Returns the rank's part of the shared read."""
        return self._joined

    def begin(self, sources: Sequence[Source]) -> Transfer:
        """Return the rank's own read; ``sources`` are its objects."""
        joined = self._joined
        self.caller.number = joined.read.caller
        self._transfer, _ = self.caller.open(sources, joined.slot_reads)
        assert self._transfer.read == joined.read, "a rank has one read only"
        try:
            self._thread.start()
        except RuntimeError as error:  # a limit of threads or memory
            raise HostLost(f"this rank can't follow the read of its host: {error}") from error
        return self._transfer

    def check_held(self) -> None:
        """Check that what was copied until now was right: the leader has not let others have the memory meanwhile.

        Raises:
            HostLost: It may have.
        """
        if self.board.has_ended(self._joined.place):
            raise HostLost("the leader has given up this rank, which was silent for too long")

    def flush(self) -> None:
        """Tell the leader of the views that have ended."""
        if os.getpid() != self._pid:  # a forked child: these are views of its parent
            return
        for message in self.caller.collect():
            self._tell(message)

    def leave(self) -> None:
        """End the rank's part, after its transfer was closed; waits a moment for the host's statistics."""
        if os.getpid() != self._pid:
            return
        self.flush()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(_LEAVE_S)
        self.close()

    def abandon(self) -> None:
        """Leave without any wait, in the middle of a garbage collection for one."""
        if os.getpid() != self._pid:
            return
        self._is_closing = True
        self._wakeup.set()
        if self._thread.ident is None:
            self._give_back()

    def close(self) -> None:
        """Leave; idempotent. Bytes of slots that are still in use may change from here on."""
        if os.getpid() != self._pid:
            return
        self.abandon()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def _tell(self, message: object) -> None:
        if not self._channel.send(message):
            self._is_closing = True  # the thread tells the transfer
        if self._channel.has_unsent:
            self._wakeup.set()

    def _join(self) -> Joined:
        """Wait for the answer; messages behind it are taken when the thread runs."""
        until = time.monotonic() + _JOIN_S
        while time.monotonic() < until:
            self._channel.watch(self._selector)  # its need may be more than the socket holds at one time
            if not self._selector.select(max(0.0, until - time.monotonic())):
                break
            self._channel.flush()
            messages = self._channel.receive()
            if messages:
                (joined, fd), self._early = messages[0], messages[1:]
                if not isinstance(joined, Joined) or fd is None:
                    raise ChannelClosed(f"it answers by {type(joined).__name__}")
                self.board = Board(fd, joined.ranks)
                self.board.close()  # no other process will be given it
                return joined
        raise HostLost(f"the leader of this host has not answered within {_JOIN_S:.0f} s")

    def _run(self) -> None:
        error = HostLost("the leader of this host has ended its read")
        try:
            early, self._early = self._early, ()
            self._take(early)
            while not self._is_closing:
                self._channel.watch(self._selector)
                ready = self._selector.select(_TICK_S)
                self._wakeup.clear()
                if any(key.fd == self._channel.fd for key, _ in ready):
                    self._channel.flush()
                    self._take(self._channel.receive())
                elif time.monotonic() - self._channel.heard_s > _SILENCE_S:
                    error = HostLost(f"the leader of this host was silent for {_SILENCE_S:.0f} s")
                    break
        except ChannelClosed:
            pass
        except OSError as refused:  # no memory, or no descriptor, for another segment
            error = HostLost(f"this rank can't follow the read of its host: {refused}")
        except Exception as bug:
            log.exception("a rank can't follow the read of its host")
            error = HostLost(f"internal error, please report it: {bug!r}")
        finally:
            self.caller.post(Ended(error))
            self._give_back()

    def _take(self, messages: Sequence[tuple[object, int | None]]) -> None:
        left = iter(messages)
        try:
            for message, fd in left:
                self._take_one(message, fd)
        finally:
            close_descriptors(left)

    def _take_one(self, message: object, fd: int | None) -> None:
        if isinstance(message, HostStats):
            self._host_stats = message.stats
            if message.is_last:
                self._is_closing = True
        elif isinstance(message, MapSegment):
            assert fd is not None, "a segment comes with its memory"
            self.caller.post(message, _Memory(fd, message.size))
        else:
            self.caller.post(message)

    def _give_back(self) -> None:
        self._channel.flush()
        early, self._early = self._early, ()
        close_descriptors(early)  # this rank was left before it began to read
        self._opened.close()


def _connect(share: HostShare) -> Channel:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(_JOIN_S)
        connection.connect(share.leader.address)
        if peer_user(connection) != os.getuid():
            raise HostLost("the leader of this host belongs to another user")
        connection.sendall(share.leader.token)
    except OSError as error:
        connection.close()
        raise HostLost(f"the leader of this host can't be reached: {error}") from error
    except BaseException:
        connection.close()
        raise
    return Channel(connection)

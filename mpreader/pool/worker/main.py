"""A worker process: threads that receive parts into shared memory.

It is started as a fresh interpreter and imports neither boto3 nor torch nor numpy. The main thread reads the
coordinator's messages and watches the connections' deadlines; each other thread owns one connection. The process ends
when the coordinator's end of the socket closes or the parent process is gone, whatever its threads are doing.
"""

from __future__ import annotations

import collections
import mmap
import os
import pickle
import queue
import select
import signal
import socket
import threading
import time

from mpreader.pool.worker.connection import Connection, GetFailed
from mpreader.pool.worker.messages import (
    MAX_MESSAGE_BYTES,
    Cancel,
    Failed,
    FailureKind,
    Fetch,
    Fetched,
    MapSegment,
    Ping,
    Pong,
    Ready,
    UnmapSegment,
)

__all__ = ["main"]

_WATCH_INTERVAL_S = 0.25


class Lane:
    """A connection, its number, the thread that owns it, and what it is given to do."""

    def __init__(self, number: int, connection: Connection) -> None:
        self.number = number
        self.connection = connection
        self.work: queue.SimpleQueue[Fetch] = queue.SimpleQueue()


class Worker:
    """The state of a worker process."""

    def __init__(self, sock: socket.socket, connections: int, connect_timeout_s: float, stall_timeout_s: float) -> None:
        self._sock = sock
        self._unused = [
            Lane(number, Connection(connect_timeout_s, stall_timeout_s)) for number in reversed(range(connections))
        ]
        self._lanes: list[Lane] = []
        # The lane that became idle last is used next: its connection has its window open, its server's attention, and
        # its buffers warm. Guarded by _lock, as is _waiting.
        self._idle: list[Lane] = []
        self._waiting: collections.deque[Fetch] = collections.deque()
        self._lock = threading.Lock()
        self._segments: dict[int, memoryview] = {}
        self._cancelled: set[int] = set()

    def run(self, parent_pidfd: int) -> None:
        """Serve until the coordinator or its process is gone."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(parent_pidfd, select.POLLIN)
        self._send(Ready())
        while True:
            ready = [fd for fd, _ in poll.poll(self._poll_timeout_ms())]
            if parent_pidfd in ready:
                return
            if ready and not self._handle_message():
                return
            self._end_stalled()

    def _handle_message(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE_BYTES, 1)
        except ConnectionResetError:  # closed by the coordinator before it had read all of ours
            return False
        if not data:
            return False
        message = pickle.loads(data)  # noqa: S301  # from our own parent, over a private socket
        if isinstance(message, Fetch):
            self._start(message)
        elif isinstance(message, MapSegment):
            self._map(message, fds[0])
        elif isinstance(message, UnmapSegment):
            self._segments.pop(message.segment, None)
        elif isinstance(message, Cancel):
            self._cancel(message.part)
        elif isinstance(message, Ping):
            self._send(Pong())
        return True

    def _map(self, message: MapSegment, fd: int) -> None:
        try:
            # Not populated: that would keep the other threads from running, and map what other workers use.
            self._segments[message.segment] = memoryview(mmap.mmap(fd, message.size))
        finally:
            os.close(fd)

    def _start(self, fetch: Fetch) -> None:
        with self._lock:
            if not self._idle and self._unused:
                self._idle.append(self._start_lane())
            if not self._idle:
                self._waiting.append(fetch)
                return
            lane = self._idle.pop()
        lane.work.put(fetch)

    def _start_lane(self) -> Lane:
        lane = self._unused.pop()
        self._lanes.append(lane)
        threading.Thread(target=self._serve, args=(lane,), daemon=True).start()
        return lane

    def _serve(self, lane: Lane) -> None:
        stalls = _Stalls()
        while True:
            fetch: Fetch | None = lane.work.get()
            while fetch is not None:
                news = self._fetch(lane, fetch, stalls)
                # Before the news is out: what the coordinator sends in return is for this lane, not for a new one.
                fetch = self._next_for(lane)
                self._send(news)

    def _next_for(self, lane: Lane) -> Fetch | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._idle.append(lane)
            return None

    def _fetch(self, lane: Lane, fetch: Fetch, stalls: _Stalls) -> Fetched | Failed:
        connection = lane.connection
        started_s, stalled_s = time.monotonic(), stalls.seconds()
        try:
            into = self._segments[fetch.segment][fetch.segment_offset :][: fetch.end - fetch.start]
            connection.get(fetch, into, self._cancelled)
        except GetFailed as failure:
            failed = failure.message(fetch.part)
            return failed._replace(
                seconds=time.monotonic() - started_s,
                connection=lane.number,
                started_s=started_s,
                answered_s=connection.answered_s,
            )
        except Exception as error:  # noqa: BLE001  # a bug must reach the coordinator, not end a thread silently
            connection.close()
            detail = f"worker error: {type(error).__name__}: {error}"
            return Failed(fetch.part, FailureKind.REFUSED, 0, detail, connection=lane.number, started_s=started_s)
        finally:
            self._cancelled.discard(fetch.part)
        seconds, stalled_s = time.monotonic() - started_s, stalls.seconds() - stalled_s
        return Fetched(fetch.part, seconds, stalled_s, lane.number, started_s, connection.answered_s)

    def _cancel(self, part: int) -> None:
        self._cancelled.add(part)
        for lane in self._lanes:
            if lane.connection.part == part:
                lane.connection.abort(FailureKind.CANCELLED)

    def _end_stalled(self) -> None:
        now = time.monotonic()
        for lane in self._lanes:
            if lane.connection.deadline < now:
                lane.connection.abort(FailureKind.STALLED)

    def _poll_timeout_ms(self) -> float | None:
        with self._lock:
            is_busy = len(self._idle) < len(self._lanes)
        return _WATCH_INTERVAL_S * 1000 if is_busy else None

    def _send(self, message: object) -> None:
        try:
            self._sock.send(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        except OSError:
            os._exit(0)  # the coordinator is gone


class _Stalls:
    """How long the thread that made it has waited for a processor while it could have run."""

    def __init__(self) -> None:
        try:
            self._fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1  # a kernel without these numbers

    def seconds(self) -> float:
        fields = os.pread(self._fd, 96, 0).split() if self._fd >= 0 else []
        return int(fields[1]) / 1e9 if len(fields) > 1 else 0.0


def main(fd: int, parent_pid: int, connections: int, connect_timeout_s: float, stall_timeout_s: float) -> None:
    """Be a worker.

    Args:
        fd: The inherited end of the socket to the coordinator.
        parent_pid: The coordinator's process.
        connections: Most connections to keep open.
        connect_timeout_s: Longest wait for a connection.
        stall_timeout_s: Longest wait for a chunk of a body.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent_pidfd = os.pidfd_open(parent_pid)
    if os.getppid() != parent_pid:  # it died before it could be watched
        os._exit(0)
    sock = socket.socket(fileno=fd)
    Worker(sock, connections, connect_timeout_s, stall_timeout_s).run(parent_pidfd)
    os._exit(0)  # other threads may be in the middle of a receive; nothing of theirs is worth waiting for

"""Main program of a worker process: threads that receive parts of objects into shared memory.

The coordinator starts it in a fresh interpreter (:mod:`mpreader.pool.coordinator.process`). It must import nothing of
mpreader but this package, and neither boto3 nor torch nor numpy: a worker that starts in 40 ms and takes 12 MB can be
replaced at any time. The coordinator decides which part comes next and what is retried; a worker must not.

    coordinator                  main thread                        connection threads, one Connection each
                                 Worker.run                         ConnectionThread.run
        │                             │                                  │
        │ MapSegment + descriptor ──► │ maps it                          │
        │ UnmapSegment ─────────────► │ unmaps it                        │
        │ Fetch ────────────────────► │ ─ queue of an idle thread ─────► │ receives the part into its segment, then
        │                             │   (all busy: the part waits)     │ takes the part that waits longest, or is idle
        │ Cancel ───────────────────► │ ─ Connection.abort ────────────► │ ends the GET
        │                             │ ─ abort, if a deadline passed ─► │ ends the GET
        │ Shorten ──────────────────► │ ─ Connection.shorten ──────────► │ ends the GET earlier
        │ Ping, AskProgress ────────► │                                  │
        │ ◄──── Ready, Pong, Progress │                                  │
        │ ◄─────────────────────────────────────────────── Fetched, Failed │

For each Fetch the worker sends exactly one Fetched or Failed, also after a Cancel. The coordinator uses the part's
memory again only after that message, so no thread may write into the memory once its message has been sent.

The process ends when the coordinator closes its end of the socket, or when the coordinator's process is gone. It does
not wait for its connection threads then.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import mmap
import os
import pickle
import queue
import select
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

from mpreader.pool.worker.connection import Connection
from mpreader.pool.worker.failure import GetFailed
from mpreader.pool.worker.messages import (
    MAX_MESSAGE_BYTES,
    AskProgress,
    Cancel,
    Failed,
    FailureKind,
    Fetch,
    Fetched,
    MapSegment,
    PartProgress,
    Ping,
    Pong,
    Progress,
    Ready,
    Shorten,
    UnmapSegment,
    python_name,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_DEADLINE_CHECK_INTERVAL_S = 0.25  # a stalled connection is ended at most this long after its deadline
_COORDINATOR_IS_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ECONNREFUSED, errno.ESHUTDOWN})
_PARENT_CHECK_INTERVAL_S = 0.5  # where the kernel has no pidfd: the worker ends at most this long after the coordinator


class ConnectionThread(threading.Thread):
    """Thread that owns one connection, and receives the parts that the main thread puts into its queue.

    Attributes:
        number: Number of the connection, counted from 0 within the worker.
        connection: The connection. Other threads may only use what :class:`Connection` allows them.
        fetches: Parts to receive. The main thread puts one in only while this thread is idle.
    """

    def __init__(self, number: int, connection: Connection, worker: Worker) -> None:
        # A daemon: the process must be able to end while the thread is blocked in a receive.
        super().__init__(name=f"connection {number}", daemon=True)
        self.number = number
        self.connection = connection
        self.fetches: queue.SimpleQueue[Fetch] = queue.SimpleQueue()
        self._worker = worker

    def run(self) -> None:
        """Receive parts until the process ends."""
        with contextlib.closing(_ProcessorWaits()) as waits:
            while True:
                fetch: Fetch | None = self.fetches.get()
                while fetch is not None:
                    outcome = self._receive(fetch, waits)
                    # Before the outcome is sent: the coordinator may react with another Fetch at once, and the main
                    # thread must find this thread idle by then. Otherwise it would open another connection.
                    fetch = self._worker.next_fetch(self)
                    self._worker.send(outcome)

    def _receive(self, fetch: Fetch, waits: _ProcessorWaits) -> Fetched | Failed:
        started_s, waited_s = time.monotonic(), waits.total_s()
        try:
            # A slice of a memoryview is a view: the body is received into the shared memory itself.
            into = self._worker.segments[fetch.segment][fetch.segment_offset :][: fetch.kept_bytes]
            self.connection.get(fetch, into, self._worker.cancelled)
        except GetFailed as failure:
            return self._failed(fetch, failure, started_s)
        except Exception as error:  # noqa: BLE001  # a bug must reach the coordinator, not end a thread silently
            self.connection.close()  # its state is unknown: the rest of a response may still be in the socket
            bug = GetFailed(FailureKind.REFUSED, f"worker error: {type(error).__name__}: {error}")
            return self._failed(fetch, bug, started_s)
        finally:
            # If the Cancel comes after this, its number stays in the set. That does no harm, since no number is ever
            # used for a second part.
            self._worker.cancelled.discard(fetch.part)
        seconds, waited_s = time.monotonic() - started_s, waits.total_s() - waited_s
        return Fetched(
            fetch.part,
            seconds,
            waited_s,
            self.number,
            started_s,
            self.connection.first_byte_s,
            self.connection.found,
            self.connection.received,
        )

    def _failed(self, fetch: Fetch, failure: GetFailed, started_s: float) -> Failed:
        return Failed(
            fetch.part,
            failure.kind,
            failure.received,
            failure.detail,
            failure.retry_after_s,
            seconds=time.monotonic() - started_s,
            connection=self.number,
            started_s=started_s,
            first_byte_s=self.connection.first_byte_s,
            found=self.connection.found,
            code=failure.code,
        )


class Worker:
    """State of a worker process, and its main thread.

    Only the main thread may call its methods, except ``next_fetch`` and ``send``, which the connection threads call.

    Args:
        sock: Packet socket to the coordinator, in blocking mode.
        connections: Connections to use; the thread of each is started when all the others are busy.

    Attributes:
        segments: Mapped shared memory by number. Written by the main thread, read by all threads; an entry is removed
            only while no part is received into it.
        cancelled: Numbers of parts that need not be received. The main thread adds numbers, connection threads remove
            them. It needs no lock, since adding and removing a number are single operations of the interpreter.
    """

    def __init__(self, sock: socket.socket, connections: Sequence[Connection]) -> None:
        self.segments: dict[int, memoryview] = {}
        self.cancelled: set[int] = set()
        self._sock = sock
        self._threads: list[ConnectionThread] = []  # threads that were started; none of them ends before the process
        # Threads that were not started yet. Reversed, since pop() takes the last one, and number 0 is to start first.
        self._unused = [ConnectionThread(number, each, self) for number, each in enumerate(connections)][::-1]
        # Guards _idle and _waiting together: otherwise a part could be put aside just when a thread becomes idle, and
        # would wait though nothing keeps it.
        self._lock = threading.Lock()
        # Last in, first out: the connection that was used last has the widest TCP congestion window and warm buffers.
        # It also keeps connections that are not needed unused.
        self._idle: list[ConnectionThread] = []
        self._waiting: collections.deque[Fetch] = collections.deque()  # parts for which no thread is idle

    def run(self, parent_pid: int, parent_pidfd: int) -> None:
        """Serve the coordinator until it closes its end of the socket or its process is gone.

        Args:
            parent_pid: Process id of the coordinator.
            parent_pidfd: Descriptor of that process, readable once it is gone; -1 if the kernel refuses one.
        """
        # The process is watched besides the socket: another one may have inherited the coordinator's end of the socket
        # by a fork, and would keep it open after the coordinator has died.
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        if parent_pidfd >= 0:
            poll.register(parent_pidfd, select.POLLIN)
        longest_ms = None if parent_pidfd >= 0 else _PARENT_CHECK_INTERVAL_S * 1000
        self.send(Ready(os.getpid(), python_name()))
        # Checked after pidfd_open: if the parent had died before, the id could belong to another process by now. It is
        # another one, too, where a script has started this interpreter as a child of its own; the coordinator knows
        # that by the process id, and can't use such a worker.
        while os.getppid() == parent_pid:
            ready = [fd for fd, _ in poll.poll(self._poll_timeout_ms() or longest_ms)]
            if parent_pidfd in ready:
                return
            if ready and not self._handle_message():
                return
            self._abort_stalled()

    def next_fetch(self, thread: ConnectionThread) -> Fetch | None:
        """Return the part that has waited longest, for a thread that has received its part.

        Returns:
            The part; None if none waits: the thread counts as idle then.
        """
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._idle.append(thread)
            return None

    def send(self, message: object) -> None:
        """Send a message to the coordinator. Any thread may call it: each message is one packet, so no lock is needed.

        Ends the process if the coordinator is gone.
        """
        try:
            self._sock.send(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        except OSError as error:
            # Not sys.exit(), which would end no more than the calling thread.
            if error.errno in _COORDINATOR_IS_GONE:
                os._exit(0)
            with contextlib.suppress(OSError):
                os.write(2, f"can't send to the coordinator: {error.strerror} (sendto)\n".encode())
            os._exit(1)

    def _handle_message(self) -> bool:
        """Receive a message and act on it; returns False once the coordinator has closed its end."""
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE_BYTES, 1)
        except ConnectionResetError:  # the coordinator closed its end before it had read all our messages
            return False
        if not data:
            return False
        message = pickle.loads(data)  # noqa: S301  # from our own parent, over a private socket
        if isinstance(message, Fetch):
            self._dispatch(message)
        elif isinstance(message, MapSegment):
            if not fds:
                raise OSError(errno.EMFILE, "shared memory was sent, but no descriptor came (ulimit -n, or a sandbox)")
            self._map(message, fds[0])
        elif isinstance(message, UnmapSegment):
            # No part is received into the segment, so no thread holds a view of it: this drops the last reference, and
            # that unmaps the memory.
            self.segments.pop(message.segment, None)
        else:
            self._handle_request_about_parts(message)
        return True

    def _handle_request_about_parts(self, message: object) -> None:
        if isinstance(message, Cancel):
            self._cancel(message)
        elif isinstance(message, Shorten):
            for thread in self._threads:
                if thread.connection.part == message.part:
                    thread.connection.shorten(message)
        elif isinstance(message, AskProgress):
            self.send(self._progress())
        elif isinstance(message, Ping):
            self.send(Pong())

    def _map(self, message: MapSegment, fd: int) -> None:
        try:
            # Pages are not mapped ahead (MAP_POPULATE): that would stop all threads of the worker for the time, and
            # would also map the pages that only other workers receive into.
            self.segments[message.segment] = memoryview(mmap.mmap(fd, message.size))
        finally:
            os.close(fd)  # the mapping does not need it any more

    def _dispatch(self, fetch: Fetch) -> None:
        with self._lock:
            if self._idle:
                thread = self._idle.pop()
            elif self._unused and (started := self._try_start_thread()) is not None:
                thread = started
            else:
                # The coordinator sends more parts than there are connections, so that a connection that has received
                # its part finds the next one here at once.
                self._waiting.append(fetch)
                return
        thread.fetches.put(fetch)

    def _try_start_thread(self) -> ConnectionThread | None:
        thread = self._unused[-1]
        try:
            thread.start()
        except RuntimeError:  # a limit (ulimit -u): the threads that there are do the work
            if not self._threads:
                raise
            self._unused.clear()
            return None
        self._threads.append(self._unused.pop())
        return thread

    def _cancel(self, message: Cancel) -> None:
        # A part that is slow has begun. If it has ended meanwhile, its number must not stay in the set: it may be sent
        # again by this number.
        if message.kind is FailureKind.CANCELLED:
            # First write the set, then read the connections; Connection.get first writes its `part`, then reads the
            # set. So if the part begins at this moment, either it is found here, or Connection.get finds it in the set.
            self.cancelled.add(message.part)
        for thread in self._threads:
            if thread.connection.part == message.part:
                thread.connection.abort(message.kind)

    def _progress(self) -> Progress:
        parts = []
        for connection in (thread.connection for thread in self._threads):
            part = connection.part
            if part is None:
                continue
            progress = PartProgress(part, connection.received, connection.started_s, connection.first_byte_s)
            # If its thread has begun another part meanwhile, these numbers belong together no more.
            if connection.part == part:
                parts.append(progress)
        return Progress(tuple(parts))

    def _abort_stalled(self) -> None:
        now = time.monotonic()
        for thread in self._threads:
            # A connection that is still not closed at the next check is aborted again, which does no harm.
            if thread.connection.deadline < now:
                thread.connection.abort(FailureKind.STALLED)

    def _poll_timeout_ms(self) -> float | None:
        with self._lock:
            is_busy = len(self._idle) < len(self._threads)
        # Deadlines need a look only while a part is received. An idle worker sleeps until a message comes, and takes no
        # processor time.
        return _DEADLINE_CHECK_INTERVAL_S * 1000 if is_busy else None


class _ProcessorWaits:
    """Time for which a thread was ready to run, but waited for a processor.

    The coordinator's concurrency limiter learns from it that more connections would not help. Made, read and closed by
    the thread itself: the file in ``/proc`` is that of the thread which opens it.
    """

    def __init__(self) -> None:
        try:
            self._fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1  # the kernel does not provide these numbers

    def total_s(self) -> float:
        """Seconds since the thread began; 0 if the kernel does not count them."""
        # The file has three numbers: nanoseconds on a processor, nanoseconds of waiting for one, time slices.
        fields = os.pread(self._fd, 96, 0).split() if self._fd >= 0 else []
        return int(fields[1]) / 1e9 if len(fields) > 1 else 0.0

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)


def main(fd: int, parent_pid: int, connections: int, connect_timeout_s: float, stall_timeout_s: float) -> None:
    """Run a worker; does not return.

    Args:
        fd: Inherited end of the socket to the coordinator.
        parent_pid: Process id of the coordinator.
        connections: Most connections to open.
        connect_timeout_s: Longest wait for each step of connecting.
        stall_timeout_s: Longest wait for a response, and for each 256 KiB of a body.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and ends its workers
    sock = socket.socket(fileno=fd)
    worker = Worker(sock, [Connection(connect_timeout_s, stall_timeout_s) for _ in range(connections)])
    worker.run(parent_pid, _try_pidfd_open(parent_pid))
    os._exit(0)  # not sys.exit(): other threads may be blocked in a receive, and must not delay the end


def _try_pidfd_open(pid: int) -> int:
    """Return a descriptor that is readable once a process is gone; -1 if the kernel refuses."""
    try:
        return os.pidfd_open(pid)
    except AttributeError:  # an interpreter that was built for old kernels
        return -1
    except OSError:  # gVisor, old kernels, filters of containers; or the process is gone already
        return -1

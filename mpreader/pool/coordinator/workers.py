"""Worker supervisor: starts the worker processes, gives them parts, watches and replaces them, and ends them.

It decides which worker gets a part, never which part is next. Used by the coordinator, in its thread.

A worker that has died is an event: its pidfd becomes readable. A worker that is stuck gives no event, so it is sent a
Ping now and then, and killed when it has said nothing for too long. Its parts go to others only when the process is
known to be gone, so that it can never wake up and write into a slot that was used again.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import signal
import subprocess
import time
from collections.abc import Iterable
from typing import Final, NamedTuple

from mpreader.errors import WorkerCrashed
from mpreader.pool.coordinator.arena import Segment
from mpreader.pool.coordinator.process import WorkerProcess
from mpreader.pool.worker.messages import Failed, Fetch, Fetched, MapSegment, Ping, Ready, UnmapSegment

__all__ = ["WorkerSupervisor", "WorkerLimits", "Lost"]

log = logging.getLogger(__name__)

# Deaths in a row, with nothing received in between, that end the pool: workers that can't work must not be restarted
# for ever.
_MAX_DEATHS_PER_WORKER: Final = 2
# A worker that starts is given more time than one that works: four times as much, and no less than this.
_LEAST_START_TIMEOUT_S: Final = 10.0
_END_TIMEOUT_S: Final = 0.5


class WorkerLimits(NamedTuple):
    """Numbers of workers and connections, and how long each is waited for, in seconds."""

    workers: int
    connections_per_worker: int
    connect_timeout_s: float
    stall_timeout_s: float
    worker_timeout_s: float


class Lost(NamedTuple):
    """A worker that is gone: the numbers of the parts that it had, its exit status, and the reason in words."""

    parts: tuple[int, ...]
    exitcode: int
    why: str


class WorkerHandle:
    """A worker process, the parts that it has, and when it was last heard.

    Attributes:
        process: The process.
        parts: Numbers of the parts that were sent to it and are not answered yet, in order; used as a set.
        is_ready: True once it has said so.
        is_ending: True once it has closed its socket, or was killed: it gets nothing more.
        is_unresponsive: True if it was killed because it had said nothing for too long.
        last_heard: Time of its last message, or from which on one is expected, by the monotonic clock.
        last_asked: Time of the last Ping.
    """

    def __init__(self, process: WorkerProcess, now: float) -> None:
        self.process = process
        self.parts: dict[int, None] = {}
        self.is_ready = False
        self.is_ending = False
        self.is_unresponsive = False
        self.last_heard = now
        self.last_asked = now


class WorkerSupervisor:
    """All workers of a coordinator. Not thread-safe: owned by the coordinator's thread.

    Args:
        limits: See there.
        selector: Gets the sockets and pidfds of the workers; the data of each is the handle, and True for a pidfd.

    Attributes:
        restarts: Workers that were replaced.
    """

    def __init__(self, limits: WorkerLimits, selector: selectors.BaseSelector) -> None:
        self._limits = limits
        self._selector = selector
        self._workers: list[WorkerHandle] = []
        self._deaths = 0  # since a part was last received
        self.restarts = 0
        # A few parts wait at each worker, so that a connection has the next one at once.
        self._most_parts = limits.connections_per_worker + max(1, limits.connections_per_worker // 4)

    def start(self, segments: Iterable[Segment]) -> None:
        """Start all workers, without waiting for them.

        Raises:
            PoolError: The operating system refused.
        """
        for number in range(self._limits.workers):
            self._start_worker(number, segments)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    @property
    def in_flight(self) -> int:
        """Number of parts that the workers have."""
        return sum(len(worker.parts) for worker in self._workers)

    def has_room(self) -> bool:
        """Returns True if a worker can take a part."""
        return any(map(self._can_take, self._workers))

    def send(self, fetch: Fetch, now: float) -> bool:
        """Give a part to the worker that has the fewest; False if none takes it."""
        free = filter(self._can_take, self._workers)
        for worker in sorted(free, key=lambda worker: len(worker.parts)):
            if not worker.parts:
                worker.last_heard = worker.last_asked = now  # an idle worker says nothing, and need not
            if worker.process.send(fetch):
                worker.parts[fetch.part] = None
                return True
        return False

    def send_to_holder(self, part: int, message: object) -> None:
        """Send a message to the worker that has a part, if one has."""
        for worker in self._workers:
            if part in worker.parts:
                worker.process.send(message)

    def announce(self, made: Iterable[Segment], dropped: Iterable[Segment]) -> None:
        """Tell all workers of the segments that were made and dropped."""
        for worker in self._workers:
            for segment in made:
                self._send_segment(worker, segment)
            for segment in dropped:
                worker.process.send(UnmapSegment(segment.number))

    def receive(self, worker: WorkerHandle, now: float) -> list[Fetched | Failed]:
        """Returns the results of parts that a worker has sent, and notes everything else that it has said."""
        results: list[Fetched | Failed] = []
        try:
            while (message := worker.process.try_receive()) is not None:
                worker.last_heard = now
                if isinstance(message, (Fetched, Failed)):
                    self._note(worker, message)
                    results.append(message)
                elif isinstance(message, Ready):
                    worker.is_ready = True
        except EOFError:
            with contextlib.suppress(KeyError, ValueError):  # its pidfd tells when it has ended, perhaps it just did
                self._selector.unregister(worker.process.sock)
            worker.is_ending = True
        return results

    def replace(self, worker: WorkerHandle, segments: Iterable[Segment]) -> Lost:
        """Reap a worker whose process has ended, and start another in its place.

        Returns:
            The parts that it had, which are to be given to others.

        Raises:
            PoolError: Workers can't be started, or keep dying.
        """
        self._workers.remove(worker)
        self._unregister(worker)
        stderr = worker.process.stderr()
        exitcode = worker.process.reap()
        why = _describe_end(exitcode, worker.is_unresponsive, self._patience_s(worker))
        log.warning("worker process %d ended: %s%s", worker.process.pid, why, f": {stderr}" if stderr else "")
        self._deaths += 1
        if self._deaths > _MAX_DEATHS_PER_WORKER * self._limits.workers:
            what = "keep dying" if worker.is_ready else "can't start"
            printed = f". The last one printed:\n{stderr}" if stderr else ""
            raise WorkerCrashed(f"worker processes {what}: {why}{printed}", exitcode=exitcode)
        self.restarts += 1
        self._start_worker(worker.process.number, segments)
        return Lost(tuple(worker.parts), exitcode, why)

    def watch(self, now: float) -> None:
        """Send a Ping to workers that have parts; kill those that have said nothing for too long."""
        for worker in self._workers:
            quiet_s = now - worker.last_heard
            patience_s = self._patience_s(worker)
            if quiet_s > patience_s and (worker.parts or not worker.is_ready):
                worker.is_unresponsive = True
                self._kill(worker)
            elif worker.parts and now - worker.last_asked > self._limits.worker_timeout_s / 4:
                worker.last_asked = now
                worker.process.send(Ping())

    def stop(self) -> None:
        """End all workers and wait until they are gone."""
        for worker in self._workers:
            self._unregister(worker)
            worker.process.sock.close()  # the worker ends when it sees this
        deadline = time.monotonic() + _END_TIMEOUT_S
        for worker in self._workers:
            _end(worker.process, deadline)
        self._workers.clear()

    def abandon(self) -> None:
        """Forget the workers without touching them: they are the parent's of this forked process."""
        for worker in self._workers:
            worker.process.close_descriptors()
        self._workers.clear()

    def _patience_s(self, worker: WorkerHandle) -> float:
        timeout_s = self._limits.worker_timeout_s
        return timeout_s if worker.is_ready else max(_LEAST_START_TIMEOUT_S, 4 * timeout_s)

    def _can_take(self, worker: WorkerHandle) -> bool:
        # Not before it is ready: a part must not be blamed for workers that can't even start.
        return worker.is_ready and not worker.is_ending and len(worker.parts) < self._most_parts

    def _start_worker(self, number: int, segments: Iterable[Segment]) -> None:
        limits = self._limits
        process = WorkerProcess(number, limits.connections_per_worker, limits.connect_timeout_s, limits.stall_timeout_s)
        worker = WorkerHandle(process, time.monotonic())
        self._workers.append(worker)
        self._selector.register(process.sock, selectors.EVENT_READ, (worker, False))
        self._selector.register(process.pidfd, selectors.EVENT_READ, (worker, True))
        for segment in segments:
            self._send_segment(worker, segment)

    def _send_segment(self, worker: WorkerHandle, segment: Segment) -> None:
        # Without the segment it would fail its parts one by one, and others would have to do its work.
        if not worker.process.send(MapSegment(segment.number, segment.size), segment.fd):
            self._kill(worker)

    def _note(self, worker: WorkerHandle, message: Fetched | Failed) -> None:
        worker.parts.pop(message.part, None)
        if isinstance(message, Fetched):
            self._deaths = 0

    def _kill(self, worker: WorkerHandle) -> None:
        worker.is_ending = True
        worker.process.kill()

    def _unregister(self, worker: WorkerHandle) -> None:
        for fd in (worker.process.sock, worker.process.pidfd):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(fd)


def _end(process: WorkerProcess, deadline: float) -> None:
    try:
        process.reap(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.reap()


def _describe_end(exitcode: int, is_unresponsive: bool, worker_timeout_s: float) -> str:
    if is_unresponsive and exitcode == -signal.SIGKILL:
        return f"it was silent for {worker_timeout_s:g} s and was killed"
    if exitcode == -signal.SIGKILL:
        return "killed by SIGKILL (out of memory?)"
    if exitcode < 0:
        return f"killed by signal {-exitcode}"
    return f"exit status {exitcode}"

"""Worker supervisor: starts the worker processes, gives them parts, watches and replaces them, and ends them.

It decides which worker gets a part, never which part is next. Used by the coordinator, in its thread.

A worker that has died is an event: its pidfd becomes readable, or, where the kernel has none, its socket ends, and it
is polled from then on. A worker that is stuck gives no event, so it is sent a Ping now and then, and killed when it has
said nothing for too long. Its parts go to others only when the process is known to be gone, so that it can never wake
up and write into a slot that was used again.

While it is not proved that the interpreter is one (:mod:`mpreader.pool.coordinator.interpreter`), there is one worker.
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

from mpreader.errors import PoolError, WorkerCrashed
from mpreader.pool.coordinator.arena import Segment
from mpreader.pool.coordinator.interpreter import InterpreterChoice
from mpreader.pool.coordinator.process import WorkerProcess
from mpreader.pool.worker.messages import (
    AskProgress,
    Failed,
    Fetch,
    Fetched,
    MapSegment,
    Ping,
    Progress,
    Ready,
    UnmapSegment,
)

__all__ = ["WorkerSupervisor", "WorkerLimits", "Lost"]

log = logging.getLogger(__name__)

# Deaths in a row, with nothing received in between, that end the pool: workers that can't work must not be restarted
# for ever.
_MAX_DEATHS_PER_WORKER: Final = 2
# A worker that starts is given more time than one that works: four times as much, and no less than this.
_LEAST_START_TIMEOUT_S: Final = 10.0
_END_TIMEOUT_S: Final = 0.5
# Share of the timeout after which a worker that has said nothing is asked; in the rest it must answer.
_PING_AFTER: Final = 0.25


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
        fault: Reason why it can't be used, though it has said that it is ready; None if there is none.
        mapped: Numbers of the segments that it has. It gets each when it first needs it: hundreds at once would not fit
            into its socket while it starts.
        last_heard: Time of its last message, or from which on one is expected, by the monotonic clock.
        asked_since: Time of a Ping that it has not answered yet; None if there is none.
    """

    def __init__(self, process: WorkerProcess, now: float) -> None:
        self.process = process
        self.parts: dict[int, None] = {}
        self.is_ready = False
        self.is_ending = False
        self.is_unresponsive = False
        self.fault: str | None = None
        self.last_heard = now
        self.mapped: set[int] = set()
        self.asked_since: float | None = None


class WorkerSupervisor:
    """All workers of a coordinator. Not thread-safe: owned by the coordinator's thread.

    Args:
        limits: Limits; see :class:`WorkerLimits`.
        selector: Gets the sockets and pidfds of the workers; the data of each is the handle, and True for a pidfd.

    Attributes:
        restarts: Workers that were replaced.
    """

    def __init__(self, limits: WorkerLimits, selector: selectors.BaseSelector) -> None:
        self._limits = limits
        self._selector = selector
        self._workers: list[WorkerHandle] = []
        self._interpreters = InterpreterChoice()
        self._deaths = 0  # since a part was last received
        self.restarts = 0
        # A few parts wait at each worker, so that a connection has the next one at once.
        self._max_parts = limits.connections_per_worker + max(1, limits.connections_per_worker // 4)

    def start(self) -> None:
        """Start all workers, without waiting for them; the first one only, while the interpreter is not proved.

        Raises:
            PoolError: The operating system refused.
        """
        self._interpreters.require_untried()
        self._start_worker(0)
        if self._interpreters.is_proved:
            self._start_others()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    @property
    def in_flight(self) -> int:
        """Number of parts that the workers have."""
        return sum(len(worker.parts) for worker in self._workers)

    @property
    def idle_connections(self) -> int:
        """Connections, of the workers that can take a part, for which there is none."""
        most = self._limits.connections_per_worker
        return sum(max(0, most - len(worker.parts)) for worker in self._workers if self._can_take(worker))

    def has_room(self) -> bool:
        """Returns True if a worker can take a part."""
        return any(map(self._can_take, self._workers))

    def send(self, fetch: Fetch, segment: Segment, now: float) -> bool:
        """Give a part, to be received into a segment, to the worker that has the fewest; False if none takes it."""
        free = filter(self._can_take, self._workers)
        for worker in sorted(free, key=lambda worker: len(worker.parts)):
            if not worker.parts:
                worker.last_heard = now  # an idle worker says nothing, and need not
            if self._map(worker, segment) and worker.process.send(fetch):
                worker.parts[fetch.part] = None
                return True
        return False

    def send_to_holder(self, part: int, message: object) -> None:
        """Send a message to the worker that has a part, if one has."""
        for worker in self._workers:
            if part in worker.parts:
                worker.process.send(message)

    def unmap(self, dropped: Iterable[Segment]) -> None:
        """Let the workers forget segments that were dropped."""
        for segment in dropped:
            for worker in self._workers:
                if segment.number in worker.mapped:
                    worker.mapped.remove(segment.number)
                    worker.process.send(UnmapSegment(segment.number))

    def ask_progress(self) -> None:
        """Ask all workers that have parts how far they are; each answers by a Progress."""
        for worker in self._workers:
            if worker.parts and worker.is_ready:
                worker.process.send(AskProgress())

    def receive(self, worker: WorkerHandle, now: float) -> list[Fetched | Failed | Progress]:
        """Returns what a worker has said of its parts, and notes everything else that it has said."""
        results: list[Fetched | Failed | Progress] = []
        try:
            while (message := worker.process.try_receive()) is not None:
                worker.last_heard, worker.asked_since = now, None
                if isinstance(message, (Fetched, Failed)):
                    self._note(worker, message)
                    results.append(message)
                elif isinstance(message, Progress):
                    results.append(message)
                elif isinstance(message, Ready):
                    self._note_ready(worker, message)
        except EOFError:
            with contextlib.suppress(KeyError, ValueError):  # its pidfd tells when it has ended, perhaps it just did
                self._selector.unregister(worker.process.sock)
            worker.is_ending = True
            if worker.process.pidfd < 0 or not self._interpreters.is_proved:
                worker.process.kill_group()  # else it could live on unseen, if what was started is no worker
        return results

    @property
    def awaits_end(self) -> bool:
        """True while the end of a worker must be asked for, since no event tells of it."""
        return any(worker.is_ending for worker in self._workers if worker.process.pidfd < 0)

    def take_ended(self) -> list[WorkerHandle]:
        """Workers whose process has ended, of those that have no pidfd; each is to be replaced."""
        return [worker for worker in self._workers if worker.process.pidfd < 0 and worker.process.has_ended()]

    def replace(self, worker: WorkerHandle) -> Lost:
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
        why = worker.fault or _describe_end(exitcode, worker.is_unresponsive, self._response_timeout_s(worker))
        log.warning("worker process %d ended: %s%s", worker.process.pid, why, f": {stderr}" if stderr else "")
        # Of a traceback the last line tells what was wrong; all of it is in the log.
        told = f"{why}: {stderr.splitlines()[-1]}" if stderr else why
        if not self._interpreters.is_proved:
            self._interpreters.refuse(told, exitcode)
            self._start_worker(worker.process.number)
            return Lost((), exitcode, why)
        self._deaths += 1
        if self._deaths > _MAX_DEATHS_PER_WORKER * self._limits.workers:
            what = "keep dying" if worker.is_ready else "can't start"
            printed = f". The last one printed:\n{stderr}" if stderr else ""
            raise WorkerCrashed(f"worker processes {what}: {why}{printed}", exitcode=exitcode)
        self.restarts += 1
        self._start_worker(worker.process.number)
        return Lost(tuple(worker.parts), exitcode, told)

    def watch(self, now: float) -> None:
        """Send a Ping to workers that have parts and have said nothing for some time; kill those that don't respond."""
        for worker in self._workers:
            timeout_s = self._response_timeout_s(worker)
            if not worker.is_ready:
                is_late = now - worker.last_heard > timeout_s
            elif worker.asked_since is None:
                # Not by its silence alone: perhaps it was this process that was stopped, and has not listened.
                is_late = False
                if worker.parts and now - worker.last_heard > timeout_s * _PING_AFTER:
                    worker.asked_since = now
                    worker.process.send(Ping())
            else:
                is_late = now - worker.asked_since > timeout_s * (1 - _PING_AFTER)
            if is_late:
                worker.is_unresponsive = True
                self._kill(worker)

    def stop(self) -> None:
        """End all workers and wait until they are gone."""
        for worker in self._workers:
            self._unregister(worker)
            worker.process.sock.close()  # the worker ends when it sees this
        deadline = time.monotonic() + _END_TIMEOUT_S
        for worker in self._workers:
            _end_process(worker.process, deadline)
        self._workers.clear()

    def abandon(self) -> None:
        """Forget the workers without touching them: they are the parent's of this forked process."""
        for worker in self._workers:
            worker.process.close_descriptors()
        self._workers.clear()

    def _response_timeout_s(self, worker: WorkerHandle) -> float:
        timeout_s = self._limits.worker_timeout_s
        if worker.is_ready:
            return timeout_s
        # What may be no worker at all is not waited for so long.
        return max(_LEAST_START_TIMEOUT_S, 4 * timeout_s) if self._interpreters.is_proved else _LEAST_START_TIMEOUT_S

    def _can_take(self, worker: WorkerHandle) -> bool:
        # Not before it is ready: a part must not be blamed for workers that can't even start.
        return worker.is_ready and not worker.is_ending and len(worker.parts) < self._max_parts

    def _start_worker(self, number: int) -> None:
        limits = self._limits
        while True:
            try:
                process = WorkerProcess(
                    number,
                    limits.connections_per_worker,
                    limits.connect_timeout_s,
                    limits.stall_timeout_s,
                    self._interpreters.current,
                )
                break
            except PoolError as error:
                # An error that names a file is the executable's: it is none.
                if self._interpreters.is_proved or getattr(error.__cause__, "filename", None) is None:
                    raise
                self._interpreters.refuse(str(error.__cause__), None)
        worker = WorkerHandle(process, time.monotonic())
        self._workers.append(worker)
        self._selector.register(process.sock, selectors.EVENT_READ, (worker, False))
        if process.pidfd >= 0:
            self._selector.register(process.pidfd, selectors.EVENT_READ, (worker, True))

    def _start_others(self) -> None:
        for number in range(1, self._limits.workers):
            self._start_worker(number)

    def _note_ready(self, worker: WorkerHandle, message: Ready) -> None:
        if not self._interpreters.is_proved:
            worker.fault = self._interpreters.fault_of(message, worker.process.pid)
            if worker.fault is not None:
                self._kill(worker)
                return
            self._start_others()
        worker.is_ready = True

    def _map(self, worker: WorkerHandle, segment: Segment) -> bool:
        """Send a segment to a worker that does not have it; False if the worker does not take it."""
        if segment.number not in worker.mapped:
            if not worker.process.send(MapSegment(segment.number, segment.size), segment.fd):
                return False
            worker.mapped.add(segment.number)
        return True

    def _note(self, worker: WorkerHandle, message: Fetched | Failed) -> None:
        worker.parts.pop(message.part, None)
        if isinstance(message, Fetched):
            self._deaths = 0

    def _kill(self, worker: WorkerHandle) -> None:
        worker.is_ending = True
        if self._interpreters.is_proved:
            worker.process.kill()
        else:
            worker.process.kill_group()

    def _unregister(self, worker: WorkerHandle) -> None:
        for fd in (worker.process.sock, worker.process.pidfd):  # a ValueError: there is no pidfd
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(fd)


def _end_process(process: WorkerProcess, deadline: float) -> None:
    try:
        process.reap(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill_group()
        process.reap()


def _describe_end(exitcode: int, is_unresponsive: bool, worker_timeout_s: float) -> str:
    if is_unresponsive and exitcode == -signal.SIGKILL:
        return f"it was silent for {worker_timeout_s:g} s and was killed"
    if exitcode == -signal.SIGKILL:
        return "killed by SIGKILL (out of memory?)"
    if exitcode < 0:
        return f"killed by signal {-exitcode}"
    return f"exit status {exitcode}"

"""The worker processes of a pool together: started, fed, watched, replaced when they die, and ended.

A dead worker is an event (its pidfd), a stuck one is noticed by its silence. Its parts are given to others only when
the process is known to be gone, so that it can never wake up and write into a slot that was used again.
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

__all__ = ["Crew", "CrewLimits", "Lost"]

log = logging.getLogger(__name__)

# Deaths in a row, with nothing received in between, that end the pool: no loop of restarts.
_MAX_DEATHS_PER_WORKER: Final = 2
# A worker that starts is given more time than one that works: four times as much, and no less than this.
_LEAST_START_TIMEOUT_S: Final = 10.0
_END_TIMEOUT_S: Final = 0.5


class CrewLimits(NamedTuple):
    """How many workers and connections, and how long to wait for them."""

    workers: int
    connections_per_worker: int
    connect_timeout_s: float
    stall_timeout_s: float
    worker_timeout_s: float


class Lost(NamedTuple):
    """A worker is gone, with these parts."""

    parts: tuple[int, ...]
    exitcode: int
    why: str


class Member:
    """A worker process and what it has in hand."""

    def __init__(self, process: WorkerProcess, now: float) -> None:
        self.process = process
        self.parts: dict[int, None] = {}  # numbers of the parts it has in hand, in the order in which it got them
        self.is_ready = False
        self.is_ending = False  # it has closed its socket, or was killed: it gets nothing more
        self.was_silent = False
        self.last_heard = now
        self.last_asked = now


class Crew:
    """The workers. Not thread-safe: owned by the coordinator's thread."""

    def __init__(self, limits: CrewLimits, selector: selectors.BaseSelector) -> None:
        self._limits = limits
        self._selector = selector
        self._members: list[Member] = []
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
            self._start_member(number, segments)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [member.process.pid for member in self._members]

    @property
    def in_flight(self) -> int:
        """Parts that the workers have in hand."""
        return sum(len(member.parts) for member in self._members)

    def has_room(self) -> bool:
        """Whether a worker can take a part."""
        return any(map(self._can_take, self._members))

    def send(self, fetch: Fetch, now: float) -> bool:
        """Give a part to the worker with the least in hand; False if none takes it."""
        free = filter(self._can_take, self._members)
        for member in sorted(free, key=lambda member: len(member.parts)):
            if not member.parts:
                member.last_heard = member.last_asked = now  # its silence counts from now
            if member.process.send(fetch):
                member.parts[fetch.part] = None
                return True
        return False

    def send_to_holder(self, part: int, message: object) -> None:
        """Send a message to the worker that has a part in hand, if one has."""
        for member in self._members:
            if part in member.parts:
                member.process.send(message)

    def announce(self, made: Iterable[Segment], dropped: Iterable[Segment]) -> None:
        """Tell all workers which segments there are now."""
        for member in self._members:
            for segment in made:
                if not member.process.send(MapSegment(segment.number, segment.size), segment.fd):
                    self._kill(member)
            for segment in dropped:
                member.process.send(UnmapSegment(segment.number))

    def receive(self, member: Member, now: float) -> list[Fetched | Failed]:
        """What a worker has said about parts."""
        news: list[Fetched | Failed] = []
        try:
            while (message := member.process.try_receive()) is not None:
                member.last_heard = now
                if isinstance(message, (Fetched, Failed)):
                    self._note(member, message)
                    news.append(message)
                elif isinstance(message, Ready):
                    member.is_ready = True
        except EOFError:
            with contextlib.suppress(KeyError, ValueError):  # its pidfd tells when it has ended, perhaps it just did
                self._selector.unregister(member.process.sock)
            member.is_ending = True
        return news

    def bury(self, member: Member, segments: Iterable[Segment]) -> Lost:
        """A worker's process has ended: reap it, start another, tell what it had in hand.

        Raises:
            PoolError: Workers can't be started, or keep dying.
        """
        self._members.remove(member)
        self._unregister(member)
        stderr = member.process.stderr()
        exitcode = member.process.reap()
        why = _describe_end(exitcode, member.was_silent, self._patience_s(member))
        log.warning("worker process %d ended: %s%s", member.process.pid, why, f": {stderr}" if stderr else "")
        self._deaths += 1
        if self._deaths > _MAX_DEATHS_PER_WORKER * self._limits.workers:
            what = "keep dying" if member.is_ready else "can't start"
            printed = f". The last one printed:\n{stderr}" if stderr else ""
            raise WorkerCrashed(f"worker processes {what}: {why}{printed}", exitcode=exitcode)
        self.restarts += 1
        self._start_member(member.process.number, segments)
        return Lost(tuple(member.parts), exitcode, why)

    def watch(self, now: float) -> None:
        """Ask those that are silent whether they live; kill those that don't answer."""
        for member in self._members:
            silence_s = now - member.last_heard
            patience_s = self._patience_s(member)
            if silence_s > patience_s and (member.parts or not member.is_ready):
                member.was_silent = True
                self._kill(member)
            elif member.parts and now - member.last_asked > self._limits.worker_timeout_s / 4:
                member.last_asked = now
                member.process.send(Ping())

    def stop(self) -> None:
        """End all workers and wait until they are gone."""
        for member in self._members:
            self._unregister(member)
            member.process.sock.close()  # the worker ends when it sees this
        deadline = time.monotonic() + _END_TIMEOUT_S
        for member in self._members:
            _end(member.process, deadline)
        self._members.clear()

    def abandon(self) -> None:
        """Forget the workers without touching them: they are the parent's of this forked process."""
        for member in self._members:
            member.process.close_descriptors()
        self._members.clear()

    def _patience_s(self, member: Member) -> float:
        timeout_s = self._limits.worker_timeout_s
        return timeout_s if member.is_ready else max(_LEAST_START_TIMEOUT_S, 4 * timeout_s)

    def _can_take(self, member: Member) -> bool:
        # Not before it is ready: a part must not be blamed for workers that can't even start.
        return member.is_ready and not member.is_ending and len(member.parts) < self._most_parts

    def _start_member(self, number: int, segments: Iterable[Segment]) -> None:
        limits = self._limits
        process = WorkerProcess(number, limits.connections_per_worker, limits.connect_timeout_s, limits.stall_timeout_s)
        member = Member(process, time.monotonic())
        self._members.append(member)
        self._selector.register(process.sock, selectors.EVENT_READ, (member, False))
        self._selector.register(process.pidfd, selectors.EVENT_READ, (member, True))
        for segment in segments:
            if not process.send(MapSegment(segment.number, segment.size), segment.fd):
                self._kill(member)

    def _note(self, member: Member, message: Fetched | Failed) -> None:
        member.parts.pop(message.part, None)
        if isinstance(message, Fetched):
            self._deaths = 0

    def _kill(self, member: Member) -> None:
        member.is_ending = True
        member.process.kill()

    def _unregister(self, member: Member) -> None:
        for fd in (member.process.sock, member.process.pidfd):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(fd)


def _end(process: WorkerProcess, deadline: float) -> None:
    try:
        process.reap(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.reap()


def _describe_end(exitcode: int, was_silent: bool, worker_timeout_s: float) -> str:
    if was_silent and exitcode == -signal.SIGKILL:
        return f"it was silent for {worker_timeout_s:g} s and was killed"
    if exitcode == -signal.SIGKILL:
        return "killed by SIGKILL (out of memory?)"
    if exitcode < 0:
        return f"killed by signal {-exitcode}"
    return f"exit status {exitcode}"

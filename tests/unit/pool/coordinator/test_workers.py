"""The supervisor's decisions about workers: who gets a part, who is asked, who is killed. No process is started."""

from __future__ import annotations

import selectors
from typing import Any

import pytest

from mpreader.pool.coordinator.workers import WorkerHandle, WorkerLimits, WorkerSupervisor
from mpreader.pool.worker.messages import Fetch, Fetched, MapSegment, Ping, Pong, Ready, UnmapSegment
from mpreader.pool.worker.route import Route
from mpreader.pool.worker.version import ObjectVersion

TIMEOUT_S = 8.0


class Process:
    """The parent's side of a process that says what the test puts into ``said``."""

    pid = pidfd = number = 0

    def __init__(self) -> None:
        self.sent: list[object] = []
        self.said: list[object] = []
        self.takes_messages = True
        self.is_killed = False

    def send(self, message: object, fd: int | None = None) -> bool:
        self.sent.append(message)
        return self.takes_messages

    def try_receive(self) -> object | None:
        return self.said.pop(0) if self.said else None

    def kill(self) -> None:
        self.is_killed = True


class Segment:
    """A segment of which only the number matters."""

    size = fd = 0

    def __init__(self, number: int) -> None:
        self.number = number


def fetch(part: int) -> Fetch:
    return Fetch(part, Route(False, "host", 80, "/key"), ObjectVersion(100, ""), 0, 100, 0, 0)


class Bench:
    """A supervisor of workers that are all ready."""

    def __init__(self, workers: int, connections: int = 4) -> None:
        self.supervisor = WorkerSupervisor(
            WorkerLimits(workers, connections, 10.0, 20.0, TIMEOUT_S), selectors.DefaultSelector()
        )
        self.processes = [Process() for _ in range(workers)]
        self.handles = [WorkerHandle(process, 0.0) for process in self.processes]  # type: ignore[arg-type]
        self.supervisor._workers = self.handles
        for handle in self.handles:
            self.say(handle, Ready(), 0.0)

    def say(self, handle: WorkerHandle, message: object, now: float) -> None:
        process: Any = handle.process
        process.said.append(message)
        self.supervisor.receive(handle, now)

    def send(self, part: int, now: float = 0.0, segment: int = 0) -> bool:
        return self.supervisor.send(fetch(part), Segment(segment), now)  # type: ignore[arg-type]


def test_supervisor_gives_parts_to_the_worker_with_the_fewest_until_all_are_full() -> None:
    bench = Bench(workers=2, connections=1)
    assert [bench.send(part) for part in range(5)] == [True, True, True, True, False]
    assert [list(handle.parts) for handle in bench.handles] == [[0, 2], [1, 3]]
    assert not bench.supervisor.has_room()
    bench.say(bench.handles[1], Fetched(1, 0.1, 0.0), 0.0)
    assert bench.send(5)
    assert list(bench.handles[1].parts) == [3, 5]


def test_supervisor_tries_another_worker_when_one_takes_no_message() -> None:
    bench = Bench(workers=2)
    bench.processes[0].takes_messages = False
    assert bench.send(1)
    assert (list(bench.handles[0].parts), list(bench.handles[1].parts)) == ([], [1])
    bench.processes[1].takes_messages = False
    assert not bench.send(2)


def test_supervisor_sends_a_segment_once_and_only_to_whom_needs_it() -> None:
    bench = Bench(workers=2, connections=1)
    for part in range(3):
        bench.send(part, segment=7)
    kinds = [[type(message) for message in process.sent] for process in bench.processes]
    assert kinds == [[MapSegment, Fetch, Fetch], [MapSegment, Fetch]]
    bench.send(3, segment=8)
    bench.supervisor.unmap([Segment(8)])  # type: ignore[list-item]
    assert [process.sent[-1] for process in bench.processes if UnmapSegment(8) in process.sent] == [UnmapSegment(8)]


@pytest.mark.parametrize("responds", [True, False])
def test_supervisor_asks_a_worker_that_is_silent_and_kills_it_if_it_does_not_respond(responds: bool) -> None:
    bench = Bench(workers=1)
    [process], [handle] = bench.processes, bench.handles
    bench.send(1)
    bench.supervisor.watch(0.3 * TIMEOUT_S)
    assert process.sent[-1] == Ping()
    if responds:
        bench.say(handle, Pong(), 0.4 * TIMEOUT_S)
    bench.supervisor.watch(1.1 * TIMEOUT_S)
    assert process.is_killed is not responds


def test_supervisor_that_has_not_listened_for_long_kills_nobody_unasked() -> None:
    bench = Bench(workers=1)
    bench.send(1)
    bench.supervisor.watch(100 * TIMEOUT_S)  # the whole program was stopped meanwhile
    assert not bench.processes[0].is_killed
    assert bench.processes[0].sent[-1] == Ping()


def test_supervisor_leaves_a_worker_in_peace_that_has_nothing_to_do() -> None:
    bench = Bench(workers=1)
    bench.supervisor.watch(100 * TIMEOUT_S)
    assert (bench.processes[0].sent, bench.processes[0].is_killed) == ([], False)

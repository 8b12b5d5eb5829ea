"""The parent's side of a worker process: what is sent arrives or is said not to, and an end is an end."""

from __future__ import annotations

import multiprocessing.spawn
import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpreader import PoolError
from mpreader.pool.coordinator.process import WorkerProcess
from mpreader.pool.worker.messages import Ping, Pong, Ready, python_name

_TIMEOUT_S = 30

Start = Callable[..., WorkerProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start workers that are killed and reaped when the test ends, if they were not before."""
    workers: list[WorkerProcess] = []

    def start() -> WorkerProcess:
        workers.append(WorkerProcess(len(workers), 2, 1.0, 1.0))
        return workers[-1]

    yield start
    for worker in workers:
        if worker.sock.fileno() >= 0:
            worker.kill()
            worker.reap()


@pytest.fixture
def start_script(start: Start, tmp_path: Path) -> Iterator[Callable[[str], WorkerProcess]]:
    """Start a shell script as the worker; its ``$3`` is the socket."""
    before = multiprocessing.spawn.get_executable()

    def start_script(script: str) -> WorkerProcess:
        path = tmp_path / "python"
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o755)
        multiprocessing.spawn.set_executable(str(path))
        return start()

    yield start_script
    multiprocessing.spawn.set_executable(before)


def wait_for(fd: int) -> None:
    assert select.select([fd], [], [], _TIMEOUT_S)[0], "it did not become readable"


def receive(worker: WorkerProcess) -> object:
    wait_for(worker.sock.fileno())
    return worker.try_receive()


def test_worker_says_that_it_is_ready_and_answers(start: Start) -> None:
    worker = start()
    assert receive(worker) == Ready(worker.pid, python_name())
    assert worker.try_receive() is None
    assert worker.send(Ping())
    assert receive(worker) == Pong()


def test_worker_is_in_a_session_of_its_own(start: Start) -> None:
    worker = start()
    assert os.getsid(worker.pid) == worker.pid != os.getsid(0), "a Ctrl-C at the terminal would reach it"


def test_worker_that_is_killed_is_gone_when_its_pidfd_says_so(start: Start) -> None:
    worker = start()
    assert receive(worker) == Ready(worker.pid, python_name())
    worker.kill()
    wait_for(worker.pidfd)
    with pytest.raises(EOFError):
        worker.try_receive()
    assert not worker.send(Ping())
    assert worker.reap() == -signal.SIGKILL
    worker.kill()  # its number may be another process's by now: nobody is struck


def test_reap_waits_no_longer_than_it_is_told_to(start: Start) -> None:
    worker = start()
    with pytest.raises(subprocess.TimeoutExpired):
        worker.reap(0.05)
    assert receive(worker) == Ready(worker.pid, python_name()), "it goes on"


def test_worker_that_is_stuck_blocks_nobody(start: Start) -> None:
    worker = start()
    assert receive(worker) == Ready(worker.pid, python_name())
    os.kill(worker.pid, signal.SIGSTOP)
    sent = 0
    while worker.send(Ping()):
        sent += 1
        assert sent < 100_000
    assert sent > 10
    assert worker.try_receive() is None


def test_end_of_what_a_worker_printed_is_kept(start_script: Callable[[str], WorkerProcess]) -> None:
    worker = start_script("seq 1 5000; echo 'ImportError: no module named ssl' >&2; exit 3\n")
    wait_for(worker.pidfd)
    printed = worker.stderr()
    assert printed.endswith("4999\n5000\nImportError: no module named ssl")
    assert 3000 < len(printed) <= 4096
    assert worker.reap() == 3


def test_worker_that_can_not_be_started_is_one_error_and_leaves_nothing(start: Start) -> None:
    before = multiprocessing.spawn.get_executable()
    held = os.listdir("/proc/self/fd")
    multiprocessing.spawn.set_executable("/no/such/python")
    try:
        with pytest.raises(PoolError, match=r"/no/such/python.*ulimit -n"):
            start()
    finally:
        multiprocessing.spawn.set_executable(before)
    assert os.listdir("/proc/self/fd") == held


@pytest.mark.row("secrets")
def test_worker_gets_nothing_of_the_environment_but_what_an_interpreter_needs(
    start_script: Callable[[str], WorkerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "secret")
    monkeypatch.setenv("ANYTHING", "secret")
    monkeypatch.setenv("TZ", "UTC")
    worker = start_script("exec env\n")
    wait_for(worker.pidfd)
    assert "TZ=UTC" in worker.stderr()
    assert "secret" not in worker.stderr()
    assert worker.reap() == 0

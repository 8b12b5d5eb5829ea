"""Workers that die, hang or can't start; descriptors that run out."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing.spawn
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mpreader import PoolConfig, PoolError, RangeFetcher, WorkerCrashed
from mpreader.config import KiB, MiB
from mpreader.testing import Fault, FaultKind, FaultServer

if TYPE_CHECKING:
    from tests.faults.conftest import Serve

pytestmark = pytest.mark.timeout(60)

DATA = os.urandom(4 * MiB)
PART = 128 * KiB


@pytest.fixture
def make_fetcher() -> Iterator[Callable[..., RangeFetcher]]:
    fetchers: list[RangeFetcher] = []

    def make(**settings: Any) -> RangeFetcher:
        config = PoolConfig(
            **{"workers": 2, "connections_per_worker": 2, "max_memory": 16 * MiB, "part_size": PART, **settings}
        )
        fetchers.append(RangeFetcher(pool_config=config))
        return fetchers[-1]

    yield make
    for fetcher in fetchers:
        fetcher.close()


def pids(fetcher: RangeFetcher) -> list[int]:
    coordinator = fetcher._engine.pool.coordinator
    assert coordinator is not None
    return coordinator.workers.pids


def strike(fetcher: RangeFetcher, server: FaultServer, signum: int, *, all_workers: bool = False) -> threading.Thread:
    """Once the load is under way, signal a worker, or all, and then let the server go on."""

    def hit() -> None:
        server.wait_for_requests(4)
        for pid in pids(fetcher) if all_workers else pids(fetcher)[:1]:
            os.kill(pid, signum)
        server.inject()

    thread = threading.Thread(target=hit)
    thread.start()
    return thread


@pytest.fixture
def slow_server(serve: Serve) -> FaultServer:
    """Answers to the first GETs stall half-way for so long that workers die before they end."""
    return serve({"/object": DATA}, Fault(FaultKind.STALL, seconds=1.2, after_bytes=PART // 2))


@pytest.mark.parametrize("all_workers", [False, True], ids=["one", "all"])
@pytest.mark.row("worker killed, or out of memory")
def test_killed_worker_is_replaced_and_its_parts_are_read_again(
    make_fetcher: Callable[..., RangeFetcher], slow_server: FaultServer, *, all_workers: bool
) -> None:
    fetcher = make_fetcher()
    thread = strike(fetcher, slow_server, signal.SIGKILL, all_workers=all_workers)
    assert fetcher.fetch_object(slow_server.url("/object")) == DATA
    thread.join()
    assert fetcher.stats.restarts == (2 if all_workers else 1)
    assert fetcher.stats.retries >= 1
    assert len(pids(fetcher)) == 2


@pytest.mark.row("worker killed, or out of memory")
def test_worker_killed_while_idle_is_replaced(make_fetcher: Callable[..., RangeFetcher], serve: Serve) -> None:
    server = serve({"/object": DATA})
    fetcher = make_fetcher(workers=1)
    for round_number in range(4):
        assert fetcher.fetch_object(server.url("/object")) == DATA
        assert fetcher.stats.restarts == round_number
        [pid] = pids(fetcher)
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while fetcher.stats.restarts == round_number:
            assert time.monotonic() < deadline, "its end was not noticed"


@pytest.mark.row("worker stopped (stuck)")
def test_stuck_worker_is_killed_and_its_parts_are_read_again(
    make_fetcher: Callable[..., RangeFetcher], slow_server: FaultServer
) -> None:
    fetcher = make_fetcher(worker_timeout_s=0.5)
    thread = strike(fetcher, slow_server, signal.SIGSTOP)
    assert fetcher.fetch_object(slow_server.url("/object")) == DATA
    thread.join()
    assert fetcher.stats.restarts == 1


@pytest.mark.row("worker stopped (stuck)")
def test_stuck_worker_does_not_delay_close(make_fetcher: Callable[..., RangeFetcher], serve: Serve) -> None:
    server = serve({"/object": DATA})
    fetcher = make_fetcher(worker_timeout_s=3600)
    assert fetcher.fetch_object(server.url("/object")) == DATA
    os.kill(pids(fetcher)[0], signal.SIGSTOP)
    fetcher.close()


def test_worker_busy_with_a_slow_server_is_not_taken_for_stuck(
    make_fetcher: Callable[..., RangeFetcher], serve: Serve
) -> None:
    server = serve({"/object": DATA}, Fault(FaultKind.DELAY, at=(1,), seconds=1.5))
    fetcher = make_fetcher(worker_timeout_s=0.4)
    [view] = fetcher.fetch(server.url("/object"), [(0, PART)])
    assert view == DATA[:PART]
    assert fetcher.stats.restarts == 0


@pytest.mark.row("worker killed, or out of memory")
def test_part_that_kills_every_worker_is_one_error(make_fetcher: Callable[..., RangeFetcher], serve: Serve) -> None:
    server = serve({"/object": DATA}, Fault(FaultKind.STALL, seconds=60))
    fetcher = make_fetcher(workers=4)
    ended = threading.Event()

    def kill_holders() -> None:
        workers = None
        while not ended.wait(0.01):
            coordinator = fetcher._engine.pool.coordinator
            workers = coordinator.workers if coordinator is not None else None
            for worker in list(workers._workers) if workers is not None else []:
                if worker.parts:
                    os.kill(worker.process.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_holders)
    thread.start()
    try:
        with pytest.raises(WorkerCrashed, match=r"bytes 100-1100.*SIGKILL \(out of memory\?\)") as caught:
            fetcher.fetch(server.url("/object"), [(100, 1100)])
    finally:
        ended.set()
        thread.join()
    assert caught.value.exitcode == -signal.SIGKILL
    assert caught.value.ranges == ((100, 1100),)
    server.inject()
    assert fetcher.fetch_object(server.url("/object")) == DATA, "the pool must go on without that part"


@pytest.fixture
def set_interpreter(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Let the workers be started by a shell script in place of Python."""
    before = multiprocessing.spawn.get_executable()

    def set_to(script: str) -> None:
        path = tmp_path / "python"
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o755)
        multiprocessing.spawn.set_executable(str(path))

    yield set_to
    multiprocessing.spawn.set_executable(before)


@pytest.mark.row("worker can't start")
def test_workers_that_can_not_start_are_one_error_with_what_they_printed(
    make_fetcher: Callable[..., RangeFetcher], serve: Serve, set_interpreter: Callable[[str], None], tmp_path: Path
) -> None:
    log = tmp_path / "starts"
    set_interpreter(f"echo start >> {log}\nsleep 0.1\necho 'ImportError: no module named ssl' >&2\nexit 3\n")
    server = serve({"/object": DATA})
    fetcher = make_fetcher()
    with pytest.raises(WorkerCrashed, match=r"can't start.*\n?.*no module named ssl") as caught:
        fetcher.fetch_object(server.url("/object"))
    assert caught.value.exitcode == 3
    assert len(log.read_text().splitlines()) <= 6, "a loop of restarts"
    with pytest.raises(WorkerCrashed, match="no module named ssl"):
        fetcher.fetch_object(server.url("/object"))


@pytest.mark.row("worker can't start")
def test_workers_that_can_not_start_any_more_are_restarted_a_few_times_only(
    make_fetcher: Callable[..., RangeFetcher], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve({"/object": DATA})
    fetcher = make_fetcher()
    monkeypatch.setenv("PYTHONHOME", "/no/such/folder")  # the interpreter is the right one, and yet can't run
    with pytest.raises(WorkerCrashed, match=r"worker processes can't start: exit status 1(.|\n)*encodings") as caught:
        fetcher.fetch_object(server.url("/object"), timeout_s=15)
    assert caught.value.exitcode == 1
    assert 1 <= fetcher.stats.restarts <= 4
    monkeypatch.undo()
    assert fetcher.fetch_object(server.url("/object")) == DATA


@pytest.mark.row("worker can't start")
def test_worker_that_is_slow_to_start_delays_nobody(
    make_fetcher: Callable[..., RangeFetcher], serve: Serve, set_interpreter: Callable[[str], None], tmp_path: Path
) -> None:
    first = f'if mkdir {tmp_path}/first 2>/dev/null; then exec {sys.executable} "$@"; fi\n'
    set_interpreter(first + "exec sleep 3600\n")
    server = serve({"/object": DATA})
    assert make_fetcher().fetch_object(server.url("/object")) == DATA


@pytest.mark.row("worker can't start")
def test_interpreter_that_is_not_there_is_a_clear_error(
    make_fetcher: Callable[..., RangeFetcher], serve: Serve, set_interpreter: Callable[[str], None]
) -> None:
    set_interpreter("")
    multiprocessing.spawn.set_executable("/no/such/python")
    server = serve({"/object": DATA})
    with pytest.raises(PoolError, match="/no/such/python"):
        make_fetcher().fetch_object(server.url("/object"))


@contextlib.contextmanager
def descriptors_left(spare: int) -> Iterator[None]:
    """Let this process open ``spare`` descriptors more, and no others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as filled:
        in_use = [int(name) for name in os.listdir("/proc/self/fd")]
        for _ in range(max(in_use) + 1 - len(in_use)):
            filled.enter_context(open(os.devnull))
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1 + spare, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.row("low ulimit -n")
def test_too_few_descriptors_are_a_clear_error(make_fetcher: Callable[..., RangeFetcher], serve: Serve) -> None:
    fetcher = make_fetcher(workers=8)
    gc.collect()  # or one in the middle might give descriptors back
    for spare in (*range(8), 11):
        with descriptors_left(spare), pytest.raises(PoolError, match="ulimit -n"):
            fetcher._engine.pool.start()
    server = serve({"/object": DATA})
    assert fetcher.fetch_object(server.url("/object")) == DATA, "the same fetcher must work when there are enough"

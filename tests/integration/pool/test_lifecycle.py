"""A pool in the programs of its users: forks, signals, exits, threads, and what its workers are made of."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mpreader import PoolConfig, RangeFetcher
from mpreader.config import KiB, MiB
from mpreader.testing import Fault, FaultKind, FaultServer

if TYPE_CHECKING:
    from tests.integration.conftest import WorkersOf

pytestmark = pytest.mark.timeout(90)

PROGRAM = """
import hashlib, os, signal, sys, threading, time, warnings
warnings.simplefilter("error")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born without it
from mpreader import MpreaderError, PoolClosed, PoolConfig, RangeFetcher
URL = {url!r}
CONFIG = PoolConfig(workers=2, connections_per_worker=2, max_memory=16 << 20, part_size=256 << 10, stall_timeout_s=3600)
fetcher = RangeFetcher(pool_config=CONFIG)

def digest(used=fetcher):
    return hashlib.md5(used.fetch_object(URL)).hexdigest()

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""


def start(program: str, server: FaultServer, *, by_stdin: bool = False) -> subprocess.Popen[str]:
    """Start a program in a session of its own."""
    code = PROGRAM.format(url=server.url("/object")) + program
    with tempfile.TemporaryFile("w+") as stdin:
        stdin.write(code)
        stdin.seek(0)
        return subprocess.Popen(
            [sys.executable] if by_stdin else [sys.executable, "-c", code],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


def output_of(process: subprocess.Popen[str]) -> list[str]:
    """Wait for a program, which must succeed and print nothing to stderr."""
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    return out.splitlines()


def run(program: str, server: FaultServer, *, by_stdin: bool = False) -> list[str]:
    return output_of(start(program, server, by_stdin=by_stdin))


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not come to pass in {timeout_s} s"
        threading.Event().wait(0.005)


@pytest.fixture
def digest(data: bytes) -> str:
    import hashlib

    return hashlib.md5(data).hexdigest()


# -- exits


@pytest.mark.row("no __main__ guard, stdin, daemonic process")
@pytest.mark.parametrize("by_stdin", [False, True], ids=["-c", "stdin"])
def test_program_without_guard_or_close_ends_silently(server: FaultServer, digest: str, by_stdin: bool) -> None:
    assert run("say(digest())", server, by_stdin=by_stdin) == [digest]


def test_program_that_ends_in_the_middle_of_a_load_ends_at_once(server: FaultServer) -> None:
    server.inject(Fault(FaultKind.STALL, seconds=3600))
    program = """
def load():
    try:
        digest()
    except PoolClosed:  # the program has ended
        pass
threading.Thread(target=load, daemon=True).start()
while not fetcher._engine.pool.is_running:
    time.sleep(0.01)
"""
    run(program, server)


@pytest.mark.row("exception in the consumer; reader dropped without close")
def test_exception_in_the_consumer_gives_everything_back(server: FaultServer, data: bytes) -> None:
    config = PoolConfig(workers=1, connections_per_worker=2, max_memory=1 * MiB, part_size=64 * KiB)
    ranges = [(start, start + 1000) for start in range(0, len(data), 65536)]
    with RangeFetcher(pool_config=config) as fetcher:
        for _ in range(5):
            with pytest.raises(ZeroDivisionError):  # noqa: PT012
                for index, view in fetcher.stream(server.url("/object"), ranges, max_gap_size=0):
                    assert view == data[index * 65536 :][:1000]
                    1 / 0  # noqa: B018
        assert fetcher.fetch(server.url("/object"), [(0, 512 * KiB)])[0] == data[: 512 * KiB]


@pytest.mark.row("no __main__ guard, stdin, daemonic process")
def test_process_of_multiprocessing_that_is_a_daemon_can_fetch(server: FaultServer, digest: str) -> None:
    program = """
import multiprocessing
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
process = context.Process(target=lambda: queue.put(digest()), daemon=True)
process.start()
say(queue.get())
process.join()
say(process.exitcode)
"""
    assert run(program, server) == [digest, "0"]


# -- forks


FORK = """
say(digest())
view = fetcher.fetch(URL, [(0, 8)])[0]
stream = fetcher.stream(URL, [(n << 18, (n + 1) << 18) for n in range(32)], max_gap_size=0)
first = next(stream)
pid = os.fork()
if pid == 0:
    try:
        next(stream)
    except PoolClosed:
        say("child: the parent's read is refused")
    say("child:", digest(), bytes(view).hex())
    %s
_, status = os.waitpid(pid, 0)
say("child ended", status)
say("parent:", sum(len(view) for _, view in stream), digest(), fetcher.stats.restarts)
"""


@pytest.mark.parametrize(
    "end", ["sys.exit(0)", "os._exit(0)", "fetcher.close(); sys.exit(0)", "del fetcher; sys.exit(0)"]
)
@pytest.mark.row("fork of the program after use")
def test_forked_child_has_its_own_pool_and_leaves_the_parents_alone(
    server: FaultServer, data: bytes, digest: str, end: str
) -> None:
    assert run(FORK % end, server) == [
        digest,
        "child: the parent's read is refused",
        f"child: {digest} {data[:8].hex()}",
        "child ended 0",
        f"parent: {len(data) - (1 << 18)} {digest} 0",
    ]


@pytest.mark.row("fork of the program after use", within_s=60)
def test_forks_in_the_middle_of_loads_never_hang(server: FaultServer, digest: str) -> None:
    program = """
stopping = threading.Event()
def load():
    while not stopping.is_set():
        digest()
threads = [threading.Thread(target=load) for _ in range(2)]
for thread in threads:
    thread.start()
digest()
for number in range(25):
    pid = os.fork()
    if pid == 0:
        fetcher.close()
        os._exit(0)
    deadline = time.monotonic() + 30
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            say("child", number, "hangs")
        time.sleep(0.001)
stopping.set()
for thread in threads:
    thread.join()
say(digest(), fetcher.stats.restarts)
"""
    # After a fork with threads Python itself warns from 3.12 on; the program asks for it.
    assert run("warnings.simplefilter('ignore', DeprecationWarning)\n" + program, server) == [f"{digest} 0"]


@pytest.mark.row("fork of the program after use", within_s=60)
def test_locks_that_other_threads_hold_at_a_fork_do_not_hang_the_child(server: FaultServer, digest: str) -> None:
    program = """
from mpreader.pool import pool
digest()
held, forked = threading.Barrier(2), threading.Event()
def hold():
    with pool._shared_lock, fetcher._engine.pool._lock, fetcher._engine.pool.coordinator._wakeup._lock:
        held.wait()
        forked.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(10)
    say(digest(), pool.shared_pool(CONFIG))
    os._exit(0)
say(os.waitpid(pid, 0)[1])
forked.set()
thread.join()
say(digest())
"""
    ignored = "warnings.simplefilter('ignore', DeprecationWarning)\n"
    assert run(ignored + program, server) == [
        f"{digest} Pool(not running, workers=2, connections_per_worker=2)",
        "0",
        digest,
    ]


# -- signals


@pytest.fixture
def loading(server: FaultServer, workers_of: WorkersOf) -> Iterator[subprocess.Popen[str]]:
    """A program in its own process group that is in the middle of a load, with workers, and would never end."""
    server.inject(Fault(FaultKind.STALL, seconds=3600, after_bytes=1000))
    process = start("digest()", server)
    try:
        server.wait_for_requests(4)
        assert len(workers_of(process.pid)) == 2
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.row("Ctrl-C")
def test_ctrl_c_is_a_keyboard_interrupt_at_once(loading: subprocess.Popen[str], workers_of: WorkersOf) -> None:
    os.killpg(loading.pid, signal.SIGINT)
    _, err = loading.communicate(timeout=30)
    assert loading.returncode == -signal.SIGINT, err
    assert err.count("Traceback") == 1, err
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert workers_of(loading.pid) == []


@pytest.mark.row("parent killed")
def test_killed_parent_takes_its_workers_along(
    loading: subprocess.Popen[str], workers_of: WorkersOf, new_shared_memory: Callable[[], set[str]]
) -> None:
    loading.kill()
    loading.wait()
    wait_until(lambda: not workers_of(loading.pid))
    assert not new_shared_memory()


def test_terminated_parent_takes_its_workers_along(loading: subprocess.Popen[str], workers_of: WorkersOf) -> None:
    loading.terminate()
    loading.wait()
    wait_until(lambda: not workers_of(loading.pid))


@pytest.mark.row("Ctrl-C")
def test_keyboard_interrupt_in_a_fetch_leaves_the_fetcher_usable(server: FaultServer, digest: str) -> None:
    server.inject(Fault(FaultKind.STALL, at=range(1, 4), seconds=3600, after_bytes=1000))
    program = """
try:
    digest()
except KeyboardInterrupt:
    say("interrupted")
say(digest())
"""
    process = start(program, server)
    server.wait_for_requests(4)
    process.send_signal(signal.SIGINT)
    assert output_of(process) == ["interrupted", digest]


# -- workers


@pytest.fixture
def fetcher() -> Iterator[RangeFetcher]:
    config = PoolConfig(workers=2, connections_per_worker=8, max_memory=16 * MiB, part_size=256 * KiB)
    with RangeFetcher(pool_config=config) as fetcher:
        yield fetcher


def pids(fetcher: RangeFetcher) -> list[int]:
    coordinator = fetcher._engine.pool.coordinator
    assert coordinator is not None
    return coordinator.workers.pids


def private_bytes(pid: int) -> int:
    """Memory of a process that is its alone, or its share of what it shares; without the arena."""
    total, in_arena = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if not line.split(" ", 1)[0].endswith(":"):
            in_arena = "/memfd:mpreader" in line
        elif line.startswith("Pss:") and not in_arena:
            total += int(line.split()[1]) * KiB
    return total


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_workers_start_fast_and_stay_small(fetcher: RangeFetcher, server: FaultServer, data: bytes) -> None:
    fetcher._engine.pool.start()
    coordinator = fetcher._engine.pool.coordinator
    assert coordinator is not None
    wait_until(lambda: all(worker.is_ready for worker in coordinator.workers._workers))
    # About 0.04 s; an import of boto3 or numpy costs more than the whole.
    assert max(processor_seconds(pid) for pid in pids(fetcher)) < 0.25
    for _ in range(3):
        assert fetcher.fetch_object(server.url("/object")) == data
    assert max(private_bytes(pid) for pid in pids(fetcher)) < 40 * MiB


def test_workers_import_nothing_heavy(fetcher: RangeFetcher, server: FaultServer) -> None:
    fetcher.fetch(server.url("/object"), [(0, 10)])
    for pid in pids(fetcher):
        mapped = Path(f"/proc/{pid}/maps").read_text()
        assert "torch" not in mapped
        assert "numpy" not in mapped


@pytest.mark.row("secrets")
def test_workers_know_no_secret(monkeypatch: pytest.MonkeyPatch, server: FaultServer, data: bytes) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame-key")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "sesame-token")
    monkeypatch.setenv("ANYTHING_ELSE", "sesame-else")
    with RangeFetcher(pool_config=PoolConfig(workers=1, connections_per_worker=2, max_memory=4 * MiB)) as fetcher:
        url = server.url("/object") + "?X-Amz-Signature=sesame-signature"
        assert fetcher.fetch(url, [(0, 1000)])[0] == data[:1000]
        for pid in pids(fetcher):
            for file in ("environ", "cmdline"):
                text = Path(f"/proc/{pid}/{file}").read_text()
                assert text
                assert "sesame" not in text
                assert "AWS_" not in text
        assert "sesame" not in repr(fetcher)


def test_workers_listen_on_nothing(fetcher: RangeFetcher, server: FaultServer) -> None:
    def listening() -> set[str]:
        tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
        return {line.split()[9] for table in tables for line in table if line.split()[3] == "0A"}

    fetcher.fetch(server.url("/object"), [(0, 10)])
    inodes = listening()
    for pid in pids(fetcher):
        held = set()
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                held.add(os.readlink(entry))
        assert not {f"socket:[{inode}]" for inode in inodes} & held

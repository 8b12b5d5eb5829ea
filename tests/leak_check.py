"""Leak check: a test fails if it leaves a process, shared memory, a file descriptor or a thread behind.

A pytest plugin that ``tests/conftest.py`` registers. It looks at the process of the tests and at its descendants and at
nothing else, so that it does not matter what other programs do on the same machine.

Descendants: a process whose parent has ended would become a child of init and be out of sight. The process of the tests
is made their subreaper, which the kernel gives such orphans to instead.

Shared memory: that of arenas has no name, and is seen by its descriptors and mappings. A name in ``/dev/shm`` does not
say who made it, but a program that uses shared memory has it open or mapped. A new name counts as left behind unless a
process that is no descendant holds it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import multiprocessing.resource_tracker
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

_PR_SET_CHILD_SUBREAPER = 36
_SOON_S = 0.05  # what goes away by itself does so soon
# What is freed by one collection may free what the next one finds. With all that the tests have imported, one takes
# seconds on a busy machine: time alone does not tell that nothing more will go away.
_LEAST_COLLECTIONS = 5
_PROC = Path("/proc")
_SHM = Path("/dev/shm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("leak_grace_s", "seconds in which what a test has used may still go away", default="10")


_started: weakref.WeakSet[subprocess.Popen[Any]] = weakref.WeakSet()


def pytest_sessionstart() -> None:
    _note_processes()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the leak check can't become the parent of orphans")
    multiprocessing.resource_tracker.ensure_running()  # it stays, and so does its descriptor


@pytest.fixture(autouse=True)
def _nothing_is_left(pytestconfig: pytest.Config, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Compare what there is before a test with what there is after it."""
    names, before = shared_memory_names(), _held()
    # What was there before is hardly part of this test's garbage: without it, a collection takes no time.
    gc.freeze()
    try:
        yield
        _wait_until_nothing_is_left(pytestconfig, caplog, names, before)
    finally:
        gc.unfreeze()


def _wait_until_nothing_is_left(
    pytestconfig: pytest.Config, caplog: pytest.LogCaptureFixture, names: set[str], before: set[str]
) -> None:
    caplog.get_records("call").clear()  # torch logs exceptions, whose tracebacks keep clients and their sockets alive
    pool = sys.modules.get("mpreader.pool.pool")
    if pool is not None:
        pool.close_shared_pools()
    started = time.monotonic()
    collect_at, collections = started + _SOON_S, 0
    # Of shared memory only what was there at once, and stayed: another program may make some at any time.
    new = shared_memory_names() - names
    while left := _held() - before | {f"shared memory {name}" for name in _ours(new & shared_memory_names())}:
        is_late = time.monotonic() > started + float(pytestconfig.getini("leak_grace_s"))
        if is_late and collections >= _LEAST_COLLECTIONS:
            pytest.fail("left behind: " + ", ".join(sorted(left)) + _said_of(left), pytrace=False)
        if time.monotonic() > collect_at:
            gc.collect()  # a client dropped in a reference cycle keeps its sockets until then
            collections += 1
            gc.unfreeze()  # the cycle may have older members, which the next collection, a slow one, finds
            collect_at = time.monotonic() + _SOON_S
        threading.Event().wait(0.005)


@pytest.fixture
def new_shared_memory() -> Callable[[], set[str]]:
    """Tell which names have come to ``/dev/shm`` since the test began and are not another program's."""
    before = shared_memory_names()
    return lambda: _ours(shared_memory_names() - before)


def _held() -> set[str]:
    """Threads, processes, descriptors and mapped memory that must not outlive a test, in words."""
    held = {f"thread {thread.name}" for thread in threading.enumerate() if not thread.daemon}
    held.update(f"process {child.pid} ({child.command})" for child in _children())
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listdir itself had open
            held.add(f"file descriptor {entry} ({os.readlink(f'/proc/self/fd/{entry}')})")
    # A view that somebody holds keeps the arena's memory mapped when its descriptor is closed; by the inodes.
    mapped = re.findall(r" (\d+) +/memfd:mpreader ", Path("/proc/self/maps").read_text())
    held.update(f"mapped memory of an arena (inode {inode})" for inode in mapped)
    return held


def _said_of(left: set[str]) -> str:
    """Returns what helps to find out who has left the sockets: their ends, and where all threads are."""
    sockets = [int(entry.split()[2]) for entry in left if "(socket:" in entry]
    if not sockets:
        return ""
    said = []
    for fd in sockets:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as left_open:
            own = left_open.getsockname()
            try:
                said.append(f"{fd}: from {own} to {left_open.getpeername()}")
            except OSError as error:
                said.append(f"{fd}: at {own}, {error.strerror}")
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        said.append(f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame)[-8:]))
    return "\n" + "\n".join(said)


# -- processes


class _Process(NamedTuple):
    pid: int
    parent: int
    command: str
    has_ended: bool


def _try_read_process(pid: int | str) -> _Process | None:
    try:
        stat = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None  # ended meanwhile
    found = re.fullmatch(r"(\d+) \((.*)\) (\S) (\d+) .*", stat, re.DOTALL)
    assert found is not None, stat
    return _Process(int(found[1]), int(found[4]), found[2], has_ended=found[3] in "ZX")


def _children() -> Iterator[_Process]:
    """Processes that were started here, or whose parent has ended; without Python's own resource tracker."""
    tracker = multiprocessing.resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]
    for task in Path("/proc/self/task").iterdir():  # a child belongs to the thread that started it
        with contextlib.suppress(OSError):
            for pid in (task / "children").read_text().split():
                child = _try_read_process(pid)
                if child is not None and child.pid != tracker and not (child.has_ended and _reap_orphan(child.pid)):
                    yield child


def _note_processes() -> None:
    init = subprocess.Popen.__init__

    @functools.wraps(init)
    def noted(self: subprocess.Popen[Any], *args: Any, **options: Any) -> None:
        _started.add(self)
        init(self, *args, **options)

    subprocess.Popen.__init__ = noted  # type: ignore[method-assign]


def _reap_orphan(pid: int) -> bool:
    """Reap a process that has ended, unless whoever has started it should have done so."""
    if any(getattr(each, "pid", None) == pid for each in list(_started)):
        return False
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return True


# -- shared memory


def shared_memory_names() -> set[str]:
    """All names in ``/dev/shm`` that the user of the tests owns."""
    names = set()
    with os.scandir(_SHM) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                    names.add(entry.name)
    return names


def _ours(names: set[str]) -> set[str]:
    """Those of the names that no other program holds, and that are still there."""
    if not names:
        return set()
    held = _held_by_others()
    ours = set()
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            if (_SHM / name).stat().st_ino not in held:
                ours.add(name)
    return ours


def _held_by_others() -> set[int]:
    """Inodes of ``/dev/shm`` that processes other than this one and its descendants have open or mapped.

    Names would not do: a semaphore is mapped under a temporary one.
    """
    processes = {each.pid: each for each in map(_try_read_process, _pids()) if each is not None}
    held: set[int] = set()
    for process in processes.values():
        if not _descends_from(os.getpid(), process, processes):
            held.update(_shared_memory_of(_PROC / str(process.pid)))
    return held


def _shared_memory_of(process: Path) -> Iterator[int]:
    with contextlib.suppress(OSError):  # ended meanwhile, or another user's
        yield from map(int, re.findall(rf" (\d+) +{_SHM}/", (process / "maps").read_text()))
        for entry in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if os.readlink(entry).startswith(f"{_SHM}/"):
                    yield entry.stat().st_ino


def _pids() -> list[str]:
    return [name for name in os.listdir(_PROC) if name.isdecimal()]


def _descends_from(ancestor: int, process: _Process | None, processes: dict[int, _Process]) -> bool:
    while process is not None and process.pid != ancestor:
        process = processes.get(process.parent)
    return process is not None

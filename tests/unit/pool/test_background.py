"""BackgroundThreads: outcomes of blocking calls come by callback, and nobody has to wait for a call that hangs."""

from __future__ import annotations

import gc
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from mpreader.errors import PoolError
from mpreader.pool.background import BackgroundThreads

_WAIT_S = 30
_NAME = "test-background"


@pytest.fixture
def threads() -> Iterator[BackgroundThreads]:
    threads = BackgroundThreads(_NAME, max_threads=3)
    yield threads
    threads.close()
    for thread in _alive():
        thread.join(_WAIT_S)
    assert not _alive()


def _alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == _NAME]


def _await_idle(threads: BackgroundThreads) -> None:
    """Wait until no call is under way; a callback comes just before that."""
    deadline = time.monotonic() + _WAIT_S
    while threads._unfinished and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not threads._unfinished


def test_background_hands_over_results_and_exceptions(threads: BackgroundThreads) -> None:
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    error = ValueError("no")

    def fail() -> int:
        raise error

    threads.submit(lambda: 42, outcomes.put)
    assert outcomes.get(timeout=_WAIT_S) == 42
    threads.submit(fail, outcomes.put)
    assert outcomes.get(timeout=_WAIT_S) is error
    threads.submit(lambda: 43, outcomes.put)  # an exception ends no thread
    assert outcomes.get(timeout=_WAIT_S) == 43


def test_background_makes_no_more_calls_at_one_time_than_it_may(threads: BackgroundThreads) -> None:
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    begun: queue.SimpleQueue[int] = queue.SimpleQueue()
    may_end = threading.Event()

    def call(number: int) -> int:
        begun.put(number)
        may_end.wait(_WAIT_S)
        return number

    for number in range(5):
        threads.submit(partial(call, number), outcomes.put)
    assert {begun.get(timeout=_WAIT_S) for _ in range(3)} == {0, 1, 2}
    assert (begun.empty(), len(_alive())) == (True, 3)
    may_end.set()
    assert {outcomes.get(timeout=_WAIT_S) for _ in range(5)} == set(range(5))


def test_background_starts_a_thread_only_when_none_is_idle(threads: BackgroundThreads) -> None:
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    submitted = threading.Semaphore(0)

    def tell(outcome: object) -> None:
        outcomes.put(outcome)
        assert submitted.acquire(timeout=_WAIT_S)  # the owner is quicker than the end of this thread's call

    threads.submit(lambda: 0, tell)
    for number in range(1, 5):
        assert outcomes.get(timeout=_WAIT_S) == number - 1
        threads.submit(partial(int, number), tell)
        submitted.release()
    assert outcomes.get(timeout=_WAIT_S) == 4
    submitted.release()
    assert len(_alive()) == 1


def test_background_close_drops_what_has_not_begun_and_waits_for_nothing(threads: BackgroundThreads) -> None:
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    begun = threading.Semaphore(0)
    may_end = threading.Event()

    def call() -> str:
        begun.release()
        may_end.wait(_WAIT_S)
        return "begun"

    for _ in range(3):
        threads.submit(call, outcomes.put)
    for _ in range(3):
        assert begun.acquire(timeout=_WAIT_S)
    threads.submit(lambda: "dropped", outcomes.put)
    threads.close()
    may_end.set()
    for thread in _alive():
        thread.join(_WAIT_S)
    assert [outcomes.get(timeout=_WAIT_S) for _ in range(3)] == ["begun"] * 3
    assert outcomes.empty()


def test_background_keeps_nothing_of_a_call_that_is_over(threads: BackgroundThreads) -> None:
    class Thing:
        def work(self) -> None:
            pass

    thing = Thing()
    gone = weakref.ref(thing)
    done = threading.Event()
    threads.submit(thing.work, lambda _: done.set())
    assert done.wait(_WAIT_S)
    del thing
    _await_idle(threads)
    gc.collect()
    assert gone() is None


def _refuse_threads(monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    """Refuse all threads of this module but the first ones, as ``ulimit -u`` does."""
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def refuse(thread: threading.Thread) -> None:
        if thread.name == _NAME:
            if len(started) == allowed:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)


def test_background_makes_do_with_the_threads_that_it_gets(
    threads: BackgroundThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse_threads(monkeypatch, allowed=1)
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for number in range(5):
        threads.submit(partial(int, number), outcomes.put)
    assert [outcomes.get(timeout=_WAIT_S) for _ in range(5)] == [*range(5)]
    assert len(_alive()) == 1


def test_background_without_any_thread_is_an_error(threads: BackgroundThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse_threads(monkeypatch, allowed=0)
    with pytest.raises(PoolError, match=r"can't start new thread; if it is a limit \(ulimit -u"):
        threads.submit(int, print)
    monkeypatch.undo()
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threads.submit(int, outcomes.put)
    assert outcomes.get(timeout=_WAIT_S) == 0
    assert len(_alive()) == 1


class SlowOnce:
    """A call whose first run ends only when it is told to."""

    def __init__(self) -> None:
        self.runs = 0
        self.may_end = threading.Event()
        self._lock = threading.Lock()

    def __call__(self) -> int:
        with self._lock:
            self.runs += 1
            run = self.runs
        if run == 1:
            self.may_end.wait(_WAIT_S)
        return run


def test_call_that_is_slow_is_made_twice_and_its_outcome_told_once(threads: BackgroundThreads) -> None:
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    late: queue.SimpleQueue[int] = queue.SimpleQueue()
    call = SlowOnce()
    threads.submit(call, outcomes.put, late.put)
    assert outcomes.get(timeout=_WAIT_S) == 2
    call.may_end.set()
    assert late.get(timeout=_WAIT_S) == 1
    assert outcomes.empty()
    _await_idle(threads)


def test_call_that_is_slow_keeps_no_other_from_being_made(threads: BackgroundThreads) -> None:
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    slow = [SlowOnce() for _ in range(2)]
    for call in slow:
        threads.submit(call, outcomes.put)
    assert [outcomes.get(timeout=_WAIT_S) for _ in slow] == [2, 2]
    for number in range(20):  # by the threads that are not blocked
        threads.submit(partial(int, number), outcomes.put)
    assert {outcomes.get(timeout=_WAIT_S) for _ in range(20)} == set(range(20))
    for call in slow:
        call.may_end.set()


def test_second_call_that_fails_leaves_the_first_one_its_time(threads: BackgroundThreads) -> None:
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    may_end, has_failed = threading.Event(), threading.Event()

    def call() -> str:
        if may_end.is_set():
            has_failed.set()
            raise OSError("refused")
        may_end.set()
        has_failed.wait(_WAIT_S)
        return "first"

    threads.submit(call, outcomes.put)
    assert outcomes.get(timeout=_WAIT_S) == "first"


def test_calls_are_made_twice_only_for_a_share_of_all(threads: BackgroundThreads) -> None:
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    slow = [SlowOnce() for _ in range(3)]
    for call in slow:
        threads.submit(call, outcomes.put)
    assert [outcomes.get(timeout=_WAIT_S) for _ in range(2)] == [2, 2]
    assert sorted(call.runs for call in slow) == [1, 2, 2]
    for call in slow:
        call.may_end.set()
    assert outcomes.get(timeout=_WAIT_S) == 1

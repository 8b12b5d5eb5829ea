"""Background threads for calls that block on the network, such as HEAD requests and the renewal of credentials.

Used by the coordinator, whose own thread must never block, by :mod:`mpreader.sources.versions`, where a caller waits
for many answers at once and no longer than its deadline, and for ``.metadata``. It knows nothing of sources, and waits
for nothing.

Object stores answer one request in fifty a hundred times more slowly than the others. A call that takes much longer
than others did is made once more, by another thread, and whichever of the two succeeds first is taken::

    submit ──► a thread makes the call ───────────────────────────────────────► on_outcome, once
                 └► it is overdue, by the watch ──► another thread makes it, too ──┘
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from mpreader.errors import PoolError
from mpreader.pool.blocking import make_queue

__all__ = ["BackgroundThreads", "call_twice_if_slow"]

Result = TypeVar("Result")

# The HEADs of a checkpoint's files go out together, or hundreds of files would cost seconds.
_MAX_THREADS: Final = 16
# A call is overdue after so many times as long as nine of ten others took, and no earlier than this; while little is
# known, after that.
_LATENESS: Final = 4.0
_SHORTEST_PATIENCE_S: Final = 0.25
_FIRST_PATIENCE_S: Final = 1.0
_LEAST_KNOWN: Final = 3
_TIMES_KEPT: Final = 32
# Calls that may be made twice: so many, and this share of all. A service that is overloaded is not asked much more.
_FREE_REPEATS: Final = 2
_REPEATS: Final = 0.1


class _Call(Generic[Result]):
    """A call that was submitted.

    Attributes:
        make: The call.
        on_outcome: Takes what it returned, or the exception that it raised.
        on_late: Takes what it returned when it was made twice, and the other one was quicker.
        began_s: Time at which it was begun, by the monotonic clock; 0 if it was not.
        runs: Threads that make it now.
        is_repeated: True once it was begun a second time.
        is_over: True once its outcome was taken.
    """

    __slots__ = ("began_s", "is_over", "is_repeated", "make", "on_late", "on_outcome", "runs")

    def __init__(
        self,
        make: Callable[[], Result],
        on_outcome: Callable[[Result | Exception], object],
        on_late: Callable[[Result], object],
    ) -> None:
        self.make = make
        self.on_outcome = on_outcome
        self.on_late = on_late
        self.began_s = 0.0
        self.runs = 0
        self.is_repeated = self.is_over = False


class BackgroundThreads:
    """Threads that make blocking calls and hand each outcome to a callback; started one by one, as calls need them.

    ``submit`` and ``close`` are for one thread only, the owner's. A callback runs in a background thread: it should do
    no more than put the outcome where the owner looks for it, and must not raise. A call may be made twice, also at the
    same time, and its outcome is told once::

        threads = BackgroundThreads("mpreader-sources")
        threads.submit(source.open, lambda outcome: mailbox.put((number, outcome)))
        number, outcome = mailbox.get()  # what source.open() returned, or the Exception that it raised
        threads.close()

    Args:
        name: Name of the threads, for whoever lists them.
        max_threads: Most calls that are made at one time; further ones wait for their turn, in order. A call that is
            overdue gets a thread beyond these.
    """

    def __init__(self, name: str, max_threads: int = _MAX_THREADS) -> None:
        self._name = name
        self._max_threads = max_threads
        self._calls: queue.SimpleQueue[_Call[Any] | None] = make_queue()
        self._threads = 0
        # Guards all that follows, which the background threads write, too.
        self._lock = threading.Lock()
        self._unfinished = 0  # runs of calls that are not over, begun or not
        self._running: set[_Call[Any]] = set()
        self._times_s: deque[float] = deque(maxlen=_TIMES_KEPT)  # of calls that succeeded lately
        self._submitted = self._repeated = 0
        self._is_watched = self._is_closed = False
        # Wakes the watch: True when there is something to watch again, None at the end.
        self._watch_calls: queue.SimpleQueue[bool | None] = make_queue()

    def submit(
        self,
        call: Callable[[], Result],
        on_outcome: Callable[[Result | Exception], object],
        on_late: Callable[[Result], object] = lambda _: None,
    ) -> None:
        """Have a call made in the background; not after ``close``.

        Args:
            call: The call.
            on_outcome: Takes what the call returned, or the exception that it raised.
            on_late: Takes what the call returned if it was made twice and the other one was quicker: to close it.

        Raises:
            PoolError: The operating system refuses even one thread.
        """
        with self._lock:
            self._unfinished += 1
            self._submitted += 1
            has_idle_thread = self._unfinished <= self._threads
        if not has_idle_thread and self._threads < self._max_threads:
            self._start_thread()
        self._calls.put(_Call(call, on_outcome, on_late))

    def close(self) -> None:
        """Drop the calls that have not begun, and let the threads end; does not wait for calls that have begun."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()
        with self._lock:
            threads, self._threads, self._is_closed = self._threads, 0, True
        for _ in range(threads):
            self._calls.put(None)
        self._watch_calls.put(None)

    def _start_thread(self) -> None:
        try:
            # A daemon: a server that never answers must not keep the interpreter from exiting.
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        except RuntimeError as error:
            if self._threads:  # which make the call later
                return
            with self._lock:
                self._unfinished -= 1
            raise PoolError(f"{error}; if it is a limit (ulimit -u, ulimit -v), raise it") from error
        with self._lock:
            self._threads += 1

    # -- the threads that make calls

    def _work(self) -> None:
        while self._make_next_call():
            pass

    def _make_next_call(self) -> bool:
        # A method of its own: a loop's variables would keep the last call, and what it refers to, while it waits.
        call = self._calls.get()
        if call is None:
            return False
        self._make(call)
        return True

    def _make(self, call: _Call[Any]) -> None:
        self._begin(call)
        outcome = _outcome_of(call.make)
        with self._lock:
            # Before the outcome is told: the owner may answer it with the next call, which this thread can make.
            self._unfinished -= 1
            call.runs -= 1
            is_late = call.is_over
            if not is_late and isinstance(outcome, Exception) and call.runs:
                return  # perhaps the other one succeeds
            call.is_over = True
            self._running.discard(call)
            if not isinstance(outcome, Exception) and not is_late:
                self._times_s.append(time.monotonic() - call.began_s)
        if not is_late:
            call.on_outcome(outcome)
        elif not isinstance(outcome, Exception):
            call.on_late(outcome)

    def _begin(self, call: _Call[Any]) -> None:
        with self._lock:
            call.runs += 1
            call.began_s = call.began_s or time.monotonic()
            if call.is_repeated:
                return
            has_others = bool(self._running)
            self._running.add(call)
            needs_watch = not self._is_watched
            self._is_watched = True
        if needs_watch:
            with contextlib.suppress(RuntimeError):  # a limit: then nothing is made twice
                threading.Thread(target=self._watch, name=f"{self._name}-watch", daemon=True).start()
        elif not has_others:
            self._watch_calls.put(True)

    # -- the watch, a thread of its own

    def _watch(self) -> None:
        wait_s: float | None = self._repeat_overdue()
        while True:
            try:
                if self._watch_calls.get(timeout=wait_s) is None:
                    return
            except queue.Empty:
                pass
            wait_s = self._repeat_overdue()

    def _repeat_overdue(self) -> float | None:
        """Make overdue calls once more; returns the seconds until there may be another, None if none can be."""
        now = time.monotonic()
        with self._lock:
            patience_s = self._patience_s()
            may_repeat = int(_FREE_REPEATS + _REPEATS * self._submitted) - self._repeated
            waiting = [call for call in self._running if not call.is_repeated]
            overdue = [call for call in waiting if now - call.began_s >= patience_s][: max(0, may_repeat)]
            if self._is_closed:
                return None
            for call in overdue:
                call.is_repeated = True
            self._repeated += len(overdue)
            self._unfinished += len(overdue)
            self._threads += len(overdue)
        for call in overdue:
            self._start_repeat(call)
        left_s = [call.began_s + patience_s - now for call in waiting if not call.is_repeated]
        return max(_SHORTEST_PATIENCE_S, min(left_s)) if left_s else None

    def _start_repeat(self, call: _Call[Any]) -> None:
        try:
            threading.Thread(target=self._work_from, args=([call],), name=self._name, daemon=True).start()
        except RuntimeError:  # a limit: the first one has to do
            with self._lock:
                self._unfinished -= 1
                self._threads -= 1

    def _work_from(self, calls: list[_Call[Any]]) -> None:
        self._make(calls.pop())  # popped, or this thread would keep it while it waits for others
        self._work()

    def _patience_s(self) -> float:
        if len(self._times_s) < _LEAST_KNOWN:
            return _FIRST_PATIENCE_S
        ordered = sorted(self._times_s)
        return max(_SHORTEST_PATIENCE_S, _LATENESS * ordered[int(0.9 * (len(ordered) - 1))])


def call_twice_if_slow(name: str, call: Callable[[], Result], on_late: Callable[[Result], object]) -> Result:
    """Make a call in a background thread, and once more if it takes long; wait for whichever succeeds first.

    Args:
        name: Name of the threads.
        call: The call.
        on_late: Takes what the slower one returned.

    Raises:
        Exception: What the call raised, if both have failed.
        PoolError: The operating system refuses even one thread.
    """
    outcomes: queue.SimpleQueue[Any] = make_queue()
    threads = BackgroundThreads(name)
    is_given_up = threading.Event()  # by a Ctrl-C: then nobody takes the outcome

    def take(outcome: Result | Exception) -> None:
        if not is_given_up.is_set():
            outcomes.put(outcome)
        elif not isinstance(outcome, Exception):
            on_late(outcome)

    try:
        threads.submit(call, take, on_late)
        outcome: Result | Exception = outcomes.get()
    finally:
        is_given_up.set()
        threads.close()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _outcome_of(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # noqa: BLE001  # whatever it is, it must reach who waits for it, not end a thread
        return error

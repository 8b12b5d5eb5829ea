"""Background threads for calls that block on the network, such as HEAD requests and the renewal of credentials.

Used by the coordinator, whose own thread must never block, and by :mod:`mpreader.sources.versions`, where a caller
waits for many answers at once and no longer than its deadline. It knows nothing of sources, and waits for nothing.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

from mpreader.errors import PoolError
from mpreader.pool.blocking import make_queue

__all__ = ["BackgroundThreads"]

Result = TypeVar("Result")

# The HEADs of a checkpoint's files go out together, or hundreds of files would cost seconds.
_MAX_THREADS: Final = 16


class BackgroundThreads:
    """Threads that make blocking calls and hand each outcome to a callback; started one by one, as calls need them.

    ``submit`` and ``close`` are for one thread only, the owner's. A callback runs in a background thread: it should do
    no more than put the outcome where the owner looks for it, and must not raise::

        threads = BackgroundThreads("mpreader-sources")
        threads.submit(source.open, lambda outcome: mailbox.put((number, outcome)))
        number, outcome = mailbox.get()  # what source.open() returned, or the Exception that it raised
        threads.close()

    Args:
        name: Name of the threads, for whoever lists them.
        max_threads: Most calls that are made at one time; further ones wait for their turn, in order.
    """

    def __init__(self, name: str, max_threads: int = _MAX_THREADS) -> None:
        self._name = name
        self._max_threads = max_threads
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = make_queue()
        self._threads = 0
        self._unfinished = 0  # calls that were submitted and are not over
        self._lock = threading.Lock()  # guards _unfinished, which the background threads count down

    def submit(self, call: Callable[[], Result], on_outcome: Callable[[Result | Exception], object]) -> None:
        """Have a call made in the background; not after ``close``.

        Args:
            call: The call.
            on_outcome: Takes what the call returned, or the exception that it raised.

        Raises:
            PoolError: The operating system refuses even one thread.
        """
        with self._lock:
            self._unfinished += 1
            has_idle_thread = self._unfinished <= self._threads
        if not has_idle_thread and self._threads < self._max_threads:
            self._start_thread()
        self._calls.put(lambda: self._make(call, on_outcome))

    def close(self) -> None:
        """Drop the calls that have not begun, and let the threads end; does not wait for calls that have begun."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()
        for _ in range(self._threads):
            self._calls.put(None)
        self._threads = 0

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
        self._threads += 1

    def _make(self, call: Callable[[], Result], on_outcome: Callable[[Result | Exception], object]) -> None:
        outcome = _outcome_of(call)
        with self._lock:
            # Before the outcome is told: the owner may answer it with the next call, which this thread can make.
            self._unfinished -= 1
        on_outcome(outcome)

    def _work(self) -> None:
        while self._make_next_call():
            pass

    def _make_next_call(self) -> bool:
        # A method of its own: a loop's variables would keep the last call, and what it refers to, while it waits.
        call = self._calls.get()
        if call is None:
            return False
        call()
        return True


def _outcome_of(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # noqa: BLE001  # whatever it is, it must reach who waits for it, not end a thread
        return error

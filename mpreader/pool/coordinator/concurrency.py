"""How many parts are in flight at one time: as many as keep the workers busy, and no more.

S3 gives about 90 MB/s to a connection, so many are needed. A server that gives a gigabyte per second, next door or in
front of S3, is drained by a few; more of them would only spread the same bytes over more memory, none of it in the
processor's cache, and threads over processors that have no time for them. Two facts about each part that arrives tell
the cases apart:

* its rate: ``workers`` times what one can receive, divided by the rate of one part, is enough;
* the share of its time in which its thread was ready to run, and waited for a processor: where that is high, the
  host has no more to give.

Before the first part has arrived, more are asked for step by step, as long as processors are idle meanwhile.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Final

__all__ = ["ConcurrencyLimiter", "is_host_busy"]

# What a worker can take: 0.25 to 0.35 s of processor time per GB over loopback, and a processor has other things to do.
WORKER_BYTES_PER_S: Final = 2e9
_LOW_PRESSURE: Final = 0.15
_HIGH_PRESSURE: Final = 0.35
_SMOOTHING: Final = 0.2
_FADING: Final = 0.01  # slower: what was fast once, while nothing else went on, may be so again
# A fast server would have answered by then, a slow one will be asked for more meanwhile.
_FIRST_ANSWER_S: Final = 0.04
_DOUBLING_S: Final = 0.015

Kind = tuple[str, int, int]


class _History:
    """What is known of parts of one server and about one size."""

    __slots__ = ("bytes_per_s", "limit", "next_step", "pressure")

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self.next_step = now + _FIRST_ANSWER_S
        self.bytes_per_s = 0.0
        self.pressure = 0.0


class ConcurrencyLimiter:
    """Decides how many parts may be in flight. Not thread-safe: owned by the coordinator's thread."""

    def __init__(self, workers: int, most: int, is_host_busy: Callable[[], bool]) -> None:
        """Begin carefully.

        Args:
            workers: Worker processes; at least two parts for each are let through, one being received, one to follow.
            most: Parts that may ever be in flight.
            is_host_busy: Whether all processors have something to do now.
        """
        self._workers = workers
        self._most = most
        self._is_host_busy = is_host_busy
        self._least = min(2 * workers, most)
        self._known: dict[Kind, _History] = {}

    def limit(self, host: str, port: int, nbytes: int, now: float) -> int:
        """Parts that may be in flight when the next one is of ``nbytes`` bytes from this server."""
        history = self._history_of(host, port, nbytes, now)
        if not history.bytes_per_s and now >= history.next_step:
            history.next_step = now + _DOUBLING_S
            if not self._is_host_busy():
                history.limit = min(self._most, 2 * history.limit)
        return history.limit

    def note(self, host: str, port: int, nbytes: int, seconds: float, stalled_s: float, now: float) -> None:
        """A part has arrived.

        Args:
            host: The server's name.
            port: Its port.
            nbytes: Bytes of the part.
            seconds: Time from the request to the last byte.
            stalled_s: The part of ``seconds`` in which the receiving thread waited for a processor.
            now: Monotonic time.
        """
        history = self._history_of(host, port, nbytes, now)
        seconds = max(seconds, 1e-6)
        bytes_per_s, pressure = nbytes / seconds, min(1.0, stalled_s / seconds)
        if not history.bytes_per_s:
            history.bytes_per_s, history.pressure = bytes_per_s, pressure
        is_faster = bytes_per_s > history.bytes_per_s
        history.bytes_per_s += (_SMOOTHING if is_faster else _FADING) * (bytes_per_s - history.bytes_per_s)
        history.pressure += _SMOOTHING * (pressure - history.pressure)
        enough = math.ceil(self._workers * WORKER_BYTES_PER_S / history.bytes_per_s)
        wanted = max(self._least, min(self._most, enough))
        if history.limit > wanted or history.pressure > _HIGH_PRESSURE:
            history.limit = max(self._least, history.limit - 1)
        elif history.pressure < _LOW_PRESSURE:
            history.limit = min(wanted, history.limit + 1)

    def _history_of(self, host: str, port: int, nbytes: int, now: float) -> _History:
        kind = (host, port, nbytes.bit_length())
        history = self._known.get(kind)
        if history is None:
            history = self._known[kind] = _History(self._least, now)
        return history


def is_host_busy() -> bool:
    """Whether as many threads can run now, on the whole host, as this process may use processors."""
    try:
        with open("/proc/loadavg", "rb") as file:
            runnable = int(file.read().split()[3].split(b"/")[0])
    except (OSError, ValueError, IndexError):  # a sandbox without these numbers
        return False
    # The thread that asks is one of them.
    return runnable > len(os.sched_getaffinity(0))
